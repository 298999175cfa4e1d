"""Quantized weights: what their bytes mean, format by format, and one expert decoded when it is computed with.

Codecs know one matrix; `ExpertDecoding` knows the parameters of an expert. Which codec a checkpoint needs is read off
its config and headers in offmoe/hf/catalog/quant_config.py.
"""

from offmoe.quant.bitsandbytes import Blockwise4Bit
from offmoe.quant.codec import Codec, Encoding, Spec
from offmoe.quant.decode import ExpertDecoding, Leaf
from offmoe.quant.float_formats import Mxfp4, ScaledFloat
from offmoe.quant.int_formats import Awq, Gptq, PackedInt
from offmoe.quant.raw_slot import RawSlot, raw_slot

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
