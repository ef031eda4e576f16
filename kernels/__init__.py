"""Triton kernels and their launchers: tensors that exist in, tensors that exist filled."""
