"""Kernels in Triton for GPUs, one file beside each plain implementation in `megatron/kernels/`.

Importing one of these files needs the package triton. Tensors are computed in fp32 whatever their type is.
"""
