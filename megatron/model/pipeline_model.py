"""The model as a DeepSpeed PipelineModule: each stage builds its own layers and no others.

DeepSpeed reads the names of the layer classes (`type:transformer` partitions by them). A tied output layer is a second
copy of the word embedding on the last stage; DeepSpeed sums the gradients of the two.

s sequence, b micro batch, v vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import accumulate
from typing import Any

from deepspeed import comm as dist
from deepspeed.pipe import LayerSpec as DeepSpeedLayerSpec
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, is_grad_enabled, nn

from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import device
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets, WeightLink
from megatron.errors import RunError
from megatron.model.block import Block
from megatron.model.embedding import EmbeddingLayer
from megatron.model.kv_cache import KVCache
from megatron.model.layers import LayerSpec
from megatron.model.loss_function import LossFunction
from megatron.model.masked_head import MaskedHead, MaskedTargets
from megatron.model.multi_token import FurtherLosses, FurtherToken, further_hidden
from megatron.model.recompute import Recompute, run_layers
from megatron.param_table import FIRST_BLOCK, key_in_table

TIED = "embedding"
"""Name in DeepSpeed of the module that both pipeline ends share."""

RELATIVE = "relative_positions"
"""Name in DeepSpeed of learned relative positions, which all blocks share."""

FURTHER = "further_tokens"
"""Name in DeepSpeed of an embedding on both pipeline ends where modules predict further tokens."""

Carry = Tensor | tuple[Tensor, ...]


class PipelinedModel(PipelineModule):
    """One pipeline stage of the model."""

    def __init__(
        self,
        layer_specs: Sequence[LayerSpec],
        topology: Topology,
        *,
        partition_method: str | tuple[int, ...],
        loss: LossFunction,
        recompute: Recompute | None = None,
        further: FurtherLosses | None = None,
    ) -> None:
        """Builds the layers of this stage.

        Args:
            layer_specs: layers of the full model.
            topology: layout of the ranks.
            partition_method: DeepSpeed's (`type:regex`, `parameters`, `uniform`), or the blocks of each stage.
            loss: Called on the last stage.
            recompute: recomputation of blocks, or None.
            further: losses of the modules that predict further tokens, which are on the last stage.

        `after_loss`, where it is set, gets the loss of each micro batch of a step, and may change its gradient.
        """
        grid = PipeModelDataParallelTopology(  # ranks that share a sequence are data-parallel to DeepSpeed
            num_pp=topology.pipe.size, num_mp=topology.model.size, num_dp=topology.dp_cp.size
        )
        behind = [layer for layer in layer_specs if issubclass(layer.layer, FurtherToken)]
        layer_specs = layer_specs[: len(layer_specs) - len(behind)]
        self.behind, self.further = len(behind), further
        tied = any(layer.tied_to is not None for layer in layer_specs)
        self._embedding = layer_specs[0] if behind and not tied and topology.pipe.size > 1 else None
        self._relative = _learned_relative(layer_specs)
        self._attending = [layer.index for layer in layer_specs if getattr(layer.layer, "attends", False)]
        with redirect_stdout(io.StringIO()):  # the partition is reported by us, not printed
            super().__init__(
                layers=_specs(layer_specs),
                topology=grid,
                partition_method=partition_method,
                loss_fn=self._loss,
            )
        self.recompute, self.loss = recompute, loss
        self.after_loss: Callable[[Tensor], Tensor] | None = None
        self.masked_head: MaskedHead | None = None
        if topology.pipe.is_last:  # their names are the indices of layers, as those of DeepSpeed's layers
            for layer in behind:
                self.add_module(str(layer.index), layer.build().to(device()))
        last = layer_specs[-1]
        if issubclass(last.layer, MaskedHead) and topology.pipe.rank == self.stage_owner(len(layer_specs) - 1):
            self.masked_head = MaskedHead(**last.arguments, output=self.forward_funcs[-1]).to(device())
            self.forward_funcs[-1] = self.masked_head

    def forward(self, forward_input: Carry) -> Carry:
        """Runs this stage's layers: tokens [b, s] or hidden [s, b, h] -> hidden [s, b, h] or logits [s, b, v/t].

        Tokens may have their types behind them, [2, b, s]. The starts of documents [b, s], and behind them the mask of
        padding [b, s], are passed from stage to stage beside it where the batch has them, and last the labels [b, s]
        where modules predict further tokens. Where the loss is computed together with the output layer, the result of
        the last stage is the output layer's input, that of each module behind it, and an anchor of its matrix for each.
        """
        is_last = self._local_stop == self._num_layers
        layers = self.forward_funcs[:-1] if is_last and self.loss.in_blocks else self.forward_funcs
        carry, *beside = (forward_input,) if isinstance(forward_input, Tensor) else forward_input
        labels = [beside.pop()] if self.behind else []
        carry = differentiable(run_layers(layers, carry, None, self.recompute, *beside))
        if is_last and self.loss.in_blocks:
            features = (carry,) if self.masked_head is None else self.masked_head.features(carry)
            further = self._further_hidden(carry, labels[0], beside) if self._learns_further else []
            self._link, *self._links = (WeightLink(self._output_layer().output_weight) for _ in (0, *further))
            return (*features, *further, self._link.anchor, *(link.anchor for link in self._links))
        return carry if is_last or not (beside or labels) else (carry, *beside, *labels)

    @property
    def _learns_further(self) -> bool:
        return self.behind > 0 and self.training and is_grad_enabled()

    def _further_hidden(self, hidden: Tensor, labels: Tensor, beside: Sequence[Tensor]) -> list[Tensor]:
        """Returns what the modules that predict further tokens make of them, [s, b, h] each.

        Args:
            hidden: output of the final norm [s, b, h].
            labels: next tokens [b, s].
            beside: starts of documents and mask of padding, as far as the batch has them.
        """
        modules = [module for module in self.children() if isinstance(module, FurtherToken)]
        self._starts = beside[0] if beside else None

        def run(block: nn.Module, x: Tensor) -> Tensor:
            return run_layers([block], x, None, self.recompute, *beside)

        return further_hidden(modules, hidden, labels.t(), run, self._last_embedding())

    def _last_embedding(self) -> Any:
        """Returns the embedding on the last stage: a copy, or that of the only stage."""
        shared = [self.tied_modules[name] for name in (TIED, FURTHER) if name in self.tied_modules]
        return shared[0] if shared else self.forward_funcs[0]

    def _loss(self, output: Carry, given: tuple[Tensor, ...]) -> Tensor:
        """Returns the loss of the last stage's output.

        given: labels and loss mask [b, s], tokens [], and the order of segments [b, 1] where that is learned.
        """
        return self.loss_to_learn(self._loss_of(output, given))

    def _loss_of(self, output: Carry, given: Any) -> Tensor:
        targets = self.loss.targets(*given)
        if targets is None:
            assert isinstance(output, Tensor)
            return free_logits_after_loss(self.loss(output, *given), output)
        if self.masked_head is not None:
            assert isinstance(targets, MaskedTargets) and isinstance(output, tuple)
            return self.masked_head.loss(output[:-1], replace(targets, link=self._link))
        value = self._output(self._link)(output[0], targets)
        if self._learns_further and self.further is not None:
            assert isinstance(output, tuple)
            outputs = [self._output(link) for link in self._links]
            value = value + self.further(output[1 : 1 + self.behind], targets, outputs, self._starts)
        return value

    def _output(self, link: WeightLink) -> Callable[[Tensor, TokenTargets], Tensor]:
        """Returns the output layer's loss of targets, which leaves the gradient of its matrix to a link."""

        def loss(hidden: Tensor, targets: TokenTargets) -> Tensor:
            value: Tensor = self.forward_funcs[-1](hidden, targets=replace(targets, link=link))
            return value

        return loss

    def loss_to_learn(self, loss: Tensor) -> Tensor:
        """Returns the loss of a micro batch, which `after_loss` has seen in training."""
        return loss if self.after_loss is None or not is_grad_enabled() else self.after_loss(loss)

    def _output_layer(self) -> Any:
        """Returns the module that computes logits, on the last stage."""
        layer = self.forward_funcs[-1]
        has_matrix = isinstance(layer, nn.Module) and self.masked_head is None
        return layer if has_matrix else self.tied_modules[TIED]

    def _partition_layers(self, method: str | tuple[int, ...] = "uniform") -> None:
        """Assigns layers to stages for DeepSpeed; block i is layer i + 2."""
        if isinstance(method, str):
            super()._partition_layers(method)
            return
        bounds = [0, *(2 + blocks for blocks in accumulate(method[:-1])), len(self._layer_specs)]
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = bounds
        self._set_bounds(start=bounds[stage], stop=bounds[stage + 1])

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """Returns the weights whose gradients DeepSpeed sums over stages; frozen weights have none."""
        found = super().get_tied_weights_and_groups()
        return [(weight, group) for weight, group in found if weight.requires_grad]

    def _index_tied_modules(self) -> dict[str, Any]:
        """Returns what stages share: the tied embedding, and learned relative positions.

        Raises RunError if the first stage has no block, since it counts and saves what stages share.
        """
        comms: dict[str, Any] = super()._index_tied_modules()
        if self._embedding is not None:
            self._copy_embedding(comms, self._embedding)
        if not self._relative or self._topo.get_dim("pipe") == 1:
            return comms
        stages = sorted({self.stage_owner(index) for index in self._attending})
        if stages[0] != 0:
            raise RunError.of(
                "the first pipeline stage has no block to hold the relative positions that all blocks share",
                hint="give it one with pipe_partition_method, or choose other positions (pos_emb)",
            )
        relative = self._relative[0]
        for data in range(self._grid.data_parallel_size):
            for model in range(self._topo.get_dim("model")):
                ranks = [self._topo.get_rank(pipe=stage, data=data, model=model) for stage in stages]
                group = dist.new_group(ranks)
                if self.global_rank in ranks:
                    self.tied_modules[RELATIVE] = relative
                    comms[RELATIVE] = {"ranks": ranks, "group": group, "weight_attr": ["weight"], "module": relative}
                    for parameter in relative.parameters():  # counted once
                        parameter.ds_pipe_replicated = self.global_rank != ranks[0]  # type: ignore[attr-defined]
        return comms

    def _copy_embedding(self, comms: dict[str, Any], layer: LayerSpec) -> None:
        """Gives the last stage a copy of the embedding, whose gradients are summed with those of the first stage.

        Args:
            comms: what stages share; the embedding is added.
            layer: the embedding.
        """
        stages = (0, self._topo.get_dim("pipe") - 1)
        stage = self._topo.get_coord(self.global_rank).pipe
        if stage == stages[0]:
            self.tied_modules[FURTHER] = self.forward_funcs[0]
        elif stage == stages[1]:
            self.tied_modules[FURTHER] = layer.layer(**layer.arguments, as_output_copy=True).to(device())
        for data in range(self._grid.data_parallel_size):
            for model in range(self._topo.get_dim("model")):
                ranks = [self._topo.get_rank(pipe=one, data=data, model=model) for one in stages]
                group = dist.new_group(ranks)
                if self.global_rank in ranks:
                    module, attribute = self.tied_modules[FURTHER], ["word_embeddings.weight"]
                    comms[FURTHER] = {"ranks": ranks, "group": group, "weight_attr": attribute, "module": module}
                    for parameter in module.parameters():  # counted once
                        parameter.ds_pipe_replicated = self.global_rank != ranks[0]

    def keyed_parameters(self) -> dict[str, nn.Parameter]:
        """Returns key ("<layer>.<name>") -> parameter; the copy of a tied embedding has the embedding's key."""
        moved = {
            f"tied_modules.{TIED}.": "0.",
            f"tied_modules.{FURTHER}.": "0.",
            f"tied_modules.{RELATIVE}.": f"{FIRST_BLOCK}.attention.rpe.",
            "masked_head.": f"{self._num_layers - 1}.",
        }
        keyed = {}
        for name, parameter in self.named_parameters():
            for start, end in moved.items():
                name = name.replace(start, end)
            layer, _, rest = name.partition(".")
            keyed[key_in_table(int(layer), rest)] = parameter
        return keyed

    @property
    def layer_range(self) -> Sequence[int]:
        """Indices of this stage's layers in the model."""
        return range(self._local_start, self._local_stop)


