"""The phone book: every name that a YAML may give to a part, and the module that builds it.

A family is what one configuration key chooses from. An entry holds the dotted target `module:attr`, one line of
documentation and, where the target needs a package that is not always installed, the pip extra that brings it.
Targets are imported on use only, so the launcher can refuse a misspelt name, with the nearest one, without torch.

A new part is one new file and one line here.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """One nameable part.

    target: `module:attr`. extra: the pip extra that installs what the target imports. traits: what others must know
    about the part without importing it; "gated" marks an activation whose first linear layer has two halves.
    settings: what the block that names the part may set beside what all parts of its kind take.
    moments: of an optimizer, the fp32 numbers that it keeps for each parameter.
    """

    name: str
    target: str
    doc: str
    extra: str | None = None
    traits: frozenset[str] = frozenset()
    settings: tuple[str, ...] = ()
    moments: float = 0.0


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The name that the writer most likely meant, or None when nothing is close."""
    known = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return known[close[0]] if close else None


GATED = frozenset({"gated"})

WHOLE_BLOCK = frozenset({"whole block"})
"""Marks a kind of attention_config that is a block of its own, with no attention and no MLP beside it."""


class Family:
    """The parts that one configuration key chooses from.

    kind: what the parts are, for messages ("norm"). key: the configuration key that names one of them.
    """

    def __init__(self, kind: str, key: str, entries: Iterable[Entry]) -> None:
        self.kind = kind
        self.key = key
        listed = tuple(entries)
        self._entries: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in listed})
        assert len(self._entries) == len(listed), f"a {kind} is listed twice"

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, in the order of the listing."""
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def nearest(self, name: str) -> str | None:
        """The listed name closest to a misspelt one, or None."""
        return nearest_name(name, self._entries)

    def entry(self, name: str) -> Entry:
        """The entry of that name. Raises ConfigError, with the nearest name, when there is none."""
        if name in self._entries:
            return self._entries[name]
        close = self.nearest(name)
        choices = ", ".join(self.names)
        remedy = f"did you mean {close}? The choices are {choices}" if close else f"the choices are {choices}"
        raise ConfigError.of(f"there is no {self.kind} of this name", key=self.key, value=name, remedy=remedy)

    def load(self, name: str) -> Any:
        """Imports and returns the object. Raises ConfigError when a package that its extra installs is missing."""
        entry = self.entry(name)
        module_name, _, attribute = entry.target.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as fault:
            ours = (fault.name or "").split(".")[0] == "megatron"
            if ours or entry.extra is None:
                raise
            raise ConfigError.of(
                f"this {self.kind} needs the package {fault.name}, which is not installed",
                key=self.key,
                value=name,
                remedy=f"pip install neox[{entry.extra}]",
            ) from fault
        return getattr(module, attribute)


NORMS = Family(
    "norm",
    "norm",
    [
        Entry("layernorm", "megatron.model.norms.layernorm:LayerNorm", "Layer normalisation, arXiv:1607.06450"),
        Entry("rmsnorm", "megatron.model.norms.rmsnorm:RMSNorm", "Root mean square norm, arXiv:1910.07467"),
        Entry(
            "non_parametric_layernorm",
            "megatron.model.norms.non_parametric:NonParametricLayerNorm",
            "Layer normalisation without parameters, arXiv:2402.00838",
        ),
        Entry("scalenorm", "megatron.model.norms.scalenorm:ScaleNorm", "One learned length, arXiv:1910.05895"),
        Entry(
            "te_rmsnorm",
            "megatron.model.norms.transformer_engine:TERMSNorm",
            "rmsnorm by Transformer Engine's kernel, GPU",
            extra="transformer-engine",
        ),
        Entry(
            "te_layernorm",
            "megatron.model.norms.transformer_engine:TELayerNorm",
            "layernorm by Transformer Engine's kernel, GPU",
            extra="transformer-engine",
        ),
    ],
)

FIXED_SCORES = frozenset({"fixed scores"})
"""Marks positions that add to scores what no weight holds."""

POSITIONS = Family(
    "position scheme",
    "pos_emb",
    [
        Entry("learned", "megatron.model.positions.learned:LearnedPositions", "One learned vector a position"),
        Entry("rotary", "megatron.model.positions.rotary:Rotary", "Rotary positions, arXiv:2104.09864"),
        Entry(
            "sinusoidal",
            "megatron.model.positions.sinusoidal:SinusoidalPositions",
            "Fixed sines and cosines, arXiv:1706.03762",
        ),
        Entry("rpe", "megatron.model.positions.rpe:RelativePositions", "T5's relative positions, arXiv:1910.10683"),
        Entry(
            "alibi",
            "megatron.model.positions.alibi:Alibi",
            "Scores that fall with distance, arXiv:2108.12409",
            traits=FIXED_SCORES,
        ),
        Entry("none", "megatron.model.positions.none:NoPositions", "No position information besides the causal mask"),
    ],
)

ACTIVATIONS = Family(
    "activation",
    "activation",
    [
        Entry("gelu", "megatron.model.mlp.activations:gelu", "Gaussian error linear unit, arXiv:1606.08415"),
        Entry("gelu_tanh", "megatron.model.mlp.activations:gelu_tanh", "gelu by its tanh formula, as in GPT-2"),
        Entry("relu", "megatron.model.mlp.activations:relu", "Rectified linear unit"),
        Entry("silu", "megatron.model.mlp.activations:silu", "x * sigmoid(x), arXiv:1702.03118"),
        Entry("swish", "megatron.model.mlp.activations:silu", "Another name of silu, arXiv:1710.05941"),
        Entry("softsign", "megatron.model.mlp.activations:softsign", "x / (1 + |x|)"),
        Entry("mish", "megatron.model.mlp.activations:mish", "x * tanh(softplus(x)), arXiv:1908.08681"),
        Entry("swiglu", "megatron.model.mlp.activations:swiglu", "Gated by silu, arXiv:2002.05202", traits=GATED),
        Entry("geglu", "megatron.model.mlp.activations:geglu", "Gated by gelu, arXiv:2002.05202", traits=GATED),
        Entry("reglu", "megatron.model.mlp.activations:reglu", "Gated by relu, arXiv:2002.05202", traits=GATED),
        Entry("glu", "megatron.model.mlp.activations:glu", "Gated by sigmoid, arXiv:1612.08083", traits=GATED),
        Entry(
            "bilinear",
            "megatron.model.mlp.activations:bilinear",
            "Gated by the identity, arXiv:2002.05202",
            traits=GATED,
        ),
    ],
)

DENSE = "megatron.model.attention.dense:ParallelSelfAttention"
"""Attention of every kind that only hides keys."""

ATTENTION = Family(
    "attention kind",
    "attention_config",
    [
        Entry("global", DENSE, "Causal attention to all positions"),
        Entry("flash", "megatron.model.attention.dense:FlashSelfAttention", "The same by flash-attn, arXiv:2307.08691"),
        Entry("local", DENSE, "A window of blocks, arXiv:2004.05150"),
        Entry("sparse_fixed", DENSE, "The own window and the last block of each earlier one, arXiv:1904.10509"),
        Entry("sparse_variable", DENSE, "Windows of given sizes, global and random blocks, arXiv:1904.10509"),
        Entry("bigbird", DENSE, "A window of blocks, the first and random ones, arXiv:2007.14062"),
        Entry("bslongformer", DENSE, "A window of blocks and global ones, arXiv:2004.05150"),
        Entry(
            "mamba",
            "megatron.model.mixers.mamba:MambaTransformerBlock",
            "Selective state space, arXiv:2312.00752",
            traits=WHOLE_BLOCK,
        ),
        Entry(
            "rwkv", "megatron.model.mixers.rwkv:RWKVTransformerBlock", "RWKV-6, arXiv:2404.05892", traits=WHOLE_BLOCK
        ),
        Entry(
            "gmlp",
            "megatron.model.mixers.gmlp:GMLPTransformerBlock",
            "Gated MLP over positions, arXiv:2105.08050",
            traits=WHOLE_BLOCK,
        ),
        Entry(
            "amlp",
            "megatron.model.mixers.gmlp:GMLPTransformerBlock",
            "gmlp and a small attention, arXiv:2105.08050 section 4.3",
            traits=WHOLE_BLOCK,
        ),
    ],
)

WITHOUT_ATTENTION = frozenset(name for name in ATTENTION.names if ATTENTION.entry(name).traits & WHOLE_BLOCK)
"""The kinds of attention_config that are blocks of their own."""

MLPS = Family(
    "MLP",
    "moe_num_experts",
    [
        Entry("dense", "megatron.model.mlp.dense:ParallelMLP", "One MLP a block"),
        Entry("moe", "megatron.model.mlp.moe:MixtureMLP", "A mixture of experts, arXiv:1701.06538"),
    ],
)

ROUTERS = Family(
    "router",
    "moe_router_type",
    [
        Entry("sinkhorn", "megatron.model.mlp.router:sinkhorn", "Balanced assignment while training, arXiv:2103.16716"),
        Entry("topk", "megatron.model.mlp.router:topk", "The most probable experts, arXiv:1701.06538"),
    ],
)

INITS = Family(
    "initialisation",
    "init_method",
    [
        Entry("normal", "megatron.model.init:normal", "Normal, deviation init_method_std"),
        Entry("scaled_normal", "megatron.model.init:scaled_normal", "Normal, deviation init_method_std/sqrt(2 L)"),
        Entry("orthogonal", "megatron.model.init:orthogonal", "Orthogonal rows or columns, arXiv:1312.6120"),
        Entry("scaled_orthogonal", "megatron.model.init:scaled_orthogonal", "Orthogonal, over sqrt(2 L)"),
        Entry("xavier_uniform", "megatron.model.init:xavier_uniform", "Uniform by fan-in plus fan-out, Glorot 2010"),
        Entry("xavier_normal", "megatron.model.init:xavier_normal", "Normal by fan-in plus fan-out, Glorot 2010"),
        Entry("wang_init", "megatron.model.init:wang_init", "Normal, deviation 2/(L sqrt(h)), as GPT-J"),
        Entry("small_init", "megatron.model.init:small_init", "Normal, deviation sqrt(2/(5 h)), arXiv:1910.05895"),
        Entry(
            "single_residual_scaled_normal",
            "megatron.model.init:single_residual_scaled_normal",
            "Normal, deviation init_method_std/sqrt(L), for parallel residual blocks",
        ),
    ],
)

WHOLE = frozenset({"whole"})  # needs whole tensors, which ZeRO makes flat pieces of
PIECES = frozenset({"pieces"})  # whole tensors put together again from the pieces of ZeRO 1, in bfloat16
# Its step has a size of its own in every entry, whatever the gradient's size, or is as large as the gradient: muP has
# rules for both.
ENTRYWISE, PROPORTIONAL = frozenset({"entrywise"}), frozenset({"proportional"})
MOMENTS = ENTRYWISE | {"moments"}  # keeps the two moments of Adam, so that one can go on with the state of another
LOCAL = MOMENTS | {"local"}  # exchanges something else than gradients, which ZeRO sums itself
IN_MEMORY = MOMENTS | {"host"}  # updates parameters in the host's memory
ADAM = ("betas", "eps", "bias_correction", "adam_w_mode")
TORCH_ADAM = (*ADAM, "amsgrad")
ONE_BIT = ("betas", "eps", "freeze_step", "cuda_aware", "comm_backend_name")
SGD = ("momentum", "dampening", "nesterov")
SM3 = ("momentum", "beta", "eps")
ADAFACTOR = ("beta2_decay", "eps", "d")
MUON = ("momentum", "nesterov", "ns_steps", "adjust_lr_fn", "betas", "eps")


def _optimizer(
    name: str,
    target: str,
    doc: str,
    *settings: str,
    moments: float,
    traits: frozenset[str] = frozenset(),
    extra: str | None = None,
) -> Entry:
    return Entry(name, f"megatron.optim.{target}", doc, extra, traits, settings, moments)


OPTIMIZERS = Family(
    "optimizer",
    "optimizer",
    [
        _optimizer(
            "adam", "adam:build", "Adam, arXiv:1711.05101", *TORCH_ADAM, "torch_adam", moments=2, traits=MOMENTS
        ),
        _optimizer("cpu_adam", "cpu_adam:build", "Adam on the host, by DeepSpeed", *ADAM, moments=2, traits=IN_MEMORY),
        _optimizer(
            "cpu_torch_adam", "adam:build_on_cpu", "Adam in plain operations", *TORCH_ADAM, moments=2, traits=MOMENTS
        ),
        _optimizer("onebitadam", "onebit:build", "1-bit Adam, arXiv:2102.02888", *ONE_BIT, moments=3, traits=LOCAL),
        _optimizer("sgd", "sgd:build", "Descent with momentum", *SGD, moments=1, traits=PROPORTIONAL),
        _optimizer(
            "lion", "lion:build", "Lion, arXiv:2302.06675", "betas", moments=1, traits=ENTRYWISE, extra="optimizers"
        ),
        _optimizer(
            "madgrad_wd", "madgrad:build", "MADGRAD, arXiv:2101.11075", "momentum", "eps", moments=3, extra="optimizers"
        ),
        _optimizer("sm3", "sm3:build", "SM3, arXiv:1901.11150", *SM3, moments=1, traits=WHOLE, extra="optimizers"),
        _optimizer("adafactor", "adafactor:build", "Adafactor, arXiv:1804.04235", *ADAFACTOR, moments=0, traits=WHOLE),
        _optimizer("muon", "muon:build", "Muon, arXiv:2502.16982", *MUON, moments=2, traits=WHOLE | PIECES),
    ],
)

EIGHT_BIT = Family(
    "8-bit optimizer",
    "use_bnb_optimizer",
    [
        _optimizer("adam", "eight_bit:build_adam", "8-bit Adam", "betas", "eps", moments=0.5, extra="bitsandbytes"),
        _optimizer("lion", "eight_bit:build_lion", "8-bit Lion", "betas", moments=0.25, extra="bitsandbytes"),
        _optimizer(
            "sgd", "eight_bit:build_sgd", "8-bit descent", "momentum", "nesterov", moments=0.25, extra="bitsandbytes"
        ),
    ],
)

SCHEDULES = Family(
    "learning rate schedule",
    "lr_decay_style",
    [
        Entry("constant", "megatron.optim.schedule:constant", "The peak rate after warmup"),
        Entry("linear", "megatron.optim.schedule:linear", "Falls on a straight line to zero or min_lr"),
        Entry("cosine", "megatron.optim.schedule:cosine", "Falls on half a cosine to min_lr, arXiv:1608.03983"),
        Entry("exponential", "megatron.optim.schedule:exponential", "Halves over the horizon"),
        Entry("inverse_sqrt", "megatron.optim.schedule:inverse_sqrt", "Falls as 1/sqrt(step), arXiv:1706.03762"),
        Entry("wsd", "megatron.optim.schedule:wsd", "Stays at the peak, falls at the end, arXiv:2404.06395"),
    ],
)

TOKENIZERS = Family(
    "tokenizer",
    "tokenizer_type",
    [
        Entry("HFTokenizer", "megatron.tokenizers.huggingface:HFTokenizer", "A tokenizer.json file"),
        Entry("CharLevelTokenizer", "megatron.tokenizers.char_level:CharLevelTokenizer", "One token a byte"),
        Entry("GPT2BPETokenizer", "megatron.tokenizers.gpt2:GPT2BPETokenizer", "vocab.json and merges.txt of GPT-2"),
        Entry("HFGPT2Tokenizer", "megatron.tokenizers.pretrained:HFGPT2Tokenizer", "GPT-2's kin, folder or name"),
        Entry("PretrainedFromHF", "megatron.tokenizers.pretrained:PretrainedFromHF", "A pretrained model's tokenizer"),
        Entry(
            "TiktokenTokenizer",
            "megatron.tokenizers.tiktoken:TiktokenTokenizer",
            "A vocabulary of tiktoken, by name or from its file",
            extra="data",
        ),
        Entry(
            "SPMTokenizer",
            "megatron.tokenizers.sentence_piece:SPMTokenizer",
            "A sentencepiece .model",
            extra="sentencepiece",
        ),
        Entry(
            "BertWordPieceLowerCase", "megatron.tokenizers.bert:BertWordPieceLowerCase", "Word pieces, in lower case"
        ),
        Entry("BertWordPieceCase", "megatron.tokenizers.bert:BertWordPieceCase", "Word pieces, case kept"),
    ],
)

OBJECTIVES = Family(
    "objective",
    "train_impl",
    [Entry("normal", "megatron.objectives.language_model:LanguageModel", "Cross entropy of the next token")],
)

SINKS = Family(
    "metrics sink",
    "sinks",
    [
        Entry("jsonl", "megatron.observe.sinks.jsonl:JsonLines", "metrics.jsonl in the run directory"),
        Entry("tensorboard", "megatron.observe.sinks.tensorboard:TensorBoard", "Event files", extra="tensorboard"),
        Entry("wandb", "megatron.observe.sinks.wandb:WeightsAndBiases", "A Weights & Biases run", extra="wandb"),
        Entry("comet", "megatron.observe.sinks.comet:Comet", "A Comet experiment", extra="comet"),
    ],
)

TE_LAYERS = Family(
    "layer of Transformer Engine",
    "te_*",
    [
        Entry(name, f"megatron.model.transformer_engine:{function}", doc, extra="transformer-engine")
        for name, function, doc in (
            ("te_columnparallel", "columns", "Products of column-parallel layers, GPU"),
            ("te_rowparallel", "rows", "Products of row-parallel layers, GPU"),
            ("te_mha", "attention", "The attention core and the products beside it, GPU"),
            ("te_layernorm_mlp", "norm_mlp", "The norm before the MLP and the MLP in one layer, GPU"),
        )
    ],
)
