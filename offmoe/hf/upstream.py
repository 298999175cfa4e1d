"""The only module that imports transformers' semi-private interfaces.

offmoe builds on two of them: the registries of experts and attention implementations, and the renamings and conversions
by which the loader maps a checkpoint's tensor names to parameters. transformers does not promise that they are stable,
so importing this module fails with a message that names what a release lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import utils as generation

from offmoe.errors import ConfigError

TESTED_VERSIONS = "5.17 to 5.23"
PLAIN_NAME = re.compile(r"[\w.]*\.\*\.[\w.]+")
"""A pattern that is a plain name except for the expert's number."""

try:
    from transformers.cache_utils import get_layer_types_and_kwargs
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        ConversionOps,
        MergeModulelist,
        Transpose,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError as error:
    raise ConfigError(
        f"transformers {transformers.__version__} lacks something that offmoe builds on ({error}); "
        f"install a tested version: pip install 'transformers>=5.17,<5.24' (tested: {TESTED_VERSIONS})"
    ) from error

RAW_INPUTS: tuple[str, ...] = tuple(
    name
    for name in getattr(generation, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ("pixel_values", "input_features"))
    if name != "mm_encoder_outputs"
)
"""Arguments of `generate` that hold images and sounds which no encoder has seen yet. A prompt with one of them cannot
be divided. A release without this list refuses none of them by name."""

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_EXPERTS_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "Alternate",
    "Concatenate",
    "ConversionOps",
    "MergeModulelist",
    "Transpose",
    "WeightConverter",
]


class Alternate(ConversionOps):
    """Gate and up as columns in turn: two tensors [..., width, hidden] -> [..., hidden, 2 * width].

    Biases [..., width] become [..., 2 * width].
    """

    def __init__(self, *, transposed: bool) -> None:
        self.transposed = transposed

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        pair = [input_dict[pattern] for pattern in source_patterns]
        pair = [value[0] if isinstance(value, list) else value for value in pair]
        dim = pair[0].ndim - (2 if self.transposed else 1)
        out = torch.stack(pair, dim + 1).flatten(dim, dim + 1)  # [..., 2 * width, hidden] or [..., 2 * width]
        return {target_patterns[0]: out.mT.contiguous() if self.transposed else out}


class MappedName(NamedTuple):
    """A checkpoint's tensor and the parameter that is made from it."""

    name: str
    """The tensor's name in the checkpoint."""
    target: str
    """Full name of the parameter that the tensor becomes, or becomes a part of."""
    pattern: str | None
    """The source pattern of `converter` that matched; None without a converter."""
    converter: WeightConverter | None
    """The conversion that makes the parameter; None if the tensor is only renamed."""


def attention_name(config: PreTrainedConfig) -> str | None:
    """The implementation of attention that a configuration names. Reading the property takes 5 to 10 us."""
    found = vars(config).get("_attn_implementation_internal") or config._attn_implementation
    return None if found is None else str(found)


def plain_attention() -> tuple[type[nn.Module], ...]:
    """Attention modules that compute plain attention: grouped heads, rotated by halves, some with norms of heads or a
    window. Other families have copies of their code.
    """
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.mixtral.modeling_mixtral import MixtralAttention
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextAttention

    return LlamaAttention, MixtralAttention, Qwen3MoeAttention, Qwen3VLMoeTextAttention


def plain_layers() -> tuple[type[nn.Module], ...]:
    """Decoder layers that are a norm, attention, a norm and a block, with two residuals, by the names that both have.
    Other families have copies of their code.
    """
    from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

    return MixtralDecoderLayer, Qwen3MoeDecoderLayer


def plain_blocks() -> tuple[type[nn.Module], ...]:
    """Blocks that are a router and its experts, and nothing else."""
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    return MixtralSparseMoeBlock, Qwen3MoeSparseMoeBlock


def plain_routers() -> tuple[tuple[str, type[nn.Module]], ...]:
    """Routers whose choice is a softmax or a sigmoid of one product, and how they choose (`SELECTIONS` of
    hf/load/kernel_routers.py). Other families have copies of their code.
    """
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
    from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

    return (
        ("softmax", Qwen3MoeTopKRouter),
        ("softmax of the chosen", GptOssTopKRouter),
        ("softmax of the chosen", Qwen3VLMoeTextTopKRouter),
        ("softmax of the chosen, logits in float", GraniteMoeTopKRouter),
        ("softmax of the chosen, scores in float", MixtralTopKRouter),
        ("sigmoid in groups", DeepseekV3TopkRouter),
    )


