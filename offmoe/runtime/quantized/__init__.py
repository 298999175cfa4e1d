"""Quantised weights: what their bytes mean, format by format, and one expert decoded when it is computed with.

Codecs know one matrix; `ExpertDecoding` knows the parameters of an expert. Which codec a checkpoint needs is read off
its config and headers in offmoe/hf/quantization.py.
"""

from offmoe.runtime.quantized.blockwise import Blockwise4Bit
from offmoe.runtime.quantized.codec import Codec, Encoding, Spec
from offmoe.runtime.quantized.decoding import ExpertDecoding, Leaf
from offmoe.runtime.quantized.floats import Mxfp4, ScaledFloat
from offmoe.runtime.quantized.integers import Awq, Gptq, PackedInt
from offmoe.runtime.quantized.placing import RawSlot, raw_slot

__all__ = [
    "Awq",
    "Blockwise4Bit",
    "Codec",
    "Encoding",
    "ExpertDecoding",
    "Gptq",
    "Leaf",
    "Mxfp4",
    "PackedInt",
    "RawSlot",
    "ScaledFloat",
    "Spec",
    "raw_slot",
]
