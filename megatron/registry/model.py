"""Components of a model: norms, position schemes, activations, attention kinds, MLPs, routers, initialisations."""

from __future__ import annotations

from megatron.registry.entry import ActivationEntry, Entry, NormEntry, PositionEntry, TensorSpec
from megatron.registry.registry import Registry

ONE_PLUS = frozenset({"one plus"})
"""Trait of a norm whose factor is 1 + its weight, which begins at 0."""

NORMS = Registry(
    "norm",
    "norm",
    [
        NormEntry(
            "layernorm",
            "megatron.model.norms.layernorm:LayerNorm",
            "Layer normalisation, arXiv:1607.06450",
            tensors=("weight", "bias"),
            optional=("bias",),
            in_transformer_engine=True,
            kernel="layer_norm",
        ),
        NormEntry(
            "rmsnorm",
            "megatron.model.norms.rmsnorm:RMSNorm",
            "Root mean square norm, arXiv:1910.07467",
            tensors=("scale",),
            epsilon="rms_norm_epsilon",
            in_transformer_engine=True,
            kernel="rms_norm",
        ),
        NormEntry(
            "rmsnorm_1p",
            "megatron.model.norms.one_plus:RMSNorm1P",
            "rmsnorm with the factor 1 + weight, as Gemma has it",
            tensors=("scale",),
            epsilon="rms_norm_epsilon",
            kernel="rms_norm",
            traits=ONE_PLUS,
        ),
        NormEntry(
            "layernorm_1p",
            "megatron.model.norms.one_plus:LayerNorm1P",
            "layernorm with the factor 1 + weight, as Nemotron has it",
            tensors=("weight", "bias"),
            optional=("bias",),
            kernel="layer_norm",
            traits=ONE_PLUS,
        ),
        NormEntry(
            "non_parametric_layernorm",
            "megatron.model.norms.non_parametric:NonParametricLayerNorm",
            "Layer normalisation without parameters, arXiv:2402.00838",
            tensors=(),
            kernel="layer_norm",
        ),
        NormEntry(
            "scalenorm",
            "megatron.model.norms.scalenorm:ScaleNorm",
            "One learned length, arXiv:1910.05895",
            tensors=(),
            scalars=("g",),
            epsilon="scalenorm_epsilon",
        ),
        NormEntry(
            "te_rmsnorm",
            "megatron.model.norms.transformer_engine:TERMSNorm",
            "rmsnorm by Transformer Engine's kernel, GPU",
            extra="transformer-engine",
            epsilon="rms_norm_epsilon",
            in_transformer_engine=True,
        ),
        NormEntry(
            "te_layernorm",
            "megatron.model.norms.transformer_engine:TELayerNorm",
            "layernorm by Transformer Engine's kernel, GPU",
            extra="transformer-engine",
            tensors=("weight", "bias"),
            in_transformer_engine=True,
        ),
    ],
)

LINEAR_BIAS = frozenset({"linear bias"})
"""Trait of a position scheme whose bias is a slope of each head times the distance, which kernels may compute."""

POSITIONS = Registry(
    "position scheme",
    "pos_emb",
    [
        PositionEntry(
            "learned",
            "megatron.model.positions.learned:LearnedPositions",
            "One learned vector a position",
            enters=frozenset({"embedding"}),
            embedding=(TensorSpec("weight", ("position_rows", "hidden_size")),),
            settings=("opt_pos_emb_offset",),
        ),
        PositionEntry(
            "rotary",
            "megatron.model.positions.rotary:Rotary",
            "Rotary positions, arXiv:2104.09864",
            enters=frozenset({"attention"}),
            settings=("rotary_pct", "rotary_emb_base", "rope_scaling"),
        ),
        PositionEntry(
            "sinusoidal",
            "megatron.model.positions.sinusoidal:SinusoidalPositions",
            "Fixed sines and cosines, arXiv:1706.03762",
            enters=frozenset({"embedding"}),
        ),
        PositionEntry(
            "rpe",
            "megatron.model.positions.rpe:RelativePositions",
            "T5's relative positions, arXiv:1910.10683",
            enters=frozenset({"scores"}),
            scores=(TensorSpec("weight", ("rpe_buckets", "num_attention_heads"), shard_dim=1),),
            settings=("rpe_num_buckets", "rpe_max_distance"),
        ),
        PositionEntry(
            "relative",
            "megatron.model.positions.relative:EncoderDecoderPositions",
            "T5's relative positions, a table for the encoder and one for the decoder",
            enters=frozenset({"scores"}),
            scores=(TensorSpec("weight", ("relative_rows", "num_attention_heads"), shard_dim=1),),
            settings=("rpe_num_buckets", "rpe_max_distance"),
        ),
        PositionEntry(
            "alibi",
            "megatron.model.positions.alibi:Alibi",
            "Scores that fall with distance, arXiv:2108.12409",
            enters=frozenset({"scores"}),
            traits=LINEAR_BIAS,
        ),
        PositionEntry(
            "none", "megatron.model.positions.none:NoPositions", "No position information besides the causal mask"
        ),
    ],
)

