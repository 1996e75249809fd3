"""The peers of the training benchmark on CPUs: models of the same sizes that train."""

import math

import pytest
import torch

from benchmarks.contenders import Shape
from benchmarks.peers import MODELS, PlainModel, peer, product_floor, transformers_model
from benchmarks.train_step import parser, peers

TINY = Shape(layers=2, hidden=64, heads=4, sequence=16, micro_batch=2, vocabulary=96)
CASES = [("fp32", False), ("bfloat16", False), ("bfloat16", True)]


@pytest.mark.parametrize(("precision", "autocast"), CASES)
@pytest.mark.parametrize("name", MODELS)
def test_steps_train(name, precision, autocast):
    torch.manual_seed(0)
    step = peer(name, TINY, precision, compiled=False, autocast=autocast)
    losses = [step() for _ in range(3)]  # of random tokens, each as likely as any other
    assert losses == pytest.approx([math.log(TINY.vocabulary)] * 3, rel=0.1)
    assert len(set(losses)) == 3


def test_litgpts_shape_is_transformers_neox():
    """With its weights, whose queries, keys and values are side by side for each head, it gives its logits."""
    torch.manual_seed(0)
    theirs, plain = transformers_model(TINY, "eager").double().eval(), PlainModel(TINY, learned=False).double()
    stored = theirs.state_dict()

    def apart(x):
        return x.unflatten(0, (TINY.heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    own = {
        "words.weight": "embed_in.weight",
        "norm.weight": "final_layer_norm.weight",
        "norm.bias": "final_layer_norm.bias",
    }
    found = {name: stored[f"gpt_neox.{other}"] for name, other in own.items()}
    found["head.weight"] = theirs.get_output_embeddings().weight
    parts = {
        "norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "out": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }
    for layer in range(TINY.layers):
        for kind in ("weight", "bias"):
            block = f"gpt_neox.layers.{layer}"
            found |= {
                f"blocks.{layer}.{name}.{kind}": stored[f"{block}.{other}.{kind}"] for name, other in parts.items()
            }
            found[f"blocks.{layer}.qkv.{kind}"] = apart(stored[f"{block}.attention.query_key_value.{kind}"])
    plain.load_state_dict(found)
    plain.cosines, plain.sines = plain.cosines.double(), plain.sines.double()
    tokens = torch.randint(TINY.vocabulary, (2, TINY.sequence))
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-6)


def test_all_peers_are_named_and_the_floor_is_a_time():
    assert list(peers(TINY, "fp32", "usual")) == ["transformers sdpa"]
    assert "nanoGPT's shape, compiled" in peers(TINY, "fp32", "all") and len(peers(TINY, "bfloat16", "all")) == 16
    assert 0 < product_floor(TINY, "fp32", repeats=1) < 1
    assert parser().parse_args([]).sequence == 512
