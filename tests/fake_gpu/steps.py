"""Training steps of the loop on a fake GPU: engine, loss, clipping, flags, guard and reports' bookkeeping.

    python -m tests.fake_gpu.steps

Prints a JSON object like models.py. DeepSpeed's engine has a stand-in, as it does not run on fake tensors. A copy
between host and GPU for which the host waits is an error too. Planted bugs must be errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from tests.fake_gpu import fake_cuda, models  # isort: skip  (before torch)

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.data.dataset.batch import MicroBatch
from megatron.distributed import host_copy
from megatron.distributed.mesh import Topology
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.engine.batch_copies import DeviceCopies
from megatron.engine.bf16_step import Bf16Step
from megatron.engine.deepspeed_engine import PlainEngine, keyed_parameters
from megatron.kernels.documents import DocumentOffsets, attach_offsets
from megatron.metrics.timers import no_wait
from megatron.model.loss_function import LossFunction
from megatron.model.loss_parts import LossParts
from megatron.model.moe.losses import RouterLossTracker
from megatron.objectives.language_model import LanguageModel
from megatron.objectives.masked_language_model import MaskedLanguageModel
from megatron.optim.grad_clip import GradientClipper
from megatron.training.hooks.base import Hook, Hooks
from megatron.training.loop import run_loop
from megatron.training.loop_context import LoopContext
from megatron.training.loss_guard import LossGuard
from megatron.training.run_state import RunState
from tests.model import mixtures
from tests.training.schedules import plain_schedule

STARTED_AT, ENDED_AT = 1, 4  # no step between them is reported
MICRO_BATCHES = 2
ENCODER = {
    "attention_mask": "bidirectional",
    "lm_head": "masked",
    "bert_binary_head": True,
    "num_token_types": 2,
    "no_weight_tying": False,
    "pos_emb": "learned",
}
TARGET = 8
ENCODER_DECODER = {
    "encoder_num_layers": 1,
    "encoder_seq_length": models.LENGTH - TARGET,
    "decoder_seq_length": TARGET,
    "pos_emb": "relative",
    "norm": "rmsnorm",
    "softmax_scale": 1.0,
}
PADDED = DocumentOffsets.of(torch.tensor([[0] * (models.LENGTH - 3) + [models.LENGTH - 3] * 3] * models.BATCH))
aten = torch.ops.aten


class BlockingCopy(Exception):
    """A copy between host and GPU for which the host waits."""


class Copies(TorchDispatchMode):
    """Refuses copies between host and GPU that the host waits for, once `refuses` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket is aten._to_copy:
            source, target = args[0], out
            waits = not kwargs.get("non_blocking", False)
        elif func.overloadpacket is aten.copy_:
            target, source = args[0], args[1]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            return out
        if self.refuses and waits and source.device.type != target.device.type:
            raise BlockingCopy(f"{func} from {source.device} to {target.device}")
        return out


class AfterTheFirst(Hook):
    """Has copies refused after the first step, in which tables of positions are made."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies

    def before_step(self, iteration: int, size: Any) -> None:
        self._copies.refuses = iteration > STARTED_AT + 1


class Finished(Exception):
    """Ends the loop before a report."""


class StandIn:
    """Takes the place of DeepSpeed's engine: sums gradients of micro batches and steps an optimizer."""

    device = fake_cuda.DEVICE
    skipped_steps = 0

    def __init__(self, module: torch.nn.Module, optimizer: Any, clear: Callable[[], None]) -> None:
        self.module, self.optimizer, self._clear = module, optimizer, clear
        self._seen = 0

    def __call__(self, *args: Any) -> Tensor:
        output: Tensor = self.module(*args)
        return output

    def gradient_accumulation_steps(self) -> int:
        return MICRO_BATCHES

    def backward(self, loss: Tensor) -> None:
        (loss / MICRO_BATCHES).backward()

    def step(self) -> None:
        self._seen += 1
        if self._seen % MICRO_BATCHES == 0:
            self.optimizer.step()
            self._clear()