ACTIVATIONS = Registry(
    "activation",
    "activation",
    [
        ActivationEntry(
            "gelu",
            "megatron.model.mlp.activations:gelu",
            "Gaussian error linear unit, arXiv:1606.08415",
            in_transformer_engine="gelu",
        ),
        ActivationEntry(
            "gelu_tanh",
            "megatron.model.mlp.activations:gelu_tanh",
            "gelu by its tanh formula, as in GPT-2",
            in_transformer_engine="gelu",
        ),
        ActivationEntry(
            "quick_gelu",
            "megatron.model.mlp.activations:quick_gelu",
            "x * sigmoid(1.702 x), near gelu, as in CLIP",
            in_transformer_engine="qgelu",
        ),
        ActivationEntry(
            "relu", "megatron.model.mlp.activations:relu", "Rectified linear unit", in_transformer_engine="relu"
        ),
        ActivationEntry(
            "silu",
            "megatron.model.mlp.activations:silu",
            "x * sigmoid(x), arXiv:1702.03118",
            in_transformer_engine="silu",
        ),
        ActivationEntry(
            "swish",
            "megatron.model.mlp.activations:silu",
            "Another name of silu, arXiv:1710.05941",
            in_transformer_engine="silu",
        ),
        ActivationEntry(
            "squared_relu",
            "megatron.model.mlp.activations:squared_relu",
            "The square of relu, arXiv:2109.08668",
            in_transformer_engine="srelu",
        ),
        ActivationEntry("softsign", "megatron.model.mlp.activations:softsign", "x / (1 + |x|)"),
        ActivationEntry("mish", "megatron.model.mlp.activations:mish", "x * tanh(softplus(x)), arXiv:1908.08681"),
        ActivationEntry(
            "swiglu", "megatron.model.mlp.activations:swiglu", "Gated by silu, arXiv:2002.05202", gated=True
        ),
        ActivationEntry("geglu", "megatron.model.mlp.activations:geglu", "Gated by gelu, arXiv:2002.05202", gated=True),
        ActivationEntry(
            "geglu_tanh",
            "megatron.model.mlp.activations:geglu_tanh",
            "Gated by gelu's tanh formula, as in Gemma",
            gated=True,
        ),
        ActivationEntry(
            "quick_geglu",
            "megatron.model.mlp.activations:quick_geglu",
            "Gated by quick_gelu, as in GPT-OSS",
            gated=True,
        ),
        ActivationEntry("reglu", "megatron.model.mlp.activations:reglu", "Gated by relu, arXiv:2002.05202", gated=True),
        ActivationEntry("glu", "megatron.model.mlp.activations:glu", "Gated by sigmoid, arXiv:1612.08083", gated=True),
        ActivationEntry(
            "xielu",
            "megatron.model.mlp.xielu:xielu",
            "Square above 0, exponential below, both with a learned factor, arXiv:2411.13010",
            module="megatron.model.mlp.xielu:XIELU",
            parameters=("alpha_p", "alpha_n"),
        ),
        ActivationEntry(
            "bilinear",
            "megatron.model.mlp.activations:bilinear",
            "Gated by the identity, arXiv:2002.05202",
            gated=True,
        ),
    ],
)

