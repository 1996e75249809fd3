"""muP beside the authors' package `mup`: initial values, learning rates, decay and a training run, by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mup
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from megatron.config import Config, Resources, resolve
from megatron.distributed.init import init_distributed
from megatron.distributed.mesh import Topology
from megatron.distributed.param_init import parameter_seed
from megatron.engine.builder import build_training_engine
from megatron.engine.deepspeed_engine import keyed_parameters
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.sequential_model import SequentialModel
from megatron.optim.param_groups import LR_SCALE, parameter_groups
from megatron.param_table import ModelDims, Multipliers, MupWidths, base_shapes, learning_rates, tensors, width_ratios
from megatron.plan.base_shapes import write_base_shapes
from megatron.registry import OPTIMIZERS
from tests.end_to_end.engines import batches
from tests.model.mup_side import Size, build_theirs
from tests.multi_rank import run_distributed

SEED, STD, VOCABULARY, LENGTH, LAYERS = 7, 0.1, 64, 24, 2
DECAY, LR, STEPS = 0.1, 3.0e-3, 6
KEYS: dict[str, Any] = {
    "num_layers": LAYERS,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": LENGTH,
    "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 1,
    "init_method_std": STD,
    "output_layer_init_method": "normal",
    "train_batch_size": 4,
    "train_iters": STEPS,
    "gradient_clipping": 0.0,
    "weight_decay": DECAY,
    "precision": "fp32",
    "seed": SEED,
    "distributed_backend": "gloo",
}
FACTORS = {"mup_attn_temp": 0.5, "mup_output_temp": 0.25, "mup_embedding_mult": 3.0}
GROWN = {"wider heads": {"hidden_size": 128}, "more heads": {"hidden_size": 128, "num_attention_heads": 16}}
OPTIMIZER = {
    "adam": {"type": "Adam", "params": {"lr": LR, "eps": 1.0e-6}},
    "sgd": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
}


def config_of(folder: Path, **changes: Any) -> Config:
    """A muP configuration over the base KEYS."""
    path = folder / "base.json"
    base = {name: changes[name] for name in ("no_weight_tying", "init_method") if name in changes}
    write_base_shapes(resolve([], {**KEYS, **base, "save_base_shapes": True, "base_shapes_file": str(path)}).config)
    return resolve([], {**KEYS, "use_mup": True, "base_shapes_file": str(path), **changes}, Resources(1)).config


def theirs_of(config: Config) -> Any:
    """The model of the package that the configuration describes, over the same base."""
    model, tied = config.model, not config.model.no_weight_tying
    base = Size(KEYS["hidden_size"], KEYS["num_attention_heads"], LAYERS, VOCABULARY, LENGTH, tied, 8)
    size = Size(model.hidden_size, model.num_attention_heads, LAYERS, VOCABULARY, LENGTH, tied, 8)
    return build_theirs(size, base, {name: getattr(config.mup, name) for name in FACTORS})


def runs(rank: int, world_size: int, folder: str, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Both runs of every case."""
    topology = init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=SEED, backend="gloo")
    return {name: ours_and_theirs(config_of(Path(folder), **case), topology) for name, case in cases.items()}


