"""What can never work is refused, each rule in its own words, and nothing else is."""

from typing import Any

import pytest

from megatron.config.derived.zero import ZERO_NAMES
from tests.config.small import errors, resolved

CASES: list[tuple[int, dict[str, Any], str]] = [
    (1, {"deepspeed": False}, "deepspeed = False: training always runs through DeepSpeed; leave the key out"),
    (
        3,
        {"pipe_parallel_size": 2},
        "world_size = 3: the world size does not divide by pipe_parallel_size x model_parallel_size = 2 x 1 = 2; "
        "run on a multiple of 2 ranks, or choose smaller sizes; --global-num-gpus 2 plans for machines that are not "
        "here",
    ),
    (
        6,
        {"model_parallel_size": 2, "context_parallel_size": 2},
        "the world size does not divide by pipe_parallel_size x model_parallel_size x context_parallel_size = "
        "1 x 2 x 2 = 4",
    ),
    (1, {"pipe_parallel_size": -1}, "pipe_parallel_size = -1: a parallel size cannot be this small"),
    (4, {"pipe_parallel_size": 4}, "pipe_parallel_size = 4: there are only 2 blocks"),
    (1, {"pipe_partition_method": "even"}, "there is no such method; write uniform, parameters, type:"),
    (1, {"pipe_partition_method": "type:("}, "pipe_partition_method = 'type:(': there is no such method"),
    *(
        (2, {"pipe_parallel_size": 2, "pipe_partition_method": blocks}, f"= {blocks}: this does not assign 2 blocks")
        for blocks in ([2], [1, 2], [3, -1])
    ),
    (
        4,
        {"context_parallel_size": 2, "model_parallel_size": 2, "num_kv_heads": 2},
        "context_parallel_size = 2: the 1 key heads of a tensor parallel rank do not divide by it",
    ),
    (2, {"context_parallel_size": 2, "seq_length": 33}, "seq_length = 33 does not divide into 2 parts"),
    (2, {"sequence_parallel": True}, "there are no tensor parallel ranks to shard the sequence over"),
    (
        2,
        {"sequence_parallel": True, "model_parallel_size": 2, "seq_length": 33},
        "sequence_parallel = True: seq_length = 33 does not divide into 2 parts; make seq_length a multiple of 2",
    ),
    (
        2,
        {"padded_vocab_size": 511, "model_parallel_size": 2},
        "padded_vocab_size = 511: model_parallel_size = 2 does not",
    ),
    (1, {"num_layers": 10**12}, "num_layers = 1000000000000: at most 10,000"),
    (1, {"hidden_size": 66}, "hidden_size = 66: num_attention_heads = 4 does not divide it"),
    (1, {"kv_channels": 0}, "kv_channels = 0: a head needs at least one feature"),
    (8, {"model_parallel_size": 8}, "num_attention_heads = 4: model_parallel_size = 8 does not divide it"),
    (1, {"num_kv_heads": 3}, "num_kv_heads = 3: it does not divide num_attention_heads = 4"),
    (
        4,
        {"num_kv_heads": 3, "num_attention_heads": 12, "hidden_size": 96, "model_parallel_size": 4},
        "num_kv_heads = 3: model_parallel_size = 4 neither divides it nor is a multiple of it; with 3 key heads use",
    ),
    (
        4,
        {"num_kv_heads": 1, "kv_channels": 6, "model_parallel_size": 4},
        "num_kv_heads = 1: 4 tensor parallel ranks share each key head, whose 6 features do not divide by them",
    ),
    (1, {"norm": "te_layernorm", "use_bias_in_norms": False}, "norm = te_layernorm always has a bias"),
    (1, {"sliding_window_width": 0}, "sliding_window_width = 0: it must be at least 1"),
    (1, {"num_unique_layers": 1}, "num_unique_layers = 1: blocks do not share weights"),
    (1, {"pos_emb": "rpe", "rpe_num_buckets": 1}, "rpe_num_buckets = 1: it must be at least 2"),
    (1, {"pos_emb": "rpe", "rpe_max_distance": 16}, "rpe_max_distance = 16: the first 16 of rpe_num_buckets = 32"),
    (1, {"pos_emb": "rotary", "rope_scaling": {"type": "ntk", "factor": 2}}, "type must be one of linear, dynamic"),
    (1, {"pos_emb": "rotary", "rope_scaling": {"type": "yarn", "factor": 2}}, "needs original_max_position"),
    (1, {"pos_emb": "rotary", "rope_scaling": {"type": "linear", "facto": 2}}, "did you mean factor?"),
    (1, {"pos_emb": "rotary", "rope_scaling": {"type": "linear", "factor": 0.5}}, "it is at least 1"),
    (1, {"rope_scaling": {"type": "linear", "factor": 2}}, "pos_emb = learned has no rotary positions to scale"),
    (
        1,
        {
            "pos_emb": "rotary",
            "rope_scaling": {
                "type": "llama3",
                "factor": 8,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 4.0,
            },
        },
        "low_freq_factor must be below high_freq_factor",
    ),
    *[
        (1, {"attention_config": [[[kind], "all"]], "sparsity_config": options}, reported)
        for kind, options, reported in [
            ("bigbird", {"blok": 8}, "bigbird has no option blok; did you mean block?"),
            ("local", {"num_random_blocks": 1}, "local has no option num_random_blocks"),
            ("local", {"block": 0}, "block is a whole number from 1 on"),
            ("sparse_fixed", {"attention": "bidirectional"}, "a language model sees no later token"),
            ("sparse_fixed", {"num_global_blocks": 3}, "num_global_blocks = 3 does not divide num_local_blocks = 4"),
            ("sparse_fixed", {"num_different_global_patterns": 2}, "needs different_layout_per_head: true"),
            (
                "sparse_variable",
                {"local_window_blocks": []},
                "local_window_blocks is a list of whole numbers from 1 on",
            ),
            ("bslongformer", {"global_block_indices": [2], "global_block_end_indices": [2]}, "each must be above"),
        ]
    ],
    (
        2,
        {
            "pos_emb": "rpe",
            "checkpoint_activations": True,
            "partition_activations": True,
            "zero_optimization": {"stage": 1},
        },
        "partition_activations = True: pos_emb = rpe has one table for all blocks",
    ),
    (
        1,
        {"num_kv_heads": 2, "attention_config": [[["rwkv"], "all"]]},
        "num_kv_heads = 2: no block has attention; leave it out",
    ),
    (
        1,
        {"intermediate_size": 64, "expansion_factor": 2.0},
        "expansion_factor = 2.0: intermediate_size = 64 says the same width; leave one of the two out",
    ),
    (1, {"mlp_multiple_of": 0}, "mlp_multiple_of = 0: it must be at least 1"),
    (1, {"intermediate_size": 1, "activation": "swiglu"}, "intermediate_size = 1: the MLP would have no width"),
    (
        2,
        {"intermediate_size": 65, "model_parallel_size": 2},
        "inner width is 65, which model_parallel_size = 2 does not divide; set mlp_multiple_of to a multiple of 2",
    ),
    (
        1,
        {"max_position_embeddings": 16},
        "max_position_embeddings = 16: it is less than seq_length = 32; raise it, or shorten seq_length",
    ),
    (1, {"pos_emb": "rotary", "rotary_pct": 0.0}, "rotary_pct = 0.0: it must be above 0 and at most 1"),
    (
        1,
        {"pos_emb": "rotary", "rotary_pct": 0.2},
        "it turns 3 of the 16 features of a head, which is not a number of pairs",
    ),
    (1, {"hidden_dropout": 1.5}, "hidden_dropout = 1.5: it must be between 0 and 1"),
    (1, {"warmup": float("nan")}, "warmup = nan: this is not a finite number; give a number"),
    (1, {"seed": 2**32}, "seed = 4294967296: at most 4,294,967,295, the largest seed of the shuffled"),
    (1, {"gpu_memory": 1e300}, "gpu_memory = 1e+300: at most 1,000,000"),
    (
        1,
        {"warmup": -0.1},
        "warmup = -0.1: it must be between 0 and 1; it is a part of the decay horizon, such as 0.01",
    ),
    (1, {"warmup": 10}, "it is a part of the decay horizon: 10 of 100 steps are 0.1"),
    (
        1,
        {"zero_optimization": {"stage": 1, "overlap_com": True}},
        "DeepSpeed knows no overlap_com in this block; did you mean overlap_comm?",
    ),
    *(
        (2, {"zero_optimization": block}, reported)
        for block, reported in (
            (
                {"stage": 0, "offload_optimizer": {"device": "cpu"}},
                "offload_optimizer to cpu needs stage 1; use stage 1",
            ),
            ({"stage": 0, "cpu_offload": True}, "offload_optimizer to cpu needs stage 1; use stage 1 or more"),
            (
                {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
                "an offload_optimizer of ratio 0.5 needs DeepSpeed's own Adam; leave ratio out",
            ),
            ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param to cpu needs stage 3; use stage 3"),
            (
                {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}},
                "offload_optimizer to nvme needs stage 3; use stage 3",
            ),
            (
                {"stage": 3, "offload_param": {"device": "nvme"}},
                "offload_param has no nvme_path; name the folder of the disk to use",
            ),
            (
                {"stage": 3, "offload_optimizer": {"device": "disk"}},
                "offload_optimizer knows no device 'disk'; write device: cpu, nvme or none",
            ),
        )
    ),
    (1, {"zero_optimization": 2}, "zero_optimization = 2: this is a whole number; write {stage: 1}"),
    (1, {"fp16": True}, "fp16 = True: this is true or false; write precision: fp16, or {enabled: true}"),
    (1, {"pos_emb": "rope"}, "there is no such choice; did you mean rotary?"),
    (1, {"lr_decay_iters": 0}, "lr_decay_iters = 0: it must be more than 0"),
    (1, {"log_interval": 0}, "log_interval = 0: it must be more than 0"),
    (1, {"weight_decay": -1.0}, "weight_decay = -1.0: it cannot be negative"),
    (
        2,
        {"pipe_parallel_size": 1, "zero_optimization": {"stage": 2}},
        "the pipeline engine (pipe_parallel_size = 1) does not work with ZeRO stage 2; use stage 0 or 1, or "
        "pipe_parallel_size: 0",
    ),
    (1, {"fp16_lm_cross_entropy": True}, "fp16_lm_cross_entropy = True: the precision is fp32; leave it out"),
    (
        1,
        {"recompute_granularity": "selective", "checkpoint_activations": True},
        "recompute_granularity = 'selective': checkpoint_activations recomputes blocks; leave one of the two out",
    ),
    (1, {"min_lr": 0.01}, "min_lr = 0.01: it is above the learning rate 0.001"),
    (
        1,
        {"override_lr_scheduler": True, "use_checkpoint_lr_scheduler": True},
        "use_checkpoint_lr_scheduler = True: override_lr_scheduler asks for the opposite; keep one",
    ),
    (
        1,
        {"save": "x"},
        "save = 'x': no interval of checkpoints is given; give checkpoint_factor (steps between checkpoints)",
    ),
    (1, {"checkpoint_factor": 2.5}, "with checkpoint_scale linear it is a whole number of steps"),
    (1, {"checkpoint_factor": 1, "checkpoint_scale": "log"}, "with checkpoint_scale log it must be more than 1"),
    (1, {"finetune": True}, "finetune = True: nothing is loaded; give load"),
    (1, {"load": "s3://b/x"}, "load = 's3://b/x': it is a folder of this machine; give a folder, and this as s3_path"),
    (1, {"s3_path": "s3://bucket/x"}, "s3_path = 's3://bucket/x': there is nothing to copy; give save or load"),
    (1, {"s3_path": "bucket/x", "load": "x"}, "s3_path = 'bucket/x': it is no address in S3; write s3://bucket/folder"),
    (1, {"s3_path": "s3:///x", "load": "x"}, "s3_path = 's3:///x': it is no address in S3"),
    (1, {"s3_path": "s3://b/x", "load": "x", "s3_chunk_size": 1000}, "s3_chunk_size = 1000: S3 takes parts of 5242880"),
    (1, {"pos_emb": "rotary", "opt_pos_emb_offset": 2}, "opt_pos_emb_offset = 2: pos_emb rotary has no rows to skip"),
    (1, {"opt_pos_emb_offset": -1}, "opt_pos_emb_offset = -1: it cannot be negative"),
    (1, {"train_iters": None}, "train_iters: the length of the run is not given; give train_iters"),
    (1, {"train_epochs": 2}, "train_epochs = 2: train_iters and train_epochs are both given; keep one of them"),
    (1, {"train_iters": -1}, "train_iters = -1: a run cannot have this length"),
    (
        1,
        {"data_path": "a", "train_data_paths": ["b"]},
        "data_path = 'a': train_data_paths is given as well; keep one of the two",
    ),
    (1, {"valid_data_paths": ["b"]}, "valid_data_paths = ['b']: there are no train_data_paths beside it"),
    (
        1,
        {"train_label_data_paths": ["b"]},
        "train_label_data_paths = ['b']: there are no train_data_paths that it labels",
    ),
    (
        1,
        {"train_data_paths": ["b"], "train_data_weights": [1.0, 2.0]},
        "train_data_weights = [1.0, 2.0]: it has 2 items for 1 data sets",
    ),
    (1, {"train_data_paths": ["b"], "train_data_weights": [-1]}, "weights are not negative and not all zero"),
    (
        1,
        {"train_iters": None, "train_epochs": 2, "train_data_paths": ["a", "b"], "train_data_weights": [1, 2]},
        "train_data_weights = [1.0, 2.0]: train_epochs reads every data set equally often; leave the weights out",
    ),
    (
        1,
        {"train_iters": None, "train_epochs": 2, "weight_by_num_documents": True},
        "weight_by_num_documents = True: train_epochs reads every data set equally often; leave it out",
    ),
    (
        1,
        {"reset_position_ids": True, "pos_emb": "alibi"},
        "reset_position_ids = True: pos_emb = alibi counts distances, which start again only where attention is reset",
    ),
    (1, {"split": "a,b"}, "split = 'a,b': this is not three shares; write 969,30,1 or the like"),
    (1, {"split": "0,0,0"}, "this is not three shares"),
    (1, {"master_port": 99999}, "master_port = 99999: a port is between 1 and 65535"),
    (1, {"eos_token_ids": [3, -1]}, "eos_token_ids = [3, -1]: a token's id cannot be negative"),
    (1, {"serve_port": 0}, "serve_port = 0: a port is between 1 and 65535"),
    (
        1,
        {"save": "runs/d_\udce9"},
        "save = 'runs/d_\\udce9': it holds bytes that are not UTF-8; rename the file or folder",
    ),
    (1, {"num_nodes": 0}, "num_nodes = 0: it must be more than 0, or -1 for all"),
    (1, {"num_gpus": -2}, "num_gpus = -2: it must be more than 0, or -1 for all"),
    (
        1,
        {"deepspeed_slurm": True, "launcher": "openmpi"},
        "deepspeed_slurm = True: launcher = openmpi asks for another one; leave one of the two out",
    ),
    (1, {"deepspeed_mpi": True, "launcher": "flux"}, "deepspeed_mpi = True: launcher = flux asks for another one"),
    (1, {"deepspeed_mpi": True, "deepspeed_slurm": True}, "deepspeed_mpi = True: deepspeed_slurm asks for srun"),
    (
        1,
        {"launcher": "local", "force_multi": True},
        "force_multi = True: launcher = local starts workers on this host only",
    ),
    (1, {"collective_timeout": -1.0}, "collective_timeout = -1.0: it must be more than 0"),
    (1, {"max_restarts": -1}, "max_restarts = -1: it cannot be negative"),
    (
        1,
        {"deepspeed_extra_args": {"train_batch_size": 99}},
        "train_batch_size = 99 contradicts train_batch_size = 2; set train_batch_size at the top level",
    ),
    (
        1,
        {"zero_optimization": {"stage": 5, "overlap_com": True}},
        "DeepSpeed knows no overlap_com in this block; did you mean overlap_comm?",
    ),
    (
        1,
        {"optimizer": {"type": "Adm", "params": {"lr": "high"}}},
        "lr = 'high' is not a finite number; write it as 0.001 or 1.0e-8",
    ),
    (1, {"optimizer": {"type": "Adam", "params": {"lr": float("inf")}}}, "lr = inf is not a finite number"),
    (1, {"attention_config": ["global"]}, "this makes 1 block, but num_layers = 2; write [[[global], all]]"),
    (1, {"model": {"num-layers": 2}}, "model: there is no such key; write its keys without model around them"),
    (1, {"zero_stage": 2}, "zero_stage = 2: this follows from zero_optimization, which makes it 0"),
    (1, {"batch_size": 3}, "batch_size = 3: train_micro_batch_size_per_gpu = 2 means the same; leave batch_size out"),
    (
        1,
        {"clip_grad": 2.0, "gradient_clipping": 1.0},
        "clip_grad = 2.0: gradient_clipping = 1.0 means the same; leave clip_grad out",
    ),
    (
        1,
        {"weight_decay": 0.2, "optimizer": {"type": "Adam", "params": {"weight_decay": 0.1}}},
        "weight_decay = 0.2: optimizer.params says weight_decay = 0.1; leave one of the two out",
    ),
    (1, {"num_layers": None}, "num_layers: the key is not given; every model needs it"),
    (1, {"num_layers": 0}, "num_layers = 0: this must be at least 1"),
    (1, {"num_attention_heads": 0}, "num_attention_heads = 0: this must be at least 1"),
]