class Bf16Optimizer:
    """Takes the place of DeepSpeed's bfloat16 optimizer: all weights and gradients in one fp32 tensor each."""

    clip_grad, mpu, grad_acc_dtype, has_moe_layers = 1.0, None, torch.float32, False

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        flat = torch.cat([one.detach().flatten().float() for one in parameters])
        self.fp32_groups_flat_partition = [flat.requires_grad_()]
        self.fp32_groups_gradient_flat_partition = [torch.zeros_like(flat)]
        self.optimizer = torch.optim.AdamW(self.fp32_groups_flat_partition, fused=True)
        self.bf16_groups, self.fp32_groups_gradients, self.fp32_groups_has_gradients = [parameters], [[]], [[]]
        self.fp32_groups_gradients[0] = [torch.zeros(0)] * len(parameters)
        self.fp32_groups_has_gradients[0] = [True] * len(parameters)
        self.step = Bf16Step(self)

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def get_grads_for_norm(self, for_clipping: bool = False) -> Any:
        gradients = self.fp32_groups_gradient_flat_partition
        gradients[0].copy_(torch.cat([one.grad.flatten() for one in self._parameters if one.grad is not None]))
        return gradients if for_clipping else (gradients, {})

    def _lazy_init_hp_params_optimizer_state(self) -> None:
        pass

    def update_lp_params(self) -> None:
        parts = self.fp32_groups_flat_partition[0].split([one.numel() for one in self._parameters])
        for one, part in zip(self._parameters, parts, strict=True):
            one.detach().copy_(part.view_as(one))

    def clear_hp_grads(self) -> None:
        self.fp32_groups_gradient_flat_partition[0].zero_()


class FakeBatches:
    """Endless micro batches on the host."""

    full_pass = None

    def batches(self, consumed_samples: int = 0) -> Iterator[MicroBatch]:
        tokens = torch.zeros(models.BATCH, models.LENGTH, dtype=torch.long)
        while True:
            yield MicroBatch(tokens, tokens, torch.ones(models.BATCH, models.LENGTH))


class MaskedBatches:
    """Endless micro batches of padded samples with two segments, on the host."""

    full_pass = None

    def batches(self, consumed_samples: int = 0) -> Iterator[MicroBatch]:
        tokens = torch.zeros(models.BATCH, models.LENGTH, dtype=torch.long)
        starts, order = tokens.clone(), torch.zeros(models.BATCH, 1, dtype=torch.long)
        starts[:, -3:] = models.LENGTH - 3
        attach_offsets(starts, PADDED)  # which the loader's thread reads of real tensors
        while True:
            mask = torch.ones(models.BATCH, models.LENGTH)
            yield MicroBatch(tokens, tokens, mask, starts, token_types=tokens, sentence_order=order)


class SpanBatches:
    """Endless micro batches of an encoder-decoder, with padding of the encoder, on the host."""

    full_pass = None

    def batches(self, consumed_samples: int = 0) -> Iterator[MicroBatch]:
        tokens = torch.zeros(models.BATCH, models.LENGTH, dtype=torch.long)
        starts = tokens.clone()
        starts[:, -TARGET - 3 :] = models.LENGTH - TARGET - 3
        attach_offsets(starts, PADDED)
        while True:
            yield MicroBatch(tokens, tokens[:, :TARGET], torch.ones(models.BATCH, TARGET), starts)


class QuietReporter:
    """Takes the place of the reporter; ends the loop."""

    def progress(self, iteration: int) -> None:
        if iteration == ENDED_AT:
            raise Finished


def engine_of(
    module: Any,
    *,
    bf16: bool,
    fused: bool = True,
    losses: RouterLossTracker | None = None,
    parts: LossParts | None = None,
) -> tuple[PlainEngine, RouterLossTracker | None]:
    """The engine around a model on the GPU."""
    topology = Topology.single()
    parameters = keyed_parameters(module)
    trained = list(parameters.values())

    def clear() -> None:
        for one in trained:
            one.grad = None

    clipper: Any
    if bf16:
        optimizer: Any = Bf16Optimizer(trained)
        clipper = optimizer.step
    else:
        optimizer = torch.optim.AdamW(trained, fused=True) if fused else torch.optim.AdamW(trained, foreach=True)
        clipper = GradientClipper(trained, topology, 1.0)
        clipper.attach(optimizer)
    made = PlainEngine(
        deepspeed=StandIn(module, optimizer, clear),
        topology=topology,
        parameters=parameters,
        make_cache=lambda *_: None,  # type: ignore[arg-type, return-value]
        random=TensorParallelRNG(1, 0, fake_cuda.DEVICE),
        clipper=clipper,
        router_losses=losses,
        loss_parts=parts,
        loss=LossFunction(MaskedLanguageModel() if parts else LanguageModel(), topology.model, models.VOCABULARY - 6),
    )
    made.prepare = lambda *_: None  # type: ignore[method-assign]
    return made, losses


