"""Families with experts train, generate and run on several ranks as they do in transformers.

Independent of us are transformers' models, its `generate`, and torch's AdamW. Losses of the routers are off on both
sides: transformers adds them up in another way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load.loader import find_checkpoint
from megatron.config import Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.init import init_distributed
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine, build_training_engine
from megatron.errors import ConfigError
from megatron.inference.sampling import Sampler, Sampling
from megatron.inference.token_loop import Limits, RunningSequence, decode
from megatron.param_table import ModelDims, tensors
from tests.checkpoint.huggingface.models import MIXTURES, VOCABULARY, make, save, tokens
from tests.multi_rank import run_distributed

LENGTH = 22
RATE, DECAY, EPSILON, STEPS = 1e-3, 0.1, 1e-6, 3
Case = tuple[Path, dict[str, Any]]
Found = tuple[list[float], list[float], Tensor]


def settings_of(name: str, folder: Path) -> Case:
    """Writes the folder of a model; it, and our keys. The bias of routers moves by as good as nothing."""
    save(name, folder)
    settings = {**Folder.open(folder).settings(), "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 1}
    rate = {"moe_router_bias_update_rate": 1e-12} if settings.get("moe_router_enable_expert_bias") else {}
    return folder, {**settings, "moe_aux_loss_coeff": 0.0, **rate}


def trained(rank: int, world_size: int, cases: dict[str, Case], layout: dict[str, Any]) -> dict[str, Found]:
    """Losses, gradient norms and the logits after STEPS steps of each case."""
    topology = None
    found = {}
    for name, (folder, settings) in cases.items():
        keys = {
            **settings,
            "load": str(folder),
            "finetune": True,
            "seq_length": LENGTH,
            "train_batch_size": 4,
            "train_iters": STEPS,
            "weight_decay": DECAY,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "Adam", "params": {"lr": RATE, "eps": EPSILON}},
            "distributed_backend": "gloo",
            **layout,
        }
        config = resolve([], keys, Resources(world_size)).config
        axes = config.parallelism
        topology = topology or init_distributed(
            pipe_parallel_size=axes.pipe_parallel_size,
            model_parallel_size=axes.model_parallel_size,
            expert_parallel_size=config.moe.moe_expert_parallel_size,
            sequence_parallel=axes.sequence_parallel,
            seed=1,
            backend="gloo",
        )
        checkpoint = find_checkpoint(config, tensors(ModelDims.of(config.model, config.moe), VOCABULARY))
        engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY, checkpoint=checkpoint)
        own = rows().chunk(topology.data.size)[topology.data.rank]
        parts = own.chunk(config.training.gradient_accumulation_steps or 1)
        made = [MicroBatch(part[:, :-1], part[:, 1:].contiguous(), torch.ones(part[:, 1:].shape)) for part in parts]
        steps = [engine.train_step(iter(made), RATE) for _ in range(STEPS)]
        losses, norms = [float(step.loss) for step in steps], [float(step.grad_norm) for step in steps]
        found[name] = (losses, norms, engine.logits(rows()[:, :-1]).clone())
    return found


def rows() -> Tensor:
    return torch.cat((tokens(), tokens().flip(1)[:1]))[:, : LENGTH + 1]


def theirs(name: str) -> Found:
    """The same steps by transformers and torch."""
    model = make(name)
    matrices = [one for one in model.parameters() if one.dim() > 1]
    vectors = [one for one in model.parameters() if one.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=EPSILON)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = cross_entropy(model(rows()[:, :-1]).logits.flatten(0, 1), rows()[:, 1:].flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([*matrices, *vectors], 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        return losses, norms, model(rows()[:, :-1]).logits


LAYOUTS = {
    "one rank": (1, {}),
    "tensor 2, sequence, ZeRO 1": (
        2,
        {"model_parallel_size": 2, "sequence_parallel": True, "zero_optimization": {"stage": 1}},
    ),
    "pipeline 2": (2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}),
    "experts 2, ZeRO 2": (2, {"moe_expert_parallel_size": 2, "zero_optimization": {"stage": 2}}),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Found]:
    return {name: theirs(name) for name in MIXTURES}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_are_those_of_torch(layout: str, expected: dict[str, Found], tmp_path: Path) -> None:
    """Losses, norms of the gradients before they are clipped, and the logits of the model afterwards."""
    ranks, keys = LAYOUTS[layout]
    cases = {name: settings_of(name, tmp_path / str(number)) for number, name in enumerate(MIXTURES)}
    ours: dict[str, Found] = run_distributed(trained, ranks, cases, keys, timeout=300)[0]
    for name, (losses, norms, logits) in expected.items():
        assert ours[name][0] == pytest.approx(losses, rel=1e-5), name
        assert ours[name][1] == pytest.approx(norms, rel=1e-4), name
        torch.testing.assert_close(ours[name][2], logits, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", MIXTURES)
def test_greedy_text_is_theirs(name: str, tmp_path: Path) -> None:
    """With the cache, rows of different lengths together, and without."""
    folder, settings = settings_of(name, tmp_path)
    keys = {**settings, "load": str(folder), "seq_length": 40, "user_script": "generate.py"}
    config = resolve([], keys, Resources(1)).config.for_inference()
    engine = build_inference_engine(config, Topology.single(), VOCABULARY)
    prompts = [tokens()[0, :14].tolist(), tokens()[1, :9].tolist()]
    model = make(name)
    expected = []
    for prompt in prompts:
        given = torch.tensor([prompt])
        made = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        expected.append(made[0, len(prompt) :].tolist())
    for cached in (True, False):
        limits = Limits(frozenset(), 12, 40)
        texts = [
            RunningSequence(prompt, limits, Sampler(Sampling(), vocab_size=VOCABULARY, seed=0)) for prompt in prompts
        ]
        for _ in decode(engine, texts, rows=2, cached=cached):
            pass
        assert [text.tokens[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)] == expected


def test_blocks_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """As public GLM-4.5 folders have one behind the last block."""
    folder, settings = settings_of("glm4_moe", tmp_path)
    stored = load_file(folder / "model.safetensors")
    keys = set(Folder.open(folder).weights(dims_of(settings)).keys())
    stored["model.layers.4.eh_proj.weight"] = torch.ones(64, 128)
    stored["model.layers.4.mlp.gate.weight"] = torch.ones(8, 64)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert Folder.open(folder).weights(dims_of(settings)).keys() == keys


def dims_of(settings: dict[str, Any]) -> ModelDims:
    config = resolve([], {**settings, "seq_length": LENGTH, "user_script": "generate.py"}, Resources(1)).config
    return ModelDims.of(config.model, config.moe)


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("olmoe", "clip_qkv", 8.0, "clip_qkv = 8.0: only None can be taken over"),
        ("qwen3_moe", "use_sliding_window", True, "use_sliding_window = True: only False can be taken over"),
        ("qwen3_moe", "mlp_only_layers", [0, 1, 2, 3], "no block has experts, so this is a dense model"),
        ("qwen2_moe", "num_experts", 1, "one expert is a plain MLP, and none is a dense model"),
        ("glm4_moe", "n_shared_experts", 0, "only models with shared experts can be taken over"),
    ],
)
def test_what_we_have_not_is_refused_by_name(name: str, key: str, value: object, expected: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ConfigError, match=expected):
        Folder.open(tmp_path).settings()
