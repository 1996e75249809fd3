"""Models of transformers and ours from one folder: the same training steps, and the same greedy text.

Independent of us are transformers' models with its attention by the plain formula (`eager`, as sdpa has no bound of
scores), its `generate`, and torch's AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load.loader import find_checkpoint
from megatron.config import Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.init import init_distributed
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine, build_training_engine
from megatron.inference.sampling import Sampler, Sampling
from megatron.inference.token_loop import Limits, RunningSequence, decode
from megatron.param_table import ModelDims, tensors
from tests.checkpoint.huggingface.models import VOCABULARY, make, save, tokens
from tests.layouts import pick
from tests.multi_rank import run_distributed

LENGTH = 22
RATE, DECAY, EPSILON, STEPS = 1e-3, 0.1, 1e-6, 3
LAYOUTS = pick("one process", "tensor 2, sequence, ZeRO 1", "pipeline 2, accumulation 2")
Case = tuple[Path, dict[str, Any]]
Found = tuple[list[float], list[float], Tensor]


def settings_of(name: str, folder: Path) -> Case:
    """Writes the folder of a model; it, and our keys. The bias of routers moves by as good as nothing."""
    save(name, folder)
    settings = {**Folder.open(folder).settings(), "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 1}
    routers = {"moe_aux_loss_coeff": 0.0} if settings.get("moe_num_experts", 1) > 1 else {}
    rate = {"moe_router_bias_update_rate": 1e-12} if settings.get("moe_router_enable_expert_bias") else {}
    return folder, {**settings, **routers, **rate}


def rows() -> Tensor:
    """Token ids [4, LENGTH + 1]."""
    return torch.cat((tokens(), tokens().flip(1)[:1]))[:, : LENGTH + 1]


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
        checkpoint = find_checkpoint(config, tensors(ModelDims.of(config.model, config.moe, config.mixers), VOCABULARY))
        engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY, checkpoint=checkpoint)
        own = rows().chunk(topology.data.size)[topology.data.rank]
        parts = own.chunk(config.training.gradient_accumulation_steps or 1)
        made = [MicroBatch(part[:, :-1], part[:, 1:].contiguous(), torch.ones(part[:, 1:].shape)) for part in parts]
        steps = [engine.train_step(iter(made), RATE) for _ in range(STEPS)]
        losses, norms = [float(step.loss) for step in steps], [float(step.grad_norm) for step in steps]
        found[name] = (losses, norms, engine.logits(rows()[:, :-1]).clone())
    return found


def theirs(name: str) -> Found:
    """The same steps by transformers and torch; biases of stacked experts take no weight decay, as all others."""
    model = make(name)
    vectors = [one for called, one in model.named_parameters() if one.dim() == 1 or called.endswith("_bias")]
    known = set(map(id, vectors))
    matrices = [one for one in model.parameters() if id(one) not in known]
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


def compare_steps(expected: Mapping[str, Found], ranks: int, keys: dict[str, Any], folder: Path) -> None:
    """Losses, norms of the gradients before they are clipped, and the logits of the models afterwards.

    Adam's first updates divide a gradient by its own size, so that the rounding of one near zero moves its weight by up
    to the learning rate: logits of size 1 may be 1e-4 apart.
    """
    cases = {name: settings_of(name, folder / str(number)) for number, name in enumerate(expected)}
    ours: dict[str, Found] = run_distributed(trained, ranks, cases, keys, timeout=300)[0]
    for name, (losses, norms, logits) in expected.items():
        assert ours[name][0] == pytest.approx(losses, rel=1e-5), name
        assert ours[name][1] == pytest.approx(norms, rel=1e-4), name
        torch.testing.assert_close(ours[name][2], logits, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def compare_greedy_text(name: str, folder: Path) -> None:
    """With the cache, rows of different lengths together, and without."""
    folder, settings = settings_of(name, folder)
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
