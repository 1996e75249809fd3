"""The arithmetic of derived values, against the figures of the public semantics."""

import pytest

from megatron.config.derived.attention import expand_attention
from megatron.config.derived.batch import BatchSizes, derive_batch
from megatron.config.derived.lr_schedule import decay_horizon
from megatron.config.derived.mlp_width import mlp_width
from megatron.config.derived.optimizer import derive_optimizer
from megatron.config.derived.precision import derive_precision
from megatron.config.derived.zero import derive_zero
from megatron.errors import ConfigError
from megatron.registry import OPTIMIZERS
from tests.config.small import resolved


@pytest.mark.parametrize(
    ("total", "micro", "steps", "ranks", "expected"),
    [
        (1536, 4, None, 12, BatchSizes(1536, 4, 32)),
        (1536, None, 32, 12, BatchSizes(1536, 4, 32)),
        (None, 4, 32, 12, BatchSizes(1536, 4, 32)),
        (1536, 4, 32, 12, BatchSizes(1536, 4, 32)),
        (8, None, None, 2, BatchSizes(8, 4, 1)),
        (None, 4, None, 2, BatchSizes(8, 4, 1)),
        (8, 4, None, 1, BatchSizes(8, 4, 2)),
    ],
)
def test_batch_is_completed(total: int, micro: int, steps: int, ranks: int, expected: BatchSizes) -> None:
    assert derive_batch(total, micro, steps, ranks) == expected


@pytest.mark.parametrize(
    ("sizes", "reported"),
    [
        ((None, None, 3, 2), "neither train_batch_size nor train_micro_batch_size_per_gpu is given"),
        (
            (10, 4, None, 2),
            "10 = 4 x ? x 2 has no whole solution, since 8 does not divide 10; the nearest sizes that work",
        ),
        ((3, 4, None, 2), "the nearest sizes that work are 8"),
        ((10, None, 4, 2), "10 = ? x 4 x 2 has no whole solution"),
        ((16, 4, 4, 2), "16 = 4 x 4 x 2, but the right side is 32; leave one of the three out"),
        ((0, 4, None, 2), "train_batch_size = 0: a size must be at least 1"),
        ((8, -1, 0, 2), "gradient_accumulation_steps = 0: a size must be at least 1"),
    ],
)
def test_impossible_batches_show_the_equation(sizes: tuple[int, int, int, int], reported: str) -> None:
    with pytest.raises(ConfigError) as error:
        derive_batch(*sizes)
    assert reported in str(error.value)


@pytest.mark.parametrize(
    ("base", "multiple", "gated", "expected"),
    [
        (None, 1, False, 4 * 4096),
        (None, 1, True, 5461),
        (33024, 256, True, 11008),  # LLaMA 7B
        (43008, 1, True, 14336),  # LLaMA 3 8B
        (86016, 256, True, 28672),  # LLaMA 2 70B
        (14336, 1, True, 4779),  # an odd pair of matrices is rounded up, so that both have one width
        (100, 64, False, 128),
    ],
)
def test_mlp_widths(base: int | None, multiple: int, gated: bool, expected: int) -> None:
    assert mlp_width(4096, base, None, multiple, gated=gated) == expected


def test_mlp_width_from_a_factor() -> None:
    assert mlp_width(1000, None, 3.5, 1, gated=False) == 3500
    assert mlp_width(1000, None, 3.0, 1, gated=True) == 1000


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        (None, 2, ("global", "global")),
        ([[["flash"], "all"]], 3, ("flash",) * 3),
        ([[["global", "local"], "all"]], 4, ("global", "local", "global", "local")),
        ([[["global"], 1], [["local"], 2]], 3, ("global", "local", "local")),
        (["global", "flash"], 2, ("global", "flash")),
    ],
)
def test_attention_patterns(pattern: list[object] | None, layers: int, expected: tuple[str, ...]) -> None:
    assert expand_attention(pattern, layers) == expected


