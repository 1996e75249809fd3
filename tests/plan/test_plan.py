"""The plan against published figures and against the functions that it foretells."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.config import Resolution
from megatron.param_table import ModelDims, tensors
from megatron.plan import make_plan
from megatron.plan.advice import gib
from megatron.plan.flops import flops_per_iteration
from megatron.plan.memory import StateLayout, state_memory
from megatron.plan.text_report import short
from megatron.plan.vocabulary import find_vocabulary
from tests.config.small import resolved
from tests.plan.published import MODELS, resolution


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert make_plan(resolution(name)).parameters == MODELS[name][1]


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_three_times_those_of_the_forward_products(name: str) -> None:
    found = resolution(name, 2)
    model = found.config.model
    hidden, length, layers = model.hidden_size or 0, model.seq_length or 0, model.num_layers or 0
    query, kv = ((heads or 0) * (model.kv_channels or 0) for heads in (model.num_attention_heads, model.num_kv_heads))
    attention = 2 * hidden * (2 * query + 2 * kv) + 4 * length * query
    mlp = 2 * hidden * model.mlp_width * (3 if model.activation == "swiglu" else 2)
    forward = layers * (attention + mlp) + 2 * hidden * MODELS[name][0]["vocab_size"]
    assert make_plan(found).flops_per_iteration == 3 * forward * 8 * length


def test_flops_equal_what_torch_counts_in_a_gated_grouped_query_layer() -> None:
    hidden, heads, kv_heads, head_dim, width, vocabulary, sequence = 32, 4, 2, 8, 48, 96, 16
    dims = ModelDims(1, hidden, heads, kv_heads, head_dim, width, gated=True, pos_emb="rotary", tied=False)
    x = torch.randn(sequence, hidden)
    with FlopCounterMode(display=False) as counter:
        q = (x @ torch.randn(hidden, heads * head_dim)).view(sequence, heads, head_dim).transpose(0, 1)
        k = (x @ torch.randn(hidden, kv_heads * head_dim)).view(sequence, kv_heads, head_dim).transpose(0, 1)
        v = (x @ torch.randn(hidden, kv_heads * head_dim)).view(sequence, kv_heads, head_dim).transpose(0, 1)
        k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
        mixed = (torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)).transpose(0, 1).reshape(sequence, -1)
        x = mixed @ torch.randn(heads * head_dim, hidden)
        a, b = (x @ torch.randn(hidden, 2 * width)).chunk(2, -1)
        (a * b) @ torch.randn(width, hidden) @ torch.randn(hidden, vocabulary)
    found = flops_per_iteration(dims, tensors(dims, vocabulary), seq_length=sequence, train_batch_size=1)
    assert found == 3 * counter.get_total_flops()


def test_blocks_of_one_sublayer_are_counted_each() -> None:
    """Two MLPs of 2 x 64 x 256, attention of 4 x 64 x 64, and 4 heads of 32 with 24 states in 2 groups."""
    keys = {
        "num_layers": 4,
        "mamba_head_dim": 32,
        "mamba_state_dim": 24,
        "mamba_num_groups": 2,
        "padded_vocab_size": 512,
    }
    found = resolved(**keys, attention_config=["mamba2", "mlp", "attention", "mlp"], pos_emb="none")
    model, channels = found.config.model, 128 + 2 * 48
    matrices = 2 * (2 * 64 * 256) + 4 * 64 * 64 + 64 * (128 + channels + 4) + 128 * 64
    mixing = 6 * 128 * 24 + 2 * 4 * channels + 4 * (model.seq_length or 0) * 64
    plan = make_plan(found)
    tokens = (model.seq_length or 0) * (found.config.training.train_batch_size or 0)
    assert plan.flops_per_iteration == 3 * (2 * (matrices + 64 * 512) + mixing) * tokens
    sizes = "mamba2 4 heads x 32, state 24, 2 groups"
    assert f"positions, 2 mlp, 1 mamba2, 1 attention blocks, {sizes}\n" in plan.text()


def test_flops_and_memory_follow_what_attention_sees() -> None:
    """A window of 64 in 512: 64 * 512 - 64 * 63 / 2 pairs of a token and one that it sees, of 512 * 513 / 2.

    Heads of 8 features have no compiled kernel on a CPU, so that the probabilities of what is seen are saved.
    """
    changes: dict[str, Any] = {"seq_length": 512, "max_position_embeddings": 512, "num_attention_heads": 8}
    full = make_plan(small(**changes))
    window = make_plan(small(**changes, sliding_window_width=64))
    assert full.flops_per_iteration and window.flops_per_iteration and full.memory and window.memory
    assert full.parameters == window.parameters
    model = small(**changes).config.model
    batch = small(**changes).config.training.train_batch_size or 0
    products = 3 * 4 * 512 * (model.hidden_size or 0) * (model.num_layers or 0) * 512 * batch
    share = (64 * 512 - 64 * 63 / 2) / (512 * 513 / 2)
    assert full.flops_per_iteration - window.flops_per_iteration == pytest.approx(products * (1 - share), rel=1e-6)
    assert window.memory.activations < full.memory.activations
    heads = {**changes, "num_attention_heads": 4}
    wide, wide_window = make_plan(small(**heads)), make_plan(small(**heads, sliding_window_width=64))
    assert wide.memory and wide_window.memory
    assert wide_window.memory.activations == wide.memory.activations < window.memory.activations
    half = make_plan(small(**changes, sliding_window_width=64, attention_config=[[["global", "local"], "all"]]))
    assert half.flops_per_iteration and half.flops_per_iteration < full.flops_per_iteration


def small(**changes: Any) -> Resolution:
    return resolved(**{"vocab_size": 512, **changes})


def test_flops_follow_the_published_formula() -> None:
    # 72 b s l h^2 (1 + s / 6h + V / 12 l h), arXiv:2104.04473 without recomputation
    layers, hidden, length, vocabulary, batch = 12, 768, 1024, 50257, 4
    formula = 72 * batch * length * layers * hidden**2
    formula = formula * (1 + length / (6 * hidden) + vocabulary / (12 * layers * hidden))
    assert make_plan(resolution("gpt2")).flops_per_iteration == pytest.approx(formula, rel=1e-12)


def test_the_json_object_has_the_promised_form() -> None:
    found = resolution("20B", 96, pipe_parallel_size=4, model_parallel_size=2, gradient_accumulation_steps=32)
    reported = json.loads(json.dumps(make_plan(found).json()))
    memory = reported.pop("memory_per_rank_bytes")
    kernels = reported.pop("kernels")
    assert kernels["layer_norm"] == {"served_by": "triton", "rejected": {}}
    assert "in float32" in kernels["attention (global)"]["rejected"]["cudnn"]
    assert reported == {
        "world_size": 96,
        "pipe_parallel_size": 4,
        "model_parallel_size": 2,
        "data_parallel_size": 12,
        "train_batch_size": 1536,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 32,
        "parameters": 20_554_567_680,
        "flops_per_iteration": reported["flops_per_iteration"],
        "pipe_schedule": {"schedule": "1f1b", "stages_per_rank": 1, "bubble": 0.0857, "bubble_1f1b": 0.0857},
    }
    assert list(memory) == ["parameters", "gradients", "optimizer", "activations", "total"]
    assert memory["total"] == sum(memory.values()) - memory["total"]


def test_an_unknown_vocabulary_is_reported_and_not_guessed() -> None:
    plan = make_plan(resolution("20B", vocab_size=None))
    assert plan.json()["parameters"] is None
    assert plan.json()["memory_per_rank_bytes"] is None
    assert "vocab_size" in plan.json()["unknown"]
    assert "unknown: the size of the vocabulary is not known" in plan.text()


def test_what_is_trained_beside_a_frozen_model_is_reported() -> None:
    """20B with rank 8 on queries, keys and values: 44 x 8 x (6144 + 3 x 6144) parameters of 20.6 billion."""
    full = make_plan(resolution("20B"))
    plan = make_plan(resolution("20B", lora={"rank": 8}))
    trained = 44 * 8 * 4 * 6144
    assert plan.json()["trainable_parameters"] == plan.trainable == trained
    assert plan.parameters == 20_554_567_680 + trained
    assert "8,650,752 of them (0.04%): updates of rank 8 to query_key_value, scale 1" in plan.text()
    assert plan.memory is not None
    assert full.memory is not None
    assert plan.memory.optimizer < full.memory.optimizer / 1000
    assert plan.memory.parameters < full.memory.parameters * 1.001
    matrices = 44 * 12 * 6144**2 + 6144 * 50432
    assert full.flops_per_iteration is not None
    assert plan.flops_per_iteration is not None
    saved = full.flops_per_iteration - plan.flops_per_iteration
    assert saved == (2 * matrices - 6 * trained) * 2048 * plan.json()["train_batch_size"]  # no gradients of matrices
    both = make_plan(resolution("20B", lora={"rank": 8, "modules_to_save": ["embedding", "head"]}))
    assert both.trainable == trained + 2 * 6144 * 50432
    assert "scale 1, and the embedding, and the head" in both.text()
    assert both.flops_per_iteration is not None
    more = both.flops_per_iteration - plan.flops_per_iteration
    assert more == 2 * 6144 * 50432 * 2048 * plan.json()["train_batch_size"]  # the gradient of the output layer
    prompt = make_plan(resolution("20B", soft_prompt_tuning={"num_tokens": 20}))
    assert prompt.trainable == 20 * 6144
    assert "a prompt of 20 vectors, which leaves 2028 tokens to a text" in prompt.text()


def test_mixtral_has_its_published_size() -> None:
    """46,702,792,704 parameters (model card of Mixtral 8x7B), of which a token meets 12.9 billion."""
    changes = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_kv_heads": 8}
    changes |= {"intermediate_size": 3 * 14336, "activation": "swiglu", "norm": "rmsnorm", "pos_emb": "rotary"}
    changes |= {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "no_weight_tying": True}
    changes |= {"gpt_j_residual": False, "vocab_size": 32000, "make_vocab_size_divisible_by": 1}
    experts = {"moe_num_experts": 8, "moe_top_k": 2, "moe_router_type": "topk", "moe_normalize_top_k": True}
    mixture, met = resolution("20B", 2, **changes, **experts), make_plan(resolution("20B", 2, **changes))
    plan = make_plan(mixture)
    assert plan.parameters == 46_702_792_704
    assert met.parameters == 7_241_732_096  # Mistral 7B, model card
    one_mlp, routers = 32 * 3 * 4096 * 14336, 32 * 8 * 4096
    tokens = 6 * 8 * 2048
    assert plan.flops_per_iteration is not None
    assert met.flops_per_iteration is not None
    assert plan.flops_per_iteration - met.flops_per_iteration == (one_mlp + routers) * tokens
    frozen, updated = (
        make_plan(resolution("20B", 2, **changes, **experts, lora={"rank": 8, "targets": targets}))
        for targets in ("dense", ["dense", "experts"])
    )
    assert frozen.flops_per_iteration is not None
    assert updated.flops_per_iteration is not None
    assert updated.trainable == 32 * (8 * 8 * (4096 + 3 * 14336 + 4096) + 8 * 2 * 4096)  # halves share A
    more = updated.flops_per_iteration - frozen.flops_per_iteration
    assert more == 32 * 2 * 8 * (4096 + 3 * 14336 + 4096) * tokens  # a token meets two experts of eight


def vocabulary(tmp_path: Path, content: Any, **changes: Any) -> tuple[int | None, str]:
    path = tmp_path / "tokenizer.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    config = resolution("gpt2", vocab_size=None, vocab_file=str(path), make_vocab_size_divisible_by=8, **changes).config
    found = find_vocabulary(config.tokenizer, 2)
    return found.padded, found.source


def test_vocabularies_are_read_from_files(tmp_path: Path) -> None:
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 1}, {"id": 16}]}
    assert vocabulary(tmp_path, tokenizer)[0] == 32  # 17 ids, to a multiple of 16
    assert vocabulary(tmp_path, {"a": 0, "b": 1}, tokenizer_type="GPT2BPETokenizer")[0] == 16
    assert vocabulary(tmp_path, "", tokenizer_type="CharLevelTokenizer")[0] == 512
    for content in ("{", "[]", '{"model": 3}', "3"):
        padded, reported = vocabulary(tmp_path, content)
        assert padded is None
        assert "cannot be read" in reported
    padded, reported = vocabulary(tmp_path, "{}", tokenizer_type="SPMTokenizer")
    assert padded is None
    assert "SPMTokenizer" in reported


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (StateLayout(4, 0, 4, bucket=500), (400, 400, 800)),
        (StateLayout(2, 0, 4, bucket=500), (200, 200, 1200)),
        (StateLayout(4, 1, 4, bucket=500), (400, 400, 300)),
        (StateLayout(4, 1, 4, bucket=30, buffers=2), (400, 400 + 240, 300)),
        (StateLayout(2, 1, 4, bucket=500), (200, 600, 300)),
        (StateLayout(2, 1, 4, bucket=30, buffers=1, summed=2), (200, 200 + 60, 300)),
        (StateLayout(4, 2, 4, bucket=500), (400, 500, 300)),
        (StateLayout(2, 2, 4, bucket=30, buffers=1), (200, 100 + 60, 300)),
        (StateLayout(2, 2, 4, bucket=500), (200, 300, 300)),
        (StateLayout(2, 3, 4, bucket=500), (250, 300, 300)),
        (StateLayout(2, 3, 4, bucket=30, buffers=1, gathered=50), (150, 200 + 60, 300)),
    ],
)
def test_state_of_100_parameters_on_4_ranks(layout: StateLayout, expected: tuple[int, int, int]) -> None:
    assert state_memory(100, layout) == expected


def plan_of(**changes: Any) -> tuple[Resolution, Any]:
    found = resolution("20B", 96, **{"pipe_parallel_size": 4, "model_parallel_size": 2, **changes})
    return found, make_plan(found).memory


def test_memory_falls_with_what_should_lower_it() -> None:
    base = plan_of()[1]
    assert plan_of(checkpoint_activations=True)[1].activations < base.activations / 3
    full = plan_of(recompute_granularity="full", checkpoint_num_layers=2)[1].activations
    few = plan_of(checkpoint_activations=True, checkpoint_num_layers=2, recompute_method="block")[1].activations
    assert full < few < base.activations
    assert plan_of(recompute_granularity="selective")[1].activations < base.activations
    retained = plan_of(checkpoint_activations=True)[1].activations
    assert plan_of(checkpoint_activations=True, partition_activations=True)[1].activations < retained
    assert plan_of(checkpoint_activations=True, checkpoint_in_cpu=True)[1].activations < retained
    assert plan_of(precision="bfloat16")[1].parameters == base.parameters / 2
    assert plan_of(zero_optimization={"stage": 1})[1].optimizer < base.optimizer / 5
    assert plan_of(model_parallel_size=4)[1].parameters < base.parameters * 0.51
    contexts = {"pipe_parallel_size": 0, "context_parallel_size": 4}
    ring = plan_of(**contexts, context_parallel_method="ring")[1]
    assert ring.parameters == plan_of(**contexts)[1].parameters
    assert ring.activations < plan_of(pipe_parallel_size=0)[1].activations / 3.5
    logits = {"fused_linear_cross_entropy": False}
    at_once = plan_of(**logits)[1].activations
    halved = plan_of(train_micro_batch_size_per_gpu=2, **logits)[1].activations
    assert halved == pytest.approx(at_once / 2, rel=0.01)


def test_what_does_not_fit_is_answered_with_what_would() -> None:
    plan = make_plan(plan_of(gpu_memory=30, precision="bfloat16", gradient_accumulation_steps=8)[0])
    assert plan.advice
    assert any("checkpoint_activations: true" in line for line in plan.advice)
    assert "exceeds the 30.00 GiB of gpu_memory" in plan.text()
    roomy = make_plan(plan_of(gpu_memory=4000)[0])
    assert roomy.advice == ()
    assert "fits the 4000.00 GiB" in roomy.text()


def test_the_text_names_what_matters() -> None:
    text = make_plan(plan_of(te_fp8_margin=2, lazy_mpu_init=True)[0]).text()
    for part in (
        "44 blocks x 6144, 64 heads x 96, MLP 24576",
        "20,554,567,680 (20.6B)",
        "96 ranks = pipeline 4 x data 12 x tensor 2, ZeRO 0, fp32",
        "48 samples = micro batch 4 x accumulation 1 x data 12",
        "Warnings (1)",
        "te_fp8_margin",
        "Not built yet",
        "lazy_mpu_init",
    ):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_numbers_are_shortened() -> None:
    assert [short(count) for count in (999, 1_500, 70_426_624, 20_554_567_680, 2e12)] == [
        "999",
        "1.5k",
        "70.4M",
        "20.6B",
        "2T",
    ]
    assert [gib(size) for size in (2**20, 3 * 2**30)] == ["1.0 MiB", "3.00 GiB"]