def loop(module: Any, hooks: list[Hook] | None = None, batches: Any = None, **settings: Any) -> None:
    """Trains some steps without a report."""
    usual = MaskedBatches() if settings.get("parts") else FakeBatches()
    with fake_cuda.FakeGPU():
        fake_cuda.onto_gpu(module)
        engine: Any = engine_of(module, **{"bf16": False, **settings})[0]
        reporter: Any = QuietReporter()
        locator: Any = None
        lr_schedule: Any = SimpleNamespace(lr=lambda step: 1e-3)
        samples = models.BATCH * MICRO_BATCHES
        copies = Copies()
        guard = LossGuard(locator, "stop", 2.0, scaled=False, log=print)
        context = LoopContext(
            engine=engine,
            lr_schedule=lr_schedule,
            train=batches or usual,
            valid=None,
            reporter=reporter,
            stop_requested=lambda: False,
            save=None,
            check_saves=no_wait,
            synchronize=no_wait,
            peak_memory=lambda: 0,
            hooks=Hooks([AfterTheFirst(copies), guard, *(hooks or [])]),
            to_device=DeviceCopies(fake_cuda.DEVICE),
            outcome_lag=1,
        )
        schedule = plain_schedule(
            100, samples=samples, length=models.LENGTH, micro_batches=MICRO_BATCHES, log_interval=50
        )
        try:
            with copies:
                run_loop(schedule, context, RunState(iteration=STARTED_AT))
        except Finished:
            return
    raise AssertionError("the loop ended by itself")


def experts() -> None:
    """A mixture with router losses."""
    losses = RouterLossTracker(0.1, 0.1)
    moe = mixtures.moe_section(moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.1)
    loop(models.build(dict(models.LLAMA), moe=moe, router_losses=losses), losses=losses)


def masked() -> None:
    """An encoder with both heads, in bfloat16."""
    parts = LossParts()
    loop(models.build(dict(ENCODER), loss_parts=parts, reset=True), parts=parts, bf16=True)


class PlantedHook(Hook):
    """A hook with a bug."""

    def __init__(self, bug: Callable[[Any], Any]) -> None:
        self._bug = bug

    def after_step(self, state: RunState, size: Any, result: Any) -> None:
        self._bug(result)


def planted(bug: Callable[[Any], Any]) -> None:
    loop(models.build(dict(models.LLAMA)), [PlantedHook(bug)])


CASES: dict[str, Callable[[], None]] = {
    "fp32, ZeRO 0": lambda: loop(models.build(dict(models.LLAMA))),
    "bfloat16, ZeRO 1": lambda: loop(models.build(dict(models.LLAMA)), bf16=True),
    "experts": experts,
    "masked tokens and order": masked,
    "spans": lambda: loop(models.build(dict(ENCODER_DECODER)), batches=SpanBatches(), bf16=True),
    "planted: the loss is read": lambda: planted(lambda result: result.loss.item()),
    "planted: the flag is tested": lambda: planted(lambda result: bool(result.skipped)),
    "planted: a copy that waits": lambda: planted(lambda result: result.grad_norm.cpu()),
    "planted: a number is copied to the GPU": lambda: planted(
        lambda result: result.loss + torch.tensor([1.0]).to(fake_cuda.DEVICE)
    ),
    "planted: a tensor is made of a number": lambda: planted(
        lambda result: result.loss + torch.tensor([1.0], device=fake_cuda.DEVICE)
    ),
    "planted: an optimizer without a flag": lambda: loop(models.build(dict(models.LLAMA)), fused=False),
}


class NoEvent:
    """Takes the place of torch.cuda.Event."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class NoStream:
    """Takes the place of torch.cuda.Stream."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


def main() -> None:
    """Runs all cases."""
    fake_cuda.pretend()
    models.attention.flex_attention = models.without_compiler
    models.runtime.launch = lambda *_, **__: None
    cuda: Any = torch.cuda
    cuda.Event, cuda.Stream = NoEvent, NoStream
    cuda.stream, cuda.current_stream = lambda _: nullcontext(), NoStream
    Tensor.record_stream = lambda *_: None  # type: ignore[method-assign, assignment]
    # What was copied for an older step is on the host by then.
    host_copy.HostCopy.read = lambda self: [1.0, 1.0, 0.0, 0.0]  # type: ignore[method-assign]
    print(json.dumps({name: models.outcome(case) for name, case in CASES.items()}))


if __name__ == "__main__":
    sys.exit(main())
