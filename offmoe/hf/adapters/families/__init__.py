"""Architectures whose experts are outside transformers' registry, one small class each."""

from offmoe.hf.adapters.base import ExpertsAdapter
from offmoe.hf.adapters.families.separate import NllbMoe, SwitchTransformers
from offmoe.hf.adapters.families.stacked import Dbrx, JetMoe, Llama4, LongcatFlash, Step3p7

__all__ = ["FAMILIES"]

FAMILIES: tuple[ExpertsAdapter, ...] = (
    Llama4(),
    Dbrx(),
    JetMoe(),
    LongcatFlash(),
    Step3p7(),
    SwitchTransformers(),
    NllbMoe(),
)