@pytest.mark.parametrize(
    ("pattern", "reported"),
    [
        ([[["global"], 2]], "this makes 2 blocks, but num_layers = 3"),
        ([[["global", "local"], "all"]], "the pattern has 2 kinds, which do not divide num_layers = 3"),
        ([[["global"], 1], [["local"], "all"]], "`all` is not the only item"),
        ([["global", 2]], "is not a pair of kinds and a count"),
        ([[["global"], 2.5]], "2.5 is not a count"),
        ([[["global"], True]], "True is not a count"),
        ([[[3], 3]], "is not a list of kinds"),
        ([3], "3 is not a pair"),
        (["global"], "this makes 1 block"),
        ([], "this makes 0 blocks"),
        ([[["global"], 10**12]], "but num_layers = 3"),
    ],
)
def test_attention_patterns_that_do_not_fit(pattern: list[object], reported: str) -> None:
    with pytest.raises(ConfigError, match="attention_config") as error:
        expand_attention(pattern, 3)
    assert reported in str(error.value)


def test_precision_follows_from_the_blocks() -> None:
    assert derive_precision(None, None, None) == "fp32"
    assert derive_precision(None, {"enabled": True}, None) == "fp16"
    assert derive_precision(None, {"enabled": False}, {"enabled": True}) == "bfloat16"
    assert derive_precision("bfloat16", None, None) == "bfloat16"
    for precision, fp16, bf16, reported in (
        ("fp32", {"enabled": True}, None, "the block fp16 is enabled as well; write precision: fp16"),
        ("fp16", None, {"enabled": True}, "the block bf16 is enabled as well; write precision: bfloat16"),
        (None, {"enabled": True}, {"enabled": True}, "fp16 and bf16 are both enabled"),
    ):
        with pytest.raises(ConfigError) as error:
            derive_precision(precision, fp16, bf16)
        assert reported in str(error.value)


def test_zero_defaults() -> None:
    assert derive_zero("fp32", None)["stage"] == 0
    assert derive_zero("bfloat16", None)["stage"] == derive_zero("fp16", None)["stage"] == 1
    assert derive_zero("fp32", {"stage": 2}) == {"stage": 2}
    assert derive_zero("fp32", {"stage": 0}) == {"stage": 0}
    assert derive_zero("bfloat16", {"stage": 0}) == derive_zero("fp16", {"stage": 0}) == {"stage": 1}
    older = {"stage": 3, "cpu_offload": True, "cpu_offload_param": True}
    moved = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    assert derive_zero("fp32", older) == {"stage": 3, **moved}
    assert derive_zero("fp32", {"stage": 3, "cpu_offload": False}) == {"stage": 3, "cpu_offload": False}
    assert derive_zero("fp32", {"stage": [0, 1]}, tuned=True) == {"stage": [0, 1]}
    with pytest.raises(ConfigError, match="the block has no stage; add stage: 0, 1, 2 or 3"):
        derive_zero("fp32", {"overlap_comm": True})
    for stage in (4, True, "1", [0], "all"):
        with pytest.raises(ConfigError, match="there is no ZeRO stage"):
            derive_zero("fp32", {"stage": stage})


@pytest.mark.parametrize(
    ("iters", "given", "fraction", "expected"),
    [
        (1000, None, None, 1000),
        (1000, 400, 0.5, 400),
        (1000, None, 0.5, 500),
        (1, None, 0.1, 1),
        (None, None, 0.5, None),
    ],
)
def test_decay_horizon(iters: int | None, given: int | None, fraction: float | None, expected: int | None) -> None:
    assert decay_horizon(iters, given, fraction) == expected


def test_optimizer_blocks() -> None:
    choice = derive_optimizer({"type": "AdaM", "params": {"lr": 2, "weight_decay": 0}}, None, None, OPTIMIZERS.names)
    assert (choice.kind, choice.lr, choice.weight_decay) == ("adam", 2.0, 0.0)
    built = derive_optimizer(None, "lion", 0.5, OPTIMIZERS.names)
    assert built.block == {"type": "lion", "params": {"lr": 0.5}}
    assert derive_optimizer(None, None, None, OPTIMIZERS.names).lr == 1e-3