def ours_and_theirs(config: Config, topology: Topology) -> dict[str, tuple[Tensor, Tensor]]:
    """Losses of both, and the weights at the end; the package starts from our initial weights."""
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY)
    theirs = theirs_of(config)
    keyed = theirs.keyed()
    with torch.no_grad():
        for key, weight in engine.weights().items():
            keyed[key].copy_(weight)
    groups = [
        {"params": [p for p in keyed.values() if p.dim() == 2], "weight_decay": DECAY},
        {"params": [p for p in keyed.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    if config.optimizer.optimizer_type == "adam":
        optimizer = mup.MuAdamW(groups, lr=LR, eps=1.0e-6)
    else:
        optimizer = mup.MuSGD(groups, lr=0.05, momentum=0.9)
    (batch,) = batches(config, topology)
    losses: list[tuple[float, float]] = []
    for _ in range(STEPS):
        own = engine.train_step(iter([batch]), config.optimizer.lr or 0.0)
        loss = F.cross_entropy(theirs(batch.tokens).flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((float(own.loss), float(loss)))
    weights = {key: (weight.clone(), keyed[key].detach()) for key, weight in engine.weights().items()}
    return {"losses": (torch.tensor([a for a, _ in losses]), torch.tensor([b for _, b in losses])), **weights}


CASES = {
    f"{grown}, {'tied' if tied else 'untied'}, {optimizer}": {
        **GROWN[grown],
        **FACTORS,
        "no_weight_tying": not tied,
        "optimizer": OPTIMIZER[optimizer],
    }
    for grown in GROWN
    for tied in (True, False)
    for optimizer in OPTIMIZER
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    return run_distributed(runs, 1, str(tmp_path_factory.mktemp("base")), CASES, timeout=300)[0]


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_the_package(case: str, found: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> None:
    """Losses and weights of six steps. A wrong rate, decay, score, output or embedding factor shows at once."""
    weights = dict(found[case])
    own, theirs = weights.pop("losses")
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=0)
    assert own[-1] < own[0] - 0.1
    for key, (weight, other) in weights.items():
        torch.testing.assert_close(
            weight, other, rtol=1e-3, atol=2e-5, msg=lambda reported, key=key: f"{key}: {reported}"
        )


INITIAL = {
    "normal": lambda p: mup.init.normal_(p, std=STD),
    "xavier_uniform": mup.init.xavier_uniform_,
    "xavier_normal": mup.init.xavier_normal_,
}


def initial_weights(config: Config) -> dict[str, Tensor]:
    """Key -> initial value, of every tensor."""
    plan = build_layer_specs(
        ModelSpec(
            config.model,
            config.initialization,
            config.kernels,
            padded_vocab_size=VOCABULARY,
            topology=Topology.single(),
            seed=SEED,
            dtype=torch.float32,
            mup=config.mup,
        )
    )
    return {key: parameter.detach() for key, parameter in keyed_parameters(SequentialModel(plan)).items()}


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("init", INITIAL)
def test_initial_values_are_those_of_the_package(init: str, scale: float, tmp_path: Path) -> None:
    """Element by element: the package draws from torch's generator in the state that ours is seeded to."""
    case = {
        "hidden_size": 128,
        "no_weight_tying": True,
        "init_method": init,
        "output_layer_init_method": init,
        "mup_init_scale": scale,
    }
    config = config_of(tmp_path, **case)
    found, theirs = initial_weights(config), theirs_of(config).keyed()
    assert found.keys() == theirs.keys()
    for key, weight in found.items():
        if weight.dim() == 2:
            layer, _, name = key.partition(".")
            torch.manual_seed(parameter_seed(SEED, int(layer), name))
            INITIAL[init](theirs[key])
            torch.testing.assert_close(weight, scale * theirs[key].detach(), rtol=1e-5, atol=1e-7, msg=key)


def test_the_base_itself_is_an_ordinary_model(tmp_path: Path) -> None:
    """Bit by bit, and with no rate of its own for any tensor."""
    config = config_of(tmp_path)
    plain = initial_weights(config.replace(use_mup=False))
    for key, weight in initial_weights(config).items():
        assert weight.equal(plain[key]), key
    dims = ModelDims.of(config.model)
    assert Multipliers.of(config.mup, dims) == Multipliers()
    assert {rate for kind in (True, False) for rate in learning_rates(config.mup, dims, entrywise=kind).values()} == {1}


@pytest.mark.parametrize(
    "init",
    ["small_init", "wang_init", "orthogonal", "scaled_orthogonal", "scaled_normal", "single_residual_scaled_normal"],
)
def test_other_initializations_start_from_the_base_s_std(init: str, tmp_path: Path) -> None:
    """Those that the package has not: deviation of the base model, over the root of the width for matrices."""
    both = {"init_method": init, "output_layer_init_method": init, "no_weight_tying": True}
    base, wide = (initial_weights(config_of(tmp_path, **both, hidden_size=hidden)) for hidden in (32, 128))
    for key, weight in wide.items():
        if weight.dim() == 2:
            hidden = key.partition(".")[0] not in ("0", str(LAYERS + 4))
            expected = base[key].std() / (2.0 if hidden else 1.0)
            assert float(weight.std()) == pytest.approx(float(expected), rel=0.06), key


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "wider heads": {"head_dim": 32},
    "grouped, gated": {"num_kv_heads": 2, "gated": True, "norm": "rmsnorm", "attention_bias": False, "tied": False},
    "queries and keys": {"qk_norm": True, "head_dim": 48, "mlp_width": 640},
    "parallel": {"gpt_j_residual": True, "gpt_j_tied": True, "pos_emb": "rotary"},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_rates_and_decay_of_every_tensor_are_those_of_the_package(name: str, kind: str) -> None:
    """MuAdamW's and MuSGD's own groups, of parameters with the same base, delta and target shapes."""
    base = MupWidths(hidden_size=64, num_attention_heads=4, num_kv_heads=2, head_dim=16, mlp_width=256)
    fields = {"num_layers": 2, "hidden_size": 192, "num_attention_heads": 12, "num_kv_heads": 6, "head_dim": 16}
    dims = ModelDims(**{**fields, "mlp_width": 768, "max_position_embeddings": 8, **SHAPES[name]})  # type: ignore[arg-type]
    shapes = [{each.key: each.shape for each in tensors(w.on(dims), 50)} for w in (base, base.times(2))]
    theirs = mup.make_base_shapes(*shapes)
    assert {key: tuple(shape.base_shape()) for key, shape in theirs.items()} == base_shapes(dims, base)
    target = {each.key: each.shape for each in tensors(dims, 50)}
    parameters = {key: Parameter(torch.empty(shape)) for key, shape in target.items()}
    for key, shape in mup.zip_infshapes(theirs, target).items():
        parameters[key].infshape = shape  # type: ignore[attr-defined]
        assert width_ratios(dims, base)[key].std == pytest.approx(
            shape.width_mult() ** -0.5 if shape.ninf() == 2 else 1.0
        )
    optimizer: torch.optim.Optimizer = {"adam": mup.MuAdamW, "sgd": mup.MuSGD}[kind](
        list(parameters.values()), lr=LR, weight_decay=DECAY
    )
    expected = {
        id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    entrywise = "entrywise" in OPTIMIZERS.entry(kind).traits
    section = _Section({**vars(base)})
    rates = {parameters[key]: rate for key, rate in learning_rates(section, dims, entrywise=entrywise).items()}
    for group in parameter_groups(parameters.values(), DECAY, rates):
        for parameter in group["params"]:
            assert (LR * group[LR_SCALE], group["weight_decay"]) == pytest.approx(expected[id(parameter)])


class _Section:
    """A mup section."""

    use_mup = True

    def __init__(self, widths: dict[str, int]) -> None:
        self.mup_base_widths = widths


def test_the_file_holds_base_shapes_as_the_package_knows_them(tmp_path: Path) -> None:
    """Its tensors are read by the package, and give a model of it the same shapes as its own base and delta do."""
    config = config_of(tmp_path, hidden_size=128, no_weight_tying=True)
    stored = json.loads((tmp_path / "base.json").read_text(encoding="utf-8"))["tensors"]
    theirs = theirs_of(config)
    for key, parameter in theirs.keyed().items():
        found = mup.zip_infshape(mup.InfShape.from_base_shape(stored[key]), parameter.shape)
        assert found == parameter.infshape, key
