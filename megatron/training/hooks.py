"""Everything that looks at a run while it trains: pace, fingerprints, norms, the noise scale, traces, memory.

The loop knows two of its functions: `recording`, around each step, and `measure`, for each report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from megatron.config.schema.observe import ObserveSection
from megatron.distributed.process_group import device
from megatron.engine.deepspeed_engine import PlainEngine
from megatron.engine.optimizer_state import inner_optimizer
from megatron.engine.pipeline_engine import PipelinedEngine
from megatron.engine.tensor_statistics import GradientTap, NoiseScale, Statistics, Wanted
from megatron.errors import ConfigError
from megatron.health.straggler import StragglerMonitor
from megatron.metrics.fingerprint import Fingerprints
from megatron.metrics.profiler import MemoryRecorder, Tracer
from megatron.optim.onebit import OnebitAdam
from megatron.training.step_schedule import StepSize

Recorder = Callable[[int, StepSize], AbstractContextManager[None]]


@dataclass
class Instruments:
    """recorders: around the step of an iteration. meters: metrics for a report; collective. closers: at the end.

    waiting: around every wait for training data.
    """

    recorders: list[Recorder] = field(default_factory=list)
    meters: list[Callable[[], dict[str, float]]] = field(default_factory=list)
    closers: list[Callable[[], None]] = field(default_factory=list)
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext

    @contextmanager
    def recording(self, iteration: int, size: StepSize) -> Iterator[None]:
        """Around the step that makes this iteration."""
        with ExitStack() as stack:
            for recorder in self.recorders:
                stack.enter_context(recorder(iteration, size))
            yield

    def measure(self) -> dict[str, float]:
        """What the meters say; collective, at a report."""
        return {name: value for meter in self.meters for name, value in meter().items()}

    def close(self) -> None:
        """Ends what is under way."""
        for closer in self.closers:
            closer()


def build_instruments(
    observe: ObserveSection,
    engine: PlainEngine | PipelinedEngine,
    *,
    hosts: Sequence[str],
    max_norm: float,
    due: Callable[[int], bool],
    tell: Callable[[str], None],
) -> Instruments:
    """Watches what the section asks for.

    hosts: of each rank. max_norm: of clipping. due: whether an iteration is reported. tell: speaks to the user.
    ConfigError where something cannot be watched on this machine.
    """
    rank = engine.topology.rank
    pace = StragglerMonitor(rank, hosts, device(), observe.folder, tell)
    instruments = Instruments(waiting=pace.waiting, meters=[pace.measure])
    instruments.recorders.append(lambda iteration, size: pace.recording(iteration))
    _add_files(instruments, observe, engine, rank, tell)
    optimizer = inner_optimizer(engine.deepspeed.optimizer)
    if isinstance(optimizer, OnebitAdam):
        instruments.meters.append(optimizer.traffic.measure)
    wanted = Wanted(
        gradient_norms=observe.log_grad_norm,
        gradient_zeros=observe.log_grad_pct_zeros,
        parameter_norms=observe.log_param_norm,
        optimizer_states=observe.log_optimizer_states,
        by_layer=observe.log_norms_by == "layer",
    )
    if not wanted.anything and not observe.log_gradient_noise_scale:
        return instruments
    tap = GradientTap(engine, max_norm)
    if wanted.anything:
        statistics = Statistics(engine, tap, wanted)
        instruments.recorders.append(lambda iteration, size: statistics.recording(due(iteration)))
        instruments.meters.append(statistics.measure)
    if observe.log_gradient_noise_scale:
        noise = NoiseScale(
            tap, batches=observe.gradient_noise_scale_n_batches, on_cpu=observe.gradient_noise_scale_cpu_offload
        )
        instruments.recorders.append(lambda iteration, size: noise.recording(size.samples))
        instruments.meters.append(noise.measure)
    return instruments


def _add_files(
    instruments: Instruments,
    observe: ObserveSection,
    engine: PlainEngine | PipelinedEngine,
    rank: int,
    tell: Callable[[str], None],
) -> None:
    """What is written to files of its own beside the metrics."""
    if observe.fingerprint_interval is not None and observe.log_dir is not None:
        prints = Fingerprints(
            Path(observe.log_dir), rank, observe.fingerprint_interval, engine.layers(), engine.parameters
        )
        instruments.recorders.append(lambda iteration, size: prints.recording(iteration))
    steps = (observe.profile_step_start, observe.profile_step_stop)
    if observe.profile:
        if observe.log_dir is None:
            raise ConfigError.of("a trace needs a folder", key="profile", value=True, hint="set log_dir")
        tracer = Tracer(Path(observe.log_dir), rank, *steps, tell)
        instruments.recorders.append(lambda iteration, size: tracer.recording(iteration))
        instruments.closers.append(tracer.close)
    if observe.memory_profiling:
        folder = observe.memory_profiling_path or observe.log_dir or "."
        memory = MemoryRecorder(Path(folder), rank, *steps, tell)
        instruments.recorders.append(lambda iteration, size: memory.recording(iteration))
        instruments.closers.append(memory.close)
