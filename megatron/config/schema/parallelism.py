"""Parallel layout of model and batch."""

from megatron.config.field import Section, key
from megatron.config.types import Integers


class ParallelismSection(Section):
    """Sizes of the parallel axes. Rank order: pipe outermost, then data, context and model."""

    pipe_parallel_size: int = key(
        0, "Pipeline stages; 0 is no pipeline engine at all, 1 the pipeline engine with one stage.", unit="stages"
    )
    model_parallel_size: int = key(1, "Ranks that share each layer (tensor parallelism).", unit="ranks")
    context_parallel_size: int = key(1, "Ranks that share each sequence (context parallelism).", unit="ranks")
    sequence_parallel: bool = key(
        False, "Shard norms and dropout over the tensor parallel ranks by sequence, arXiv:2205.05198."
    )
    pipe_partition_method: str | Integers = key(
        "type:transformer|mlp",
        "How layers are assigned to stages: uniform, parameters, type:REGEX to count layers whose class name matches, "
        "or a list of the blocks of each stage.",
    )
    world_size: int | None = key(None, "Ranks of the run; found at launch.", unit="ranks")
    is_pipe_parallel: bool = key(False, "Whether the pipeline engine runs; follows from pipe_parallel_size.")

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model that see different samples [ranks]."""
        assert self.world_size is not None
        stages = max(1, self.pipe_parallel_size)
        return self.world_size // (stages * self.model_parallel_size * self.context_parallel_size)
