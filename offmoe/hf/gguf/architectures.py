"""The architectures of GGUF files that offmoe runs, by the name that the files give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedConfig

from offmoe.errors import UnsupportedModelError
from offmoe.hf.gguf.architecture import Architecture, Rebuilt, num_layers
from offmoe.hf.gguf.deepseek import DEEPSEEK, GLM4
from offmoe.hf.gguf.gpt_oss import GPT_OSS
from offmoe.hf.gguf.llama import GRANITE, LLAMA4, MIXTRAL
from offmoe.hf.gguf.metadata import BLOCK, Metadata
from offmoe.hf.gguf.others import DBRX, MINIMAX, OLMOE
from offmoe.hf.gguf.qwen import QWEN2, QWEN3
from offmoe.hf.gguf.qwen_hybrid import QWEN3_NEXT, QWEN35
from offmoe.storage.gguf_set import GgufSet

ARCHITECTURES: Mapping[str, Architecture] = {
    "dbrx": DBRX,
    "deepseek2": DEEPSEEK,
    "glm4moe": GLM4,
    "gpt-oss": GPT_OSS,
    "granitemoe": GRANITE,
    "llama": MIXTRAL,
    "llama4": LLAMA4,
    "minimax-m2": MINIMAX,
    "olmoe": OLMOE,
    "qwen2moe": QWEN2,
    "qwen35moe": QWEN35,
    "qwen3moe": QWEN3,
    "qwen3next": QWEN3_NEXT,
}
SINGLE_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
"""A tensor of one expert. Files from before April 2024 have them; llama.cpp stacks experts since."""


@dataclass(frozen=True)
class GgufModel:
    """A GGUF model that offmoe runs."""

    gguf: GgufSet
    how: Architecture

    @classmethod
    def of(cls, gguf: GgufSet) -> GgufModel:
        """The model in these files.

        Raises:
            UnsupportedModelError: offmoe does not run the architecture, or the model has no experts.
        """
        file, name = gguf.files[0], str(gguf.metadata["general.architecture"])
        single = next(filter(SINGLE_EXPERT.fullmatch, gguf.tensors), None)
        if single is not None:
            raise UnsupportedModelError(
                f"{file}: stores every expert by itself ({single!r}), as files from before April 2024 do; use a newer "
                "file of the model"
            )
        known = f"offmoe runs GGUF files of {', '.join(sorted(ARCHITECTURES))}"
        if not any("_exps." in tensor for tensor in gguf.tensors):
            raise UnsupportedModelError(
                f"{file}: a {name!r} model without experts; {known} that have experts, such as Mixtral or Qwen3-MoE"
            )
        if name not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{file}: the architecture {name!r} is not one that offmoe reads from GGUF; {known}. Use the model's "
                "safetensors checkpoint"
            )
        return cls(gguf, ARCHITECTURES[name])

    @cached_property
    def metadata(self) -> Metadata:
        return Metadata(self.gguf)

    def rebuilt(self, config: PreTrainedConfig) -> list[Rebuilt]:
        """What every tensor becomes; those of layers that only predict further tokens (MTP) are dropped.

        Args:
            config: the model's configuration.

        Raises:
            UnsupportedModelError: a tensor that no rule names.
        """
        text = config.get_text_config()
        dropped = range(num_layers(self.metadata), self.metadata.integer("block_count"))

        def is_kept(name: str) -> bool:
            match = BLOCK.fullmatch(name)
            return match is None or int(match[1]) not in dropped

        names = filter(is_kept, self.gguf.tensors)
        return self.how.rebuilt(names, text, range(text.num_hidden_layers), self.gguf.files[0])