VANILLA, OFF_BY_ONE, LEARNABLE = "vanilla", "off-by-one", "learnable"
"""Values of softmax_type: what the softmax of scores sums besides the keys."""
CAUSAL, BIDIRECTIONAL = "causal", "bidirectional"
"""Values of attention_mask: tokens see earlier ones, or all of their document."""
LINEAR_HEAD, MASKED_HEAD, CLASS_HEAD, RETRIEVAL_HEAD = "linear", "masked", "classification", "retrieval"
"""Values of lm_head: the output matrix, or the heads of a masked language model, a classifier, two encoders."""

STANDALONE_BLOCK = frozenset({"standalone block"})
"""Trait of a kind of attention_config that is a block of its own, without attention and MLP."""

REPLACES_ATTENTION = frozenset({"replaces attention"})
"""Trait of a kind of attention_config that has the norms and the MLP of any block, and no attention."""

GATED_DELTA_NET = "gated_delta_net"

DENSE = "megatron.model.attention.dense:ParallelSelfAttention"
"""Attention of every kind that is a mask."""

FULL_ATTENTION = frozenset({"full attention"})
"""Trait of a kind of attention_config that hides nothing besides what the causal mask and a sliding window hide."""

ATTENDS, FEEDS = frozenset({"attends alone"}), frozenset({"feeds alone"})
"""Traits of a kind of attention_config that is a block of attention alone, and of an MLP or experts alone."""

ATTENTION_ALONE, MLP_ALONE = "attention", "mlp"
"""The names of these kinds."""

ATTENTION = Registry(
    "attention kind",
    "attention_config",
    [
        Entry("global", DENSE, "Causal attention to all positions", traits=FULL_ATTENTION),
        Entry("flash", DENSE, "The same by flash-attn, arXiv:2307.08691", traits=FULL_ATTENTION),
        Entry("local", DENSE, "A window of blocks, arXiv:2004.05150"),
        Entry("sparse_fixed", DENSE, "The own window and the last block of each earlier one, arXiv:1904.10509"),
        Entry("sparse_variable", DENSE, "Windows of given sizes, global and random blocks, arXiv:1904.10509"),
        Entry("bigbird", DENSE, "A window of blocks, the first and random ones, arXiv:2007.14062"),
        Entry("bslongformer", DENSE, "A window of blocks and global ones, arXiv:2004.05150"),
        Entry(
            GATED_DELTA_NET,
            "megatron.model.mixers.gated_delta_net:GatedDeltaNet",
            "A corrected and decaying state in place of attention, arXiv:2412.06464",
            traits=REPLACES_ATTENTION,
        ),
        Entry(
            ATTENTION_ALONE,
            "megatron.model.sublayer_block:AttentionTransformerBlock",
            "global in a block without an MLP",
            traits=FULL_ATTENTION | ATTENDS,
        ),
        Entry(
            MLP_ALONE,
            "megatron.model.sublayer_block:MLPTransformerBlock",
            "An MLP or experts in a block without attention",
            traits=FEEDS,
        ),
        Entry(
            "mamba",
            "megatron.model.mixers.mamba:MambaTransformerBlock",
            "Selective state space, arXiv:2312.00752",
            traits=STANDALONE_BLOCK,
        ),
        Entry(
            "mamba2",
            "megatron.model.mixers.mamba2:Mamba2TransformerBlock",
            "Mamba-2, a state space with one decay a head, arXiv:2405.21060",
            traits=STANDALONE_BLOCK,
        ),
        Entry(
            "rwkv",
            "megatron.model.mixers.rwkv:RWKVTransformerBlock",
            "RWKV-6, arXiv:2404.05892",
            traits=STANDALONE_BLOCK,
        ),
        Entry(
            "gmlp",
            "megatron.model.mixers.gmlp:GMLPTransformerBlock",
            "Gated MLP over positions, arXiv:2105.08050",
            traits=STANDALONE_BLOCK,
        ),
        Entry(
            "amlp",
            "megatron.model.mixers.gmlp:GMLPTransformerBlock",
            "gmlp and a small attention, arXiv:2105.08050 section 4.3",
            traits=STANDALONE_BLOCK,
        ),
    ],
)

