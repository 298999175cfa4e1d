"""Expert feed-forward networks: torch's operators, C kernels for CPUs, Triton kernels for GPUs."""
