"""Drafts of further tokens by the modules that were trained to predict them (arXiv:2412.19437, section 2.2).

Module k, from 1, reads what the module before it made of position i (the model's final norm, for the first) and token
i + k, and its output predicts token i + k + 1. Each has a cache of its own. What a module made of a position from a
draft is made again once the token is known, so that its cache holds what training would have had there.

Shapes: b batch, s sequence, p new positions, d modules, h hidden, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import device
from megatron.engine.inference_forward import Layer, gather_vocabulary, select_positions
from megatron.model.kv_cache import KVCache
from megatron.model.multi_token import FurtherToken


@dataclass
class DraftCounts:
    """How many drafts there were."""

    proposed: int = 0
    """Tokens that the model was asked about."""
    accepted: int = 0
    """Those that it would have chosen too."""

    def __str__(self) -> str:
        share = f" ({self.accepted / self.proposed:.1%})" if self.proposed else ""
        return f"{self.accepted:,} of {self.proposed:,} drafted tokens were chosen{share}"


@dataclass(frozen=True)
class Known:
    """What is known of the texts of a batch when new tokens are drafted."""

    starts: Sequence[int]
    """Positions of each text that the modules have seen with the tokens that followed."""
    counts: Sequence[int]
    """Positions behind these of which the next token is known too."""
    hidden: Tensor
    """Output of the final norm at the new positions, and padding, [b, p, h]."""
    tails: Sequence[Tensor]
    """For the final norm and each module, its output at the d positions before, [b, d, h]."""
    following: Tensor
    """The token behind each new position, and padding, [b, p]."""


@dataclass(frozen=True)
class Drafter:
    """The model and its modules, all of them in this process or on tensor-parallel ranks."""

    layers: tuple[Layer, ...]
    """From the embedding to the final norm."""
    head: Layer
    """The output layer."""
    modules: tuple[FurtherToken, ...]
    """In order."""
    topology: Topology
    """Axes of this rank."""
    make_cache: Callable[[int, int], KVCache]
    """(batch, max length) -> an empty cache of a module."""
    counts: DraftCounts
    """Of all texts so far."""

    @staticmethod
    def of(
        functions: Sequence[Layer], depths: int, topology: Topology, make_cache: Callable[[int, int], KVCache]
    ) -> Drafter:
        """Makes it.

        Args:
            functions: all layers, the last of which are modules.
            depths: number of the modules.
            topology: axes of this rank.
            make_cache: as the attribute.
        """
        *layers, head = functions[:-depths]
        modules = tuple(module for module in functions[-depths:] if isinstance(module, FurtherToken))
        return Drafter(tuple(layers), head, modules, topology, make_cache, DraftCounts())

    @torch.inference_mode()
    def logits(self, tokens: Tensor, cache: KVCache, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the logits of the next tokens, as of the engine, and the output of the final norm [b, s, h].

        Args:
            tokens: [b, s]; they continue the sequences in the cache, and are added to it.
            cache: cache of the model.
            at: positions in the flattened [b, s] to return logits of instead of all.
        """
        carry = tokens.to(device())
        for layer in self.layers:
            carry = layer(carry, cache)
        chosen = carry if at is None else select_positions(carry, at.to(device()))
        logits = gather_vocabulary(self.head(chosen, cache), self.topology)
        cache.advance(tokens.shape[1])
        return logits if at is None else logits[0], carry.transpose(0, 1)

    @torch.inference_mode()
    def extend(self, known: Known, caches: Sequence[KVCache], vocab_size: int) -> tuple[Tensor, list[Tensor]]:
        """Shows the new positions to the modules. Returns a draft of each [b, d], and the next tails [b, d, h].

        Args:
            known: of the texts.
            caches: of the modules, a row for each text.
            vocab_size: ids from here on are padding of the vocabulary.
        """
        depths, (batch, new, _) = len(self.modules), known.hidden.shape
        rows, counts = torch.arange(batch, device=device()), torch.tensor(known.counts, device=device())
        tokens = torch.nn.functional.pad(known.following.to(device()), (0, depths))  # [b, p + d]
        seen = [torch.cat((known.tails[0], known.hidden), 1)]  # [b, d + p, h], the first of position start - d
        for number, (module, cache) in enumerate(zip(self.modules, caches, strict=True)):
            again = min(number, *known.starts)
            cache.set_lengths([start - again for start in known.starts])
            inputs = seen[-1][:, depths - again :].transpose(0, 1)  # [again + p, b, h]
            following = tokens[:, number - again : number + new]
            joined = module.join(self.layers[0](following), inputs)
            made = module.norm(module.block(joined, cache)).transpose(0, 1)
            tail = known.tails[number + 1] if number + 1 < depths else known.tails[0]
            seen.append(torch.cat((tail[:, : depths - again], made), 1))
            last = seen[-1][rows, depths + counts - 1]  # [b, h]
            logits = gather_vocabulary(self.head(last.unsqueeze(0)), self.topology)[:, 0]  # [b, v]
            tokens[rows, counts + number] = logits[:, :vocab_size].argmax(-1)
        behind = counts[:, None] + torch.arange(depths, device=device())  # [b, d]
        drafts = tokens.gather(1, behind)
        return drafts, [one[rows[:, None], behind] for one in seen[:depths]]

    def new_caches(self, batch: int, max_length: int) -> list[KVCache]:
        """Returns a cache for each module."""
        return [self.make_cache(batch, max_length) for _ in self.modules]