def _learned_relative(layer_specs: Sequence[LayerSpec]) -> tuple[nn.Module, ...]:
    """Returns learned relative positions, or (); in a tuple, since the module belongs to the blocks."""
    relative = {layer.arguments["spec"].relative_positions for layer in layer_specs if issubclass(layer.layer, Block)}
    return tuple(module for module in relative if module is not None and list(module.parameters()))


def differentiable(carry: Tensor) -> Tensor:
    """Makes the carry require a gradient: DeepSpeed sends one back through it, even to a frozen stage."""
    return carry if carry.requires_grad or not is_grad_enabled() else carry.requires_grad_()


def free_logits_after_loss(value: Tensor, logits: Tensor) -> Tensor:
    """Frees the logits after the loss, since DeepSpeed keeps those of several micro batches.

    The graph of the loss has what the backward pass needs.
    """
    if value.requires_grad:
        logits.data = logits.new_empty(0)
    return value


def _specs(layer_specs: Sequence[LayerSpec]) -> list[DeepSpeedLayerSpec]:
    tied_index = next((layer.tied_to for layer in layer_specs if layer.tied_to is not None), None)
    specs = []
    for layer in layer_specs:
        if layer.tied_to is not None:
            copy = {**layer_specs[layer.tied_to].arguments, "as_output_copy": True}
            specs.append(_tied(layer_specs[layer.tied_to].layer, copy, tied_output))
        elif layer.index == tied_index:
            specs.append(_tied(layer.layer, dict(layer.arguments), None))
        else:
            specs.append(DeepSpeedLayerSpec(layer.layer, **layer.arguments))
    return specs


def _tied(layer: type[nn.Module], arguments: dict[str, object], forward: Callable[..., Tensor] | None) -> TiedLayerSpec:
    return TiedLayerSpec(TIED, layer, forward_fn=forward, tied_weight_attr="word_embeddings.weight", **arguments)


def tied_output(
    embedding: nn.Module,
    hidden: Tensor,
    cache: KVCache | None = None,
    document_starts: Tensor | None = None,
    targets: TokenTargets | None = None,
) -> Tensor:
    """Computes logits with the word embedding's matrix: [s, b, h] -> [s, b, v/t], or the loss of the targets.

    Args:
        embedding: Layer whose weight is used.
        hidden: [s, b, h].
        cache: Not used; layers have one signature.
        document_starts: Not used; layers have one signature.
        targets: Labels and weights of the tokens.
    """
    assert isinstance(embedding, EmbeddingLayer)
    return embedding.output(hidden, targets)
