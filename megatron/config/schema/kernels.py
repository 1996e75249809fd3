"""Fused kernels. A kernel never changes results beyond rounding, so an absent one is only slower."""

from megatron.config.field import Section, key


class KernelsSection(Section):
    """Fused kernels and compilation."""

    kernels: str = key(
        "auto",
        "Norms, activations, rotary positions, dropout, loss, experts, Muon: auto is fused on GPUs, torch elsewhere.",
        choices=("auto", "torch", "triton"),
    )
    compile: bool = key(False, "Compile blocks of attention and MLP with torch.compile.")
    scaled_upper_triang_masked_softmax_fusion: bool = key(
        False, "Compute attention of global blocks as product, fused scale, mask and softmax, product, on GPUs."
    )
    scaled_masked_softmax_fusion: bool = key(
        False, "The same; both keys fuse the causal mask and those of documents and windows."
    )
    bias_gelu_fusion: bool = key(False, "Fuse the MLP's bias and gelu.")
    bias_dropout_fusion: bool = key(False, "Fuse bias, dropout and the residual sum.")
    rope_fusion: bool = key(False, "Fuse the rotation of queries and keys.")
    layernorm_fusion: bool = key(False, "Use a fused layernorm kernel.")
    rmsnorm_fusion: bool = key(False, "Use a fused rmsnorm kernel.")
    use_flashattn_swiglu: bool = key(False, "Use the swiglu kernel of the flash-attn package.")
    use_apex_adam: bool = key(False, "Use the fused Adam of NVIDIA Apex for the optimizer adam on GPUs.")
    attention_softmax_in_fp32: bool = key(False, "Compute the attention softmax in fp32.")
    fp16_lm_cross_entropy: bool = key(False, "Compute the loss in fp16; only with fp16 training.")
    fused_linear_cross_entropy: bool = key(
        True, "Compute the output layer and the loss in blocks of tokens, so that no tensor of all logits exists."
    )
    fused_kernels_build_path: str | None = key(None, "Folder for compiled kernels.")
    mamba_selective_scan_fusion: bool = key(False, "Use the fused selective scan of the mamba-ssm package.")
    mamba_causal_conv_fusion: bool = key(False, "Use the fused kernel of the causal-conv1d package.")
    gated_delta_fusion: bool = key(
        False, "Use the fused gated delta rule of the flash-linear-attention package on GPUs."
    )
    mamba_inner_func_fusion: bool = key(False, "Use both fused kernels of a Mamba block.")