MIXER_BLOCKS = frozenset(entry.name for entry in ATTENTION.built_in if entry.traits & STANDALONE_BLOCK)
"""The kinds of attention_config that are blocks of their own, without the norms and the MLP of the others."""
WITHOUT_MLP = MIXER_BLOCKS | {ATTENTION_ALONE}
"""The kinds of attention_config without an MLP or experts as other blocks have them."""
REPLACING = frozenset(entry.name for entry in ATTENTION.built_in if entry.traits & REPLACES_ATTENTION)
"""The kinds of attention_config with an MLP, and another mixer in place of attention."""
WITH_OUT_PROJ = frozenset({"mamba", "mamba2"})
"""The kinds of attention_config whose mixer ends in a matrix `out_proj`."""
WITH_IN_PROJ = WITH_OUT_PROJ | {GATED_DELTA_NET}
"""The kinds of attention_config whose mixer begins with a matrix `in_proj`."""
GATED_MLPS = frozenset({"gmlp", "amlp"})
"""The kinds of attention_config that are an MLP with a gate over positions."""
WITHOUT_ATTENTION = MIXER_BLOCKS | REPLACING | {MLP_ALONE}
"""The kinds of attention_config without attention."""

MLPS = Registry(
    "MLP",
    "moe_num_experts",
    [
        Entry("dense", "megatron.model.mlp.dense:ParallelMLP", "One MLP a block"),
        Entry("moe", "megatron.model.moe.layer:MoELayer", "A mixture of experts, arXiv:1701.06538"),
    ],
)

BALANCES_ITSELF = frozenset({"balances itself"})
"""Trait of a router with scores and a balanced assignment of its own, which takes no options of scores."""

ROUTERS = Registry(
    "router",
    "moe_router_type",
    [
        Entry(
            "sinkhorn",
            "megatron.model.moe.router:sinkhorn",
            "Balanced assignment while training, arXiv:2103.16716",
            traits=BALANCES_ITSELF,
        ),
        Entry("topk", "megatron.model.moe.router:topk", "The most probable experts, arXiv:1701.06538"),
    ],
)

INITS = Registry(
    "initialisation",
    "init_method",
    [
        Entry("normal", "megatron.model.init:normal", "Normal, std init_method_std"),
        Entry("scaled_normal", "megatron.model.init:scaled_normal", "Normal, std init_method_std/sqrt(2 L)"),
        Entry("orthogonal", "megatron.model.init:orthogonal", "Orthogonal rows or columns, arXiv:1312.6120"),
        Entry("scaled_orthogonal", "megatron.model.init:scaled_orthogonal", "Orthogonal, over sqrt(2 L)"),
        Entry("xavier_uniform", "megatron.model.init:xavier_uniform", "Uniform by fan-in plus fan-out, Glorot 2010"),
        Entry("xavier_normal", "megatron.model.init:xavier_normal", "Normal by fan-in plus fan-out, Glorot 2010"),
        Entry("wang_init", "megatron.model.init:wang_init", "Normal, std 2/(L sqrt(h)), as GPT-J"),
        Entry("small_init", "megatron.model.init:small_init", "Normal, std sqrt(2/(5 h)), arXiv:1910.05895"),
        Entry(
            "single_residual_scaled_normal",
            "megatron.model.init:single_residual_scaled_normal",
            "Normal, std init_method_std/sqrt(L), for parallel residual blocks",
        ),
    ],
)

TE_LAYERS = Registry(
    "layer of Transformer Engine",
    "te_*",
    [
        Entry(name, f"megatron.model.transformer_engine:{function}", doc, extra="transformer-engine")
        for name, function, doc in (
            ("te_columnparallel", "columns", "Products of column-parallel layers, GPU"),
            ("te_rowparallel", "rows", "Products of row-parallel layers, GPU"),
            ("te_mha", "attention", "The attention core and the products beside it, GPU"),
            ("te_layernorm_mlp", "fused_norm_mlp", "The norm before the MLP and the MLP in one layer, GPU"),
        )
    ],
)
