"""Layer L+4 of an encoder of queries or passages: the embedding of a text, from the output of its first token.

With `retrieval_projection_size` a linear layer is behind it. Sources: arXiv:1906.00300, section 4; arXiv:2004.04906,
section 3.

Shapes: s sequence, b sequences, h hidden, d width of an embedding, t tensor-parallel degree.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.distributed.collectives import reduce_from
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache
from megatron.model.masked_head import ReplicatedLinear
from megatron.model.model_spec import ModelSpec


class RetrievalHead(nn.Module):
    """Embedding of each sequence."""

    def __init__(self, spec: ModelSpec, blocks: BlockSpec) -> None:
        """Builds the head with its initial values.

        Args:
            spec: spec of the model.
            blocks: spec of the blocks; its initial values apply here too.
        """
        super().__init__()
        dims, source = spec.dims, spec.param_factory(spec.dims.num_layers + 4)
        self.axis, self.projection = source.axis, None
        if dims.projection:
            self.projection = ReplicatedLinear(dims.hidden_size, dims.projection, source.of("projection"), blocks)
        self.to(spec.dtype)

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        targets: TokenTargets | None = None,
    ) -> Tensor:
        """Output of the final norm [s, b, h], [s/t, b, h] with sequence parallelism -> embeddings [b, d].

        Args:
            hidden: Output of the final norm [s, b, h].
            cache: Not used; layers have one signature.
            document_starts: Not used; layers have one signature.
            targets: None; the loss is computed from embeddings.
        """
        first = hidden[0]  # [b, h]
        embeddings: Tensor = first if self.projection is None else self.projection(first)
        if self.axis.sequence_parallel:  # the first rank has the first token
            embeddings = reduce_from(embeddings if self.axis.rank == 0 else embeddings * 0.0, self.axis)
        return embeddings
