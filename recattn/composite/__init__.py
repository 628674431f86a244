"""Each operator out of PyTorch's own kernels: the CPU path, and what no fused kernel covers."""