@pytest.mark.parametrize(("world_size", "changes", "reported"), CASES, ids=[case[2][:50] for case in CASES])
def test_rule(world_size: int, changes: dict[str, Any], reported: str) -> None:
    lines = errors(world_size, **changes)
    assert any(reported in line for line in lines), "\n".join(lines)
    assert all(line.startswith(("command line: ", *changes, "world_size")) for line in lines)


@pytest.mark.parametrize(("world_size", "changes", "reported"), CASES, ids=[case[2][:50] for case in CASES])
def test_an_issue_elsewhere_hides_no_rule(world_size: int, changes: dict[str, Any], reported: str) -> None:
    elsewhere = {"eval_interval": "often", "tensorbord_dir": "x", "init_method": "nromal"}
    lines = errors(world_size, **changes, **elsewhere)
    assert any(reported in line for line in lines), "\n".join(lines)
    assert {line.split(": ")[1].partition(" ")[0] for line in lines} >= elsewhere.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": None},
        {"clip_grad": 2.0},
        {"kv_channels": 32},
        {"gradient_clipping": 0},
        {"save": "x", "extra_save_iters": [0]},
        {"save": "x", "checkpoint_factor": 2.0},
        {"checkpoint_factor": 1.5, "checkpoint_scale": "log"},
        {"split": "90/5/5"},
        {"train_iters": 0},
        {"num_kv_heads": 1},
        {"zero_optimization": {"stage": 3}},
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/disk"}}},
        {"pipe_parallel_size": 1, "zero_optimization": {"stage": 1}},
        {"weight_decay": 0.1, "optimizer": {"type": "Adam", "params": {"weight_decay": 0.1}}},
        {"precision": "bfloat16"},
        {"precision": "fp16"},
        {"precision": "bfloat16", "zero_optimization": {"stage": 0}},
        {"autotuning": {"enabled": True}, "zero_optimization": {"stage": [0, 1]}, "train_batch_size": "auto"},
    ],
)
def test_what_no_rule_forbids(changes: dict[str, Any]) -> None:
    assert errors(2, **changes) == []


def test_violations_of_several_rules_are_reported_together() -> None:
    assert len(errors(1, min_lr=1.0, log_interval=0, split="x", save="y")) == 4


def test_clip_grad_alone_is_heeded() -> None:
    config = resolved(clip_grad=2.0).config
    assert config.optimizer.gradient_clipping == 2.0


def test_issues_of_arithmetic_and_of_rules_are_reported_together() -> None:
    lines = errors(4, train_batch_size=30, log_interval=0, lr_decay_iters=-5, zero_optimization={"stag": 1})
    assert [line.split(": ", 2)[1].partition(" ")[0] for line in lines] == [
        "zero_optimization",
        "lr_decay_iters",
        "train_batch_size",
        "log_interval",
    ]


def test_extra_arguments_with_an_unknown_batch_are_no_traceback() -> None:
    lines = errors(1, deepspeed_extra_args={"wall_clock_breakdown": True}, context_parallel_size="many")
    assert any("context_parallel_size = 'many'" in line for line in lines), "\n".join(lines)


def test_names_of_the_zero_block_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # takes seconds

    fields = DeepSpeedZeroConfig.model_fields
    assert {*fields, *(field.alias for field in fields.values() if field.alias)} == ZERO_NAMES
