"""The architecture: sizes, components of a block, and positions.

Widths are global, before tensor parallelism. `num_kv_heads`, `kv_channels`, `max_position_embeddings` and
`attention_config` are filled in by `megatron.config.derived` when the user leaves them out.
"""

from megatron.adapter_config import prompt_length
from megatron.config.derived.mlp_width import mlp_width
from megatron.config.field import Section, key
from megatron.config.types import Integers, Items, Table
from megatron.layer_types import LayerOptions, options_of_blocks
from megatron.registry import (
    ACTIVATIONS,
    ATTENTION,
    BIDIRECTIONAL,
    CAUSAL,
    CLASS_HEAD,
    GATED_DELTA_NET,
    LEARNABLE,
    LINEAR_HEAD,
    MASKED_HEAD,
    NORMS,
    OFF_BY_ONE,
    POSITIONS,
    RETRIEVAL_HEAD,
    VANILLA,
)


class ModelSection(Section):
    """Sizes and components of the transformer."""

    num_layers: int | None = key(None, "Number of transformer blocks.", unit="blocks")
    encoder_num_layers: int | None = key(
        None, "With train_impl t5: blocks of the encoder; num_layers is the sum of both.", unit="blocks"
    )
    decoder_num_layers: int | None = key(None, "With train_impl t5: blocks of the decoder.", unit="blocks")
    hidden_size: int | None = key(None, "Width of the residual stream.", unit="features")
    num_attention_heads: int | None = key(None, "Number of query heads in each block.", unit="heads")
    num_kv_heads: int | None = key(
        None, "Number of key and value heads; fewer than the query heads is grouped-query attention.", unit="heads"
    )
    kv_channels: int | None = key(
        None, "Width of one attention head; hidden_size / num_attention_heads when left out.", unit="features"
    )
    seq_length: int | None = key(
        None, "Tokens in one training sequence; max_position_embeddings when left out.", unit="tokens"
    )
    encoder_seq_length: int | None = key(
        None, "With train_impl t5: tokens that the encoder reads; seq_length is the sum of both.", unit="tokens"
    )
    decoder_seq_length: int | None = key(
        None, "With train_impl t5: tokens that the decoder reads and predicts.", unit="tokens"
    )
    max_position_embeddings: int | None = key(
        None, "Longest sequence the positions cover; seq_length when left out.", unit="tokens"
    )
    intermediate_size: int | None = key(
        None,
        "Base width of the MLP, 4 x hidden_size when left out. A gated activation uses a third of it as its inner "
        "width (two matrices of that width), rounded up to mlp_multiple_of.",
        unit="features",
    )
    expansion_factor: float | None = key(
        None, "Base width of the MLP as a multiple of hidden_size, instead of intermediate_size.", unit="ratio"
    )
    mlp_multiple_of: int = key(1, "The inner width of the MLP is rounded up to a multiple of this.", unit="features")
    activation: str = key("gelu", "Activation of the MLP; the gated ones use two input matrices.", choices=ACTIVATIONS)
    activation_func_clamp_value: float | None = key(
        None, "Bound of both halves in front of a gated activation, of the activated one from above only (GPT-OSS)."
    )
    glu_linear_offset: float = key(0.0, "Added to the plain half of a gated activation (GPT-OSS: 1).")
    norm: str = key("layernorm", "Normalisation before attention, before the MLP and at the end.", choices=NORMS)
    layernorm_epsilon: float = key(1.0e-5, "Added to the variance by layernorm.")
    rms_norm_epsilon: float = key(1.0e-8, "Added to the mean square by rmsnorm, and by the gated norm of mamba2.")
    scalenorm_epsilon: float = key(1.0e-8, "Smallest norm that scalenorm divides by.")
    norm_placement: str = key(
        "pre",
        "Where a block has its norms: pre, before attention and MLP; output, on what these give, before it is added to "
        "the residual (OLMo 2); sandwich, both (Gemma 2); post, on the residual after each addition, none being at the "
        "end (BERT).",
        choices=("pre", "output", "sandwich", "post"),
    )
    embedding_norm: bool = key(False, "Normalise the sum of the embeddings, as BERT does.")
    use_qk_layernorm: bool = key(False, "Normalise queries and keys of each head before their product.")
    qk_layernorm_across_heads: bool = key(
        False, "With use_qk_layernorm: one norm over the features of all heads together, as OLMo 2 has it."
    )
    attention_output_gate: bool = key(
        False,
        "Multiply what each attention head gives by a sigmoid of a projection of the block's normed input, before the "
        "output projection, as Qwen3-Next.",
    )
    value_residual: bool = key(
        False,
        "Mix the values of every block after the first with those of the first by two learned factors, "
        "arXiv:2410.17897.",
    )
    use_bias_in_norms: bool = key(True, "Give layernorm a bias as well as a weight.")
    use_bias_in_attn_linear: bool = key(True, "Give the attention projections a bias.")
    add_qkv_bias: bool | None = key(
        None, "Give the query, key and value projections a bias; as use_bias_in_attn_linear when left out."
    )
    use_bias_in_mlp: bool = key(True, "Give the MLP projections a bias.")
    gpt_j_residual: bool = key(False, "Run attention and MLP in parallel from the same residual, as GPT-J does.")
    gpt_j_tied: bool = key(False, "With gpt_j_residual: one norm feeds both attention and MLP.")
    no_weight_tying: bool = key(False, "Give the output layer its own matrix instead of the word embedding's.")
    attention_config: Items | None = key(
        None,
        "Kind of attention in each block: a list of [pattern, count] pairs such as [[[global, local], 6]], where "
        "count may be `all`, or one name a block. All blocks are global when left out.",
        choices=ATTENTION,
    )
    attention_mask: str | None = key(
        None,
        "Which tokens a token sees: causal, the earlier ones; bidirectional, all of its document, as in an encoder. "
        "Follows from train_impl.",
        choices=(CAUSAL, BIDIRECTIONAL),
    )
    sparsity_config: Table | None = key(None, "Block sizes and windows of the sparse attention kinds.")
    sliding_window_width: int | None = key(
        None, "Positions that each token attends to, itself included.", unit="tokens"
    )
    layer_types: Items | None = key(
        None,
        "Type of each block, by names of layer_type_options: a list of [pattern, count] pairs such as "
        "[[[sliding, sliding, full], 8]], where count may be `all`, or one name a block. Without it blocks are alike.",
    )
    layer_type_options: Table | None = key(
        None,
        "What the blocks of a type have in place of the model's values, by its name in layer_types: {sliding: "
        "{sliding_window_width: 512, rotary_emb_base: 10000, rope_scaling: null}, full: {rotary: false}}.",
    )
    softmax_scale: float | None = key(
        None, "Factor of attention scores; 1 / sqrt(width of a head) when left out (Gemma, Granite)."
    )
    attn_logit_softcapping: float | None = key(
        None, "Bound of attention scores: c tanh(score / c), arXiv:2408.00118 section 2."
    )
    softmax_type: str = key(
        VANILLA,
        "What the softmax of attention scores sums besides the keys: vanilla, nothing; off-by-one, exp(0); learnable, "
        "exp of a parameter of each head (the sinks of GPT-OSS).",
        choices=(VANILLA, OFF_BY_ONE, LEARNABLE),
    )
    final_logit_softcapping: float | None = key(None, "Bound of the output layer's logits: c tanh(logit / c).")
    scale_embeddings: bool = key(
        False, "Multiply word embeddings by sqrt(hidden_size), rounded to the model's type as Gemma does."
    )
    embedding_multiplier: float = key(1.0, "Factor of word embeddings (Granite).")
    residual_multiplier: float = key(1.0, "Factor of what attention and MLP add to the residual (Granite).")
    logit_scale: float = key(1.0, "Factor of the output layer's logits, before their bound (Cohere, Granite).")
    hidden_dropout: float = key(0.0, "Dropout on what each block adds to the residual.", unit="probability")
    attention_dropout: float = key(0.0, "Dropout on the attention probabilities.", unit="probability")
    apply_query_key_layer_scaling: bool = key(False, "Divide attention scores of block i by i and undo it in fp32.")
    pos_emb: str = key("learned", "How positions enter the model.", choices=POSITIONS)
    rotary_pct: float = key(1.0, "Part of each head's width that rotary positions turn.", unit="fraction")
    rotary_emb_base: int = key(10000, "Base of the rotary wavelengths.")
    multi_latent_attention: bool = key(
        False, "Keys and values of all heads come from one latent a token, which the cache holds, arXiv:2405.04434."
    )
    q_lora_rank: int | None = key(
        None,
        "Width of a latent of queries; they are projected from the hidden states when left out.",
        unit="features",
    )
    kv_lora_rank: int = key(512, "Width of the latent of keys and values.", unit="features")
    qk_head_dim: int = key(128, "Features of a query head without positions.", unit="features")
    qk_pos_emb_head_dim: int = key(
        64, "Rotated features of a query head, and of the one rotated key of a token.", unit="features"
    )
    v_head_dim: int = key(128, "Features of a value head.", unit="features")
    mtp_num_layers: int | None = key(
        None,
        "Modules behind the model that predict tokens after the next one in training, arXiv:2412.19437 section 2.2.",
        unit="modules",
    )
    mtp_loss_scaling_factor: float = key(0.1, "Weight of the mean of their losses.")
    rotary_save_freqs_buffer: bool = key(False, "Keep the rotary frequencies in checkpoints.")
    rope_scaling: Table | None = key(
        None,
        "Scaling of rotary positions for long contexts: {type: linear | dynamic | yarn | llama3, factor: ...}; "
        "of yarn mscale / mscale_all_dim is the factor of cosines and sines, and the second the root of that of scores "
        "with multi_latent_attention.",
    )
    rpe_num_buckets: int = key(32, "Buckets of relative distance for pos_emb rpe and relative.", unit="buckets")
    rpe_max_distance: int = key(128, "Distance from which on rpe and relative use their last bucket.", unit="tokens")
    opt_pos_emb_offset: int = key(0, "Rows skipped at the start of the learned positions, as OPT needs (2).")
    num_unique_layers: int | None = key(None, "Number of blocks with weights of their own when blocks share weights.")
    param_sharing_style: str = key("grouped", "How blocks share weights when num_unique_layers is set.")
    soft_prompt_tuning: Table | None = key(
        None,
        "Train only a soft prompt, vectors in front of the tokens: {num_tokens: 10, init_string: text whose embeddings "
        "are the first values, init_range: 0.5, enabled: true}, arXiv:2104.08691. It takes num_tokens of seq_length.",
    )
    lora: Table | None = key(
        None,
        "Train only LoRA adapters W + alpha / rank B A of frozen matrices: {rank: 8, alpha: rank unless given, "
        "dropout: 0, targets: [query_key_value, dense, dense_h_to_4h, dense_4h_to_h, in_proj, out_proj, time_mixing, "
        "channel_mixing, gmlp, experts] or all, which leaves experts out, the first unless given, "
        "modules_to_save: [embedding, head], matrices that are trained beside the adapters, none unless given, "
        "rslora: true for alpha / sqrt(rank), dora: true to train the norm of each row of W + alpha / rank B A too, "
        "arXiv:2402.09353, base: nf4, fp4 or int8 to store frozen matrices of blocks in 4 or 8 bits, "
        "arXiv:2305.14314}, arXiv:2106.09685.",
    )
    num_token_types: int | None = key(
        None,
        "Segments of a sample that have a learned vector each; 2 with bert_binary_head, else 0, when left out.",
        unit="types",
    )
    lm_head: str | None = key(
        None,
        "Layers before the output matrix: linear, none; masked, a dense layer, gelu and a norm, and a bias behind it, "
        "as in BERT; classification, a pooler and num_classes logits; retrieval, an embedding of the text and no "
        "logits. Follows from train_impl.",
        choices=(LINEAR_HEAD, MASKED_HEAD, CLASS_HEAD, RETRIEVAL_HEAD),
    )
    num_classes: int | None = key(
        None,
        "Logits of a classifier: one a label, or 1 for each answer of a multiple-choice task. Follows from task_labels "
        "and task_choices.",
        unit="classes",
    )
    retrieval_shared_encoder: bool = key(
        False, "Queries and passages have one encoder (train_impl ict or dpr), instead of one each."
    )
    retrieval_projection_size: int | None = key(
        None,
        "Width of an embedding, by a linear layer behind each encoder; the hidden size without that layer when left "
        "out.",
        unit="features",
    )
    bert_binary_head: bool | None = key(
        None,
        "Learn whether the two segments of a sample are in the right order, by a pooler and two logits, "
        "arXiv:1909.11942; on with train_impl bert when left out.",
    )
    retro_add_retriever: bool = key(
        False, "Attend to the neighbours of each chunk, retrieved from a database (Retro, arXiv:2112.04426)."
    )
    retro_chunk_length: int = key(64, "With retro_add_retriever: tokens of a chunk.", unit="tokens")
    retro_num_neighbors: int = key(2, "Neighbours that each chunk attends to.", unit="neighbours")
    retro_num_retrieved_chunks: int = key(
        2, "Chunks of a neighbour: the one that was found and those that follow it in its document.", unit="chunks"
    )
    retro_encoder_layers: int = key(2, "Blocks of the encoder of neighbours.", unit="blocks")
    retro_encoder_hidden_dropout: float = key(
        0.1, "Dropout of the encoder of neighbours on what attention and MLP add.", unit="probability"
    )
    retro_encoder_attention_dropout: float = key(
        0.1, "Dropout of the encoder of neighbours on its attention.", unit="probability"
    )
    retro_cross_attention_layers: Integers | None = key(
        None,
        "Blocks (from 0) that attend to neighbours; left out: every third from the 6th, or the 9th of more than 15, "
        "as in Megatron-LM.",
    )
    output_layer_parallelism: str = key(
        "column", "How tensor parallelism shards the output layer.", choices=("column",)
    )

    @property
    def text_length(self) -> int | None:
        """seq_length without the soft prompt [tokens]."""
        return None if self.seq_length is None else self.seq_length - prompt_length(self.soft_prompt_tuning)

    @property
    def longest_stack(self) -> int | None:
        """Most tokens that a stack of blocks reads: seq_length, or the longer one of encoder and decoder [tokens]."""
        if self.encoder_seq_length is None or self.decoder_seq_length is None or self.encoder_num_layers is None:
            return self.seq_length
        return max(self.encoder_seq_length, self.decoder_seq_length)

    @property
    def in_order(self) -> bool:
        """Whether some block processes the sequence in order, so that shards of it follow each other."""
        return bool({"mamba", "mamba2", "rwkv", GATED_DELTA_NET} & set(map(str, self.attention_config or ())))

    @property
    def block_options(self) -> tuple[LayerOptions, ...]:
        """What the blocks have of what layer_type_options may change, in order; needs the derived values."""
        return options_of_blocks(self)

    @property
    def mlp_width(self) -> int:
        """Inner width of the MLP [features]: inputs of linear2; a gated linear1 has twice as many outputs."""
        assert self.hidden_size is not None
        gated = ACTIVATIONS.entry(self.activation).gated
        return mlp_width(
            self.hidden_size, self.intermediate_size, self.expansion_factor, self.mlp_multiple_of, gated=gated
        )
