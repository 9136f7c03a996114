"""Triton kernels of the ops of cpcompile/ops.py for CUDA. Nothing here is imported where Triton is not installed."""
