"""Expert feed-forward networks on a device; torch operators today, faster kernels beside them later."""

from offmoe.compute.kernels.torch_ffn import ExpertMath, GatedFFN, accumulate, combine, expert_ffn

__all__ = ["ExpertMath", "GatedFFN", "accumulate", "combine", "expert_ffn"]
