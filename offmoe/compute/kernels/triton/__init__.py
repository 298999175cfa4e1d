"""GPU kernels in Triton for experts that stand in slots. Its modules import Triton; `device.py` is the way in."""