@pytest.mark.parametrize(
    ("block", "reported"),
    [
        ({"params": {}}, "the block names no type"),
        ({"type": "Adam"}, "the block has no params"),
        ({"type": "AdamW", "params": {}}, "did you mean adam, whose weight decay is decoupled?"),
        ({"type": "Lamb", "params": {}}, "the choices are adam, cpu_adam"),
        ({"type": "Adam", "params": {"lr": "high"}}, "lr = 'high' is not a finite number"),
        ({"type": "Adam", "params": {"lr": True}}, "lr = True is not a finite number"),
        ({"type": "Adam", "params": {"betas": [0.9]}}, "betas = [0.9] is not two numbers"),
        ({"type": "Adam", "params": {"beta": [0.9, 0.95]}}, "adam has no parameter beta; did you mean betas?"),
        ({"type": "Adam", "params": {"lr": 0.5}}, "lr = 0.1: optimizer says 0.5"),
        ({"type": "SGD", "params": {"lr": 0.1}}, "optimizer_type = 'adam': optimizer says 'sgd'"),
    ],
)
def test_optimizer_blocks_that_are_refused(block: dict[str, object], reported: str) -> None:
    with pytest.raises(ConfigError) as error:
        derive_optimizer(block, "adam", 0.1, OPTIMIZERS.names)
    assert reported in str(error.value)


def test_what_is_trained_beside_a_model_is_reported_full() -> None:
    """Defaults, one name in place of a list, the names of linear layers, and blocks that are switched off."""
    model = resolved(lora={"rank": 8}).config.model
    first = {"rank": 8, "alpha": 8.0, "dropout": 0.0, "targets": ["query_key_value"], "modules_to_save": []}
    assert model.lora == first
    every = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    assert resolved(lora={"rank": 2, "alpha": 4, "targets": "all"}).config.model.lora["targets"] == every
    kinds = [[["gated_delta_net", "mamba"], "all"]]
    mixed = resolved(lora={"rank": 2, "targets": "all"}, attention_config=kinds, pos_emb="none").config.model.lora
    assert mixed["targets"] == ["dense", "dense_h_to_4h", "dense_4h_to_h", "in_proj", "out_proj"]
    mixture = {"moe_num_experts": 4, "moe_router_type": "topk"}
    experts = ["experts_h_to_4h", "experts_4h_to_h"]
    for interval, others in ((2, every), (1, every[:2])):  # every second block has an MLP, or none has
        of_all = resolved(lora={"rank": 2, "targets": ["all", "experts"]}, moe_expert_interval=interval, **mixture)
        assert of_all.config.model.lora["targets"] == [*others, *experts]
    some = resolved(lora={"rank": 2, "targets": ["experts_4h_to_h", "dense"]}, **mixture).config.model.lora
    assert some["targets"] == ["dense", "experts_4h_to_h"]
    named = resolved(lora={"rank": 2, "targets": ["linear2", "dense"], "enabled": True}).config.model.lora
    assert named["targets"] == ["dense", "dense_4h_to_h"]
    for written, meant in (("embedding", ["embedding"]), (["head", "embedding"], ["embedding", "head"])):
        saved = resolved(lora={"rank": 2, "modules_to_save": written}).config.model.lora
        assert saved["modules_to_save"] == meant
    assert resolved(lora={"enabled": False, "rank": 3}).config.model.lora is None
    prompt = {"enabled": True, "num_tokens": 10, "init_string": "", "init_range": 0.5}  # the public defaults
    assert resolved(soft_prompt_tuning={"enabled": True}).config.model.soft_prompt_tuning == prompt
    assert resolved(soft_prompt_tuning={"num_tokens": 4}).config.model.text_length == 28
    assert resolved(soft_prompt_tuning={"enabled": False}).config.model.soft_prompt_tuning is None


def test_random_weights_are_not_frozen_in_silence() -> None:
    reported = "lora: load is not set, so what stays frozen are random weights"
    assert any(reported in line for line in resolved(lora={"rank": 8}).warnings)
    assert resolved(lora={"rank": 8}, load="somewhere").warnings == []
