"""The benchmark for GPUs: its contenders are one model, its plan needs no GPU, and its table goes into a page."""

import pytest
import torch

from benchmarks import gpu
from benchmarks.llama_contenders import PlainLlama, mlp_width, our_config, plain_torch, transformers_llama
from benchmarks.tables import write_between
from megatron.param_table import ModelDims, tensors

TINY = gpu.MODELS["tiny"]


def test_contenders_have_the_same_parameters():
    config = our_config(TINY)
    table = tensors(ModelDims.of(config.model, config.moe, config.mixers), TINY.vocabulary)
    assert config.model.mlp_width == mlp_width(TINY)
    assert sum(entry.count for entry in table) == sum(each.numel() for each in PlainLlama(TINY).parameters())


def test_the_plain_model_is_that_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TINY.vocabulary,
        hidden_size=TINY.hidden,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        intermediate_size=mlp_width(TINY),
        rms_norm_eps=1e-5,
    )
    theirs, ours = LlamaForCausalLM(config).eval(), PlainLlama(TINY).eval()
    state = theirs.state_dict()
    with torch.no_grad():
        ours.embedding.weight.copy_(state["model.embed_tokens.weight"])
        ours.head.weight.copy_(state["lm_head.weight"])
        ours.norm.weight.copy_(state["model.norm.weight"])
        for number, block in enumerate(ours.blocks):
            prefix = f"model.layers.{number}."
            block.qkv.weight.copy_(torch.cat([state[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]))
            block.out.weight.copy_(state[f"{prefix}self_attn.o_proj.weight"])
            block.up.weight.copy_(torch.cat([state[f"{prefix}mlp.{name}_proj.weight"] for name in ("up", "gate")]))
            block.down.weight.copy_(state[f"{prefix}mlp.down_proj.weight"])
        tokens = torch.randint(TINY.vocabulary, (2, TINY.sequence))
        assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("make", [transformers_llama, plain_torch])
def test_a_loop_learns(make):
    step = make(TINY, compiled=False)
    losses = [step() for _ in range(3)]
    assert all(5.5 < loss < 7.5 for loss in losses) and len(set(losses)) == 3


def test_the_plan_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    lines = list(gpu.plan(["124M"], 12))
    assert any("torchtitan, compile" in line and "not installed" in line for line in lines)
    assert all("runs" in line for line in lines if "ours" in line)


def test_a_contender_that_fails_or_has_no_time_is_a_row(monkeypatch):
    def broken(shape):
        raise ValueError("no such kernel\nand more")

    monkeypatch.setattr(gpu, "contenders", lambda: iter([gpu.Contender("broken", broken)]))
    assert list(gpu.rows(["tiny"], 1, 1.0, 1e12)) == ["| tiny | broken | not run: ValueError: no such kernel | | | |"]
    (row,) = gpu.rows(["tiny"], 1, -1.0, 1e12)
    assert "no time left" in row


def test_a_table_replaces_the_one_before(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- b -->\nold\n<!-- e -->\n\nrest\n")
    write_between(page, "<!-- b -->", "<!-- e -->", ["| x |"])
    assert page.read_text() == "# A\n\n<!-- b -->\n\n| x |\n\n<!-- e -->\n\nrest\n"
    with pytest.raises(ValueError, match="has no lines"):
        write_between(page, "<!-- c -->", "<!-- e -->", [])
