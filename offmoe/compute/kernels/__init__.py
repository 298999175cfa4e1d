"""Expert feed-forward networks: torch's operators, C kernels for CPUs, Triton kernels for GPUs."""

from offmoe.compute.kernels.torch_ffn import ExpertMath, GatedFFN, accumulate, combine, expert_ffn

__all__ = ["ExpertMath", "GatedFFN", "accumulate", "combine", "expert_ffn"]