def cache_layer_types(config: PreTrainedConfig) -> list[tuple[str, int | None]]:
    """How transformers caches each decoder layer of a text configuration.

    Returns:
        Per layer its type, such as "full_attention", and how many tokens it keeps; None: all, or a state only.
    """
    types, kwargs = get_layer_types_and_kwargs(config)
    # layer_types may name more layers than there are, after num_hidden_layers=2: transformers leaves them out as well.
    return [(kind, named.get("sliding_window")) for kind, named in zip(types, kwargs, strict=False)]


def map_names(
    model: PreTrainedModel, names: Iterable[str], converters: Sequence[WeightConverter] | None = None
) -> Iterator[MappedName]:
    """Map a checkpoint's tensor names to parameters, exactly as transformers' loader does.

    Args:
        model: the model, on any device.
        names: the checkpoint's tensor names.
        converters: used in place of those that transformers has for the model, and of its renamings.

    Returns:
        The names in the loader's order, on which grouped renamings depend. A target need not exist in the model.
    """
    transforms = get_model_conversion_mapping(model) if converters is None else converters
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    applied = [t for t in transforms if isinstance(t, WeightConverter)]
    converter_of = {pattern: converter for converter in applied for pattern in converter.source_patterns}
    prefix, parameters = model.base_model_prefix, model.state_dict()
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, applied, prefix, parameters)
        if target not in parameters and name in parameters:  # the name is the parameter's own already
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=parameters)
        yield MappedName(name, target, pattern, converter_of[pattern] if pattern is not None else None)


def steps(converter: WeightConverter) -> tuple[ConversionOps, ...] | None:
    """The operations of a converter; None if one does more than stack, join, alternate and transpose blocks."""
    known = all(type(op) in (Alternate, MergeModulelist, Concatenate, Transpose) for op in converter.operations)
    return tuple(converter.operations) if known else None


def expert_names(model: PreTrainedModel, parameter: str) -> tuple[str, ...] | None:
    """Names of the tensors from which transformers stacks a parameter of all experts.

    Args:
        model: the model, on any device.
        parameter: full name of a parameter that holds all experts.

    Returns:
        One name per equal block of an expert's rows, with "*" for the expert's number. None if transformers does not
        make the parameter from one set of tensors per expert.
    """
    for converter in get_model_conversion_mapping(model):
        if not isinstance(converter, WeightConverter) or len(converter.target_patterns) > 1:
            continue
        pattern, sources = converter.target_patterns[0], converter.source_patterns
        operations = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
        stacking = [(MergeModulelist, 0)] if len(sources) == 1 else [(MergeModulelist, 0), (Concatenate, 1)]
        if pattern in parameter and operations == stacking and all(PLAIN_NAME.fullmatch(source) for source in sources):
            return tuple(parameter.replace(pattern, source) for source in sources)
    return None


def run_converter(
    converter: WeightConverter,
    tensors: Mapping[str, Sequence[torch.Tensor]],
    target: str,
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, torch.Tensor]:
    """Run a converter's own operations on the tensors of some experts.

    Args:
        converter: the conversion.
        tensors: per source pattern, one tensor for each of these experts.
        target: full name of the first parameter that the converter makes.
        model: the model, on any device.
        shapes: by full parameter name, the shapes that operations see when they look up a parameter of `model`.

    Returns:
        The converted tensors by full parameter name.

    Raises:
        Exception: whatever the operations raise.
    """
    values: Mapping[str, torch.Tensor | list[torch.Tensor]] = {name: list(group) for name, group in tensors.items()}
    for op in converter.operations:
        values = op.convert(
            dict(values),
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=target,
            model=_ResizedModel(model, shapes),
            config=model.config,
            missing_keys=None,
        )
    before, _, after = next((target.partition(name) for name in values if name in target), ("", "", ""))
    return {before + name + after: v[0] if isinstance(v, list) else v for name, v in values.items()}


def known_splits() -> frozenset[str]:
    """Names of GGUF files for ways to split text before merges, as far as transformers knows them."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # a release that keeps them elsewhere; then every name is warned of
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)


class _ResizedModel:
    """A model in which some parameters seem to have other shapes: those of a few experts instead of all."""

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model, self._shapes = model, shapes

    def get_parameter(self, name: str) -> torch.Tensor:
        if name in self._shapes:
            return torch.empty(self._shapes[name], device="meta")
        return self._model.get_parameter(name)

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)
