"""Settings of a run that decide how many bytes autograd saves in a block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ActivationLayout:
    """Settings that decide the memory of activations."""

    seq_length: int
    """Sequence length [tokens]."""
    micro_batch: int
    """Micro batch size [samples]."""
    model_parallel_size: int
    """Tensor parallel degree."""
    width: int
    """Bytes of an activation."""
    recompute: int
    """Blocks in a recomputed group; 0 for none."""
    hidden_dropout: bool
    """Whether masks of hidden dropout are saved."""
    attention_dropout: bool
    """Whether masks of attention dropout are saved."""
    cpu: bool
    """Whether CPU kernels run, which save other tensors than those of a GPU."""
    first_only: bool = False
    """Whether only the first `recompute` blocks of a stage are recomputed, one by one."""
    selective: bool = False
    """Whether only the attention core is recomputed."""
    saved_fraction: float = 1.0
    """Fraction of a group's input that stays on the device."""
    context_parallel_size: int = 1
    """Context parallel degree."""
    ring_size: int = 1
    """Members that pass keys and values on; 1 without a ring."""
    sequence_parallel: bool = False
    """Whether norms and dropout are sharded by sequence."""
    shares: tuple[float, ...] = ()
    """Visible fraction of each block's attention; 1 by default."""
    fused_scan: bool = False
    """Whether Mamba's scan is fused."""
    loss_in_blocks: bool = True
    """Whether the output layer and the loss are computed in blocks of tokens."""
    bounded_scores: bool = False
    """Whether scores have a bound that no kernel of the device computes without saving them."""
    bounded_logits: bool = False
    """Whether logits have a bound."""
    sinks: bool = False
    """Whether the softmax of scores sums more than the keys."""
    bounded_gates: bool = False
    """Whether the halves of a gated activation are bounded or shifted first."""
    kinds_with_scores: frozenset[str] = frozenset()
    """Kinds of blocks whose attention saves its probabilities."""

    @property
    def tokens(self) -> int:
        """Tokens of this rank."""
        return self.seq_length * self.micro_batch // self.context_parallel_size

    @property
    def residual_tokens(self) -> int:
        """Tokens of this rank between tensor-parallel regions."""
        return self.tokens // self.model_parallel_size if self.sequence_parallel else self.tokens
