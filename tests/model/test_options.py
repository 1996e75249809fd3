"""Every position scheme, norm, activation and kind of attention, one at a time: what each must do in one process.

Its tensors are those of the table, every parameter gets a gradient, cached generation says what a whole pass says (rows
of different lengths too), recomputation changes nothing, and documents that are kept apart are as they are alone. What
it must do on several ranks, through a checkpoint and for transformers is in tests/end_to_end/test_options.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.model.kv_cache import KVCache
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.recompute import Recompute
from megatron.model.sequential_model import SequentialModel
from megatron.param_table import ModelDims, tensors
from tests.model.sections import disturb
from tests.options import FAMILIES, LAYERS, Keys, uncovered

VOCABULARY, LENGTH = 64, 40
CASES = [(family, name) for family, cases in FAMILIES.items() for name in cases]
TORCH = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
BASE: Keys = {
    "num_layers": LAYERS,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": LENGTH,
    "max_position_embeddings": LENGTH,
    "pos_emb": "rotary",
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 1,
    "init_method_std": 0.1,
    "output_layer_init_method": "normal",
}


def test_every_member_has_a_case() -> None:
    assert uncovered() == []


def build(
    family: str, name: str, *, reset: bool = False, recompute: str | None = None
) -> tuple[SequentialModel, ModelDims]:
    settings = {**BASE, **FAMILIES[family][name]}
    resolution = resolve([], settings, Resources(1))
    assert resolution.not_supported_yet == []
    config = resolution.config
    plan = build_layer_specs(
        ModelSpec(
            config.model,
            config.initialization,
            config.kernels,
            padded_vocab_size=VOCABULARY,
            topology=Topology.single(),
            seed=3,
            dtype=torch.float32,
            device=torch.device("cpu"),
            recompute_attention=TORCH if recompute == "selective" else None,
            reset_attention=reset,
            reset_positions=reset,
        )
    )
    again = Recompute(TORCH, TensorParallelRNG(0, 0)) if recompute == "full" else None
    model = SequentialModel(plan, again)
    disturb(model)
    return model, ModelDims.of(config.model)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_tensors_and_gradients(family: str, name: str) -> None:
    """The table is exact, and nothing that the model holds goes unused."""
    model, dims = build(family, name)
    table = {f"sequential.{shape.layer}.{shape.name}": shape.shape for shape in tensors(dims, VOCABULARY)}
    assert {key: tuple(parameter.shape) for key, parameter in model.named_parameters()} == table
    logits = model(ids(2, LENGTH))
    assert logits.isfinite().all()
    logits.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize(("family", "name"), CASES)
def test_cached_generation_is_a_full_pass(family: str, name: str) -> None:
    """A prompt, some tokens, one token; then rows of different lengths, each as it is alone."""
    model, dims = build(family, name)
    model.eval()
    latent = dims.latent
    sizes = (dims.num_kv_heads, LENGTH, dims.head_dim) if latent is None else (1, LENGTH, latent.cached)
    cache = KVCache(LAYERS, 3, *sizes, latents=latent is not None)
    assert cache.memory[:, :, 0, :, 0].numel() == LAYERS * dims.cached_per_token(1)
    tokens = ids(3, LENGTH, seed=1)
    with torch.no_grad():
        complete = model(tokens)  # [s, b, v]
        for first, end in ((0, 9), (9, 14), (14, 15), (15, LENGTH)):
            part = model(tokens[:, first:end], cache)
            torch.testing.assert_close(part, complete[first:end], rtol=1e-4, atol=1e-5)
        cache.reset()
        lengths = [21, 4, 13]
        model(tokens[:, :21], cache)  # the shorter rows are padded with what is not theirs
        cache.set_lengths(lengths)
        for step in range(3):
            following = torch.stack([tokens[row, length + step] for row, length in enumerate(lengths)])[:, None]
            scores = model(following, cache)[0]
            expected = torch.stack([complete[length + step, row] for row, length in enumerate(lengths)])
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_recomputation_changes_nothing(family: str, name: str) -> None:
    def gradients(recompute: str | None) -> list[Tensor]:
        model, _ = build(family, name, recompute=recompute)
        model(ids(2, LENGTH)).square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients(None)
    for recompute in ("full", "selective"):
        for first, second in zip(plain, gradients(recompute), strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "name"), [case for case in CASES if case[0] in ("positions", "attention", "latents")]
)
def test_documents_are_as_they_are_alone(family: str, name: str) -> None:
    """Lengths are multiples of the blocks of the layouts; random blocks are the row's own, so those are left out."""
    model, _ = build(family, name, reset=True)
    tokens = ids(1, LENGTH, seed=2)
    lengths = (8, 20, 12)
    starts = torch.cat([torch.full((length,), sum(lengths[:at])) for at, length in enumerate(lengths)])[None]
    together = model(tokens, None, starts)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % VOCABULARY
    torch.testing.assert_close(model(changed, None, starts)[8:], together[8:], rtol=0, atol=0)
    relative = name in ("global", "flash", "sliding window", "local") or family in ("positions", "latents")
    if relative:
        alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
