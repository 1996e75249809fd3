"""Parallel layout of model and batch."""

from megatron.config.field import Section, key
from megatron.config.types import Integers
from megatron.sequence_parts import METHODS, ULYSSES, sequence_multiple, ulysses_size


class ParallelismSection(Section):
    """Sizes of the parallel axes. Rank order: pipe outermost, then data, context and model."""

    pipe_parallel_size: int = key(
        0, "Pipeline stages; 0 is no pipeline engine at all, 1 the pipeline engine with one stage.", unit="stages"
    )
    model_parallel_size: int = key(1, "Ranks that share each layer (tensor parallelism).", unit="ranks")
    context_parallel_size: int = key(1, "Ranks that share each sequence (context parallelism).", unit="ranks")
    context_parallel_method: str = key(
        ULYSSES,
        "How these ranks attend to each other's shards: ulysses exchanges heads (arXiv:2309.14509), so key heads "
        "divide by the ranks; ring passes keys and values on (arXiv:2310.01889), for any number of ranks; both "
        "exchanges heads among as many neighbours as divide the key heads, and has rings across them.",
        choices=METHODS,
    )
    sequence_parallel: bool = key(
        False, "Shard norms and dropout over the tensor parallel ranks by sequence, arXiv:2205.05198."
    )
    pipe_partition_method: str | Integers = key(
        "type:transformer|mlp",
        "How layers are assigned to stages: uniform, parameters, type:REGEX to count layers whose class name matches, "
        "or a list of the blocks of each stage.",
    )
    pipe_schedule: str = key(
        "1f1b",
        "Order of the micro batches on the pipeline: 1f1b has one stage a rank, interleaved several, zero_bubble "
        "(ZB-V, arXiv:2401.10241) and dualpipev (arXiv:2412.19437) two.",
        choices=("1f1b", "interleaved", "zero_bubble", "dualpipev"),
    )
    num_layers_per_virtual_pipeline_stage: int | None = key(
        None,
        "Blocks of a stage with pipe_schedule interleaved; two stages a rank unless set.",
        unit="blocks",
    )
    world_size: int | None = key(None, "Ranks of the run; found at launch.", unit="ranks")
    is_pipe_parallel: bool = key(False, "Whether the pipeline engine runs; follows from pipe_parallel_size.")

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model that see different samples [ranks]."""
        assert self.world_size is not None
        stages = max(1, self.pipe_parallel_size)
        return self.world_size // (stages * self.model_parallel_size * self.context_parallel_size)

    def ulysses_size(self, num_kv_heads: int) -> int:
        """Returns how many neighbours among the context-parallel ranks exchange heads [ranks].

        num_kv_heads: key/value heads of the model.
        """
        share = max(1, num_kv_heads // max(1, self.model_parallel_size))
        return ulysses_size(self.context_parallel_method, self.context_parallel_size, share)

    def ring_size(self, num_kv_heads: int) -> int:
        """Returns how many members pass keys and values on; 1 without a ring. num_kv_heads: of the model."""
        return self.context_parallel_size // self.ulysses_size(num_kv_heads)

    def length_multiple(self, num_kv_heads: int, *, zigzag: bool = True) -> int:
        """Returns the number that divides the length of every sequence [tokens].

        num_kv_heads: key/value heads of the model. zigzag: false where blocks process the sequence in order.
        """
        tensor = self.model_parallel_size if self.sequence_parallel else 1
        return sequence_multiple(
            self.context_parallel_size, self.ulysses_size(num_kv_heads), max(1, tensor), zigzag=zigzag
        )
