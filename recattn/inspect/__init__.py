"""What kernels compile to, for GPUs that need not be there: the machinery of `recattn inspect`."""
