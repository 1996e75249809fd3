"""Multi-token prediction (arXiv:2412.19437, section 2.2): modules behind the model predict tokens after the next one.

Module k (from 1) reads what the module before it made of a token (the model's final norm for the first one) and the
embedding of the token k places further on, and predicts the token after that:
h_k = norm(block(M_k [norm(embedding(t_{i+k})), norm(h_{k-1})])). Embedding and output layer are the model's. The loss
is lambda / D times the sum of the D modules' losses, each divided by the number of tokens that the model's own loss is
divided by (equations 21 to 25).

The tokens that follow are the labels of the model's own loss, those that do not count too, so labels and their weights
are shifted by k - 1 for the input and by k for the target. Where documents are kept apart, no token learns from another
document than its own.

In a pipeline the modules are on the last stage. In generation they may draft tokens (engine/drafter.py).

Shapes: s sequence, b micro batch, h hidden, t tensor-parallel degree. With sequence parallelism hidden states are
[s/t, b, h].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.param_init import ParamFactory
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.block_spec import BlockSpec
from megatron.model.loss_parts import FURTHER, LossParts

Block = Callable[..., nn.Module]


class FurtherToken(nn.Module):
    """Layer L + 4 + k: module k of the prediction of further tokens."""

    def __init__(self, block: Block, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        """Builds the module with its initial values.

        Args:
            block: class of a block of the model.
            number: of the block whose kind, positions and MLP the module's block has.
            spec: spec of the blocks.
            source: creates the parameters of the layer.
        """
        super().__init__()
        hidden = spec.dims.hidden_size
        self.enorm, self.hnorm = spec.norm(), spec.norm()
        self.eh_proj = Joining(hidden, spec, source.of("eh_proj"))
        self.block = block(number, spec, source.of("block"))
        self.norm = spec.norm()
        self.takes_padding: bool = getattr(self.block, "takes_padding", False)
        self.to(spec.dtype)

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Returns the input of the block: embeddings of the next token and hidden states [s, b, h] -> [s, b, h]."""
        joined: Tensor = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        return joined


class Joining(nn.Module):
    """The projection of both inputs, [h, 2 h], on every tensor-parallel rank."""

    def __init__(self, hidden: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        self.weight = source.replicated("weight", (hidden, 2 * hidden), spec.init_fn)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, 2 h] -> [s, b, h]."""
        return F.linear(x, self.weight)


class FurtherLosses:
    """What the modules that predict further tokens add to the loss."""

    def __init__(self, factor: float, parts: LossParts | None) -> None:
        """Keeps the settings.

        Args:
            factor: lambda, `mtp_loss_scaling_factor`.
            parts: collects the loss of each module, or None.
        """
        self.factor, self.parts = factor, parts

    def __call__(
        self,
        hidden: Sequence[Tensor],
        targets: TokenTargets,
        outputs: Sequence[Callable[[Tensor, TokenTargets], Tensor]],
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """Returns lambda / D times the sum of the modules' losses, an fp32 scalar.

        Args:
            hidden: what each module makes of the tokens [s, b, h].
            targets: labels and weights of the model's own loss, [s, b].
            outputs: for each module (hidden, targets) -> the sum of the losses of the targets.
            document_starts: start of the document of each token [b, s], where documents are kept apart.
        """
        total = torch.zeros((), device=hidden[0].device)
        for depth, (one, output) in enumerate(zip(hidden, outputs, strict=True), start=1):
            own = replace(
                targets,
                labels=shifted(targets.labels, depth),
                weights=shifted(targets.weights, depth) * same_document(document_starts, depth, targets.weights),
            )
            loss = output(one, own)
            if self.parts is not None:
                self.parts.note(part_name(depth), loss)
            total = total + loss
        return total * (self.factor / len(hidden))


def further_hidden(
    modules: Sequence[FurtherToken],
    hidden: Tensor,
    labels: Tensor,
    run: Callable[[nn.Module, Tensor], Tensor],
    embed: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Returns what each module makes of the tokens, [s, b, h].

    Args:
        modules: in order.
        hidden: output of the final norm [s, b, h].
        labels: the next token of each [s, b].
        run: (block, its input [s, b, h]) -> its output.
        embed: token ids [b, s] -> embeddings [s, b, h].
    """
    found = []
    for depth, module in enumerate(modules):
        embedded = embed(shifted(labels, depth).t())
        hidden = module.norm(run(module.block, module.join(embedded, hidden)))
        found.append(hidden)
    return found


def part_name(depth: int) -> str:
    """Returns the metric of the loss of module `depth`, from 1."""
    return f"{FURTHER}{depth}_loss"


def shifted(values: Tensor, by: int) -> Tensor:
    """Returns the values [s, b] of the positions that many places further on; 0 behind the last one."""
    return values if by == 0 else F.pad(values[by:], (0, 0, 0, by))


def same_document(document_starts: Tensor | None, depth: int, weights: Tensor) -> Tensor:
    """Returns 1.0 where the token that many places further on is of the same document as the token, [s, b]."""
    if document_starts is None:
        return torch.ones_like(weights)
    starts = document_starts.t()
    further = F.pad(starts[depth:], (0, 0, 0, depth), value=-1)
    return (further == starts).to(weights.dtype)
