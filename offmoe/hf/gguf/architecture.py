"""How one architecture of llama.cpp becomes a model of transformers: its configuration, its names, its values.

An architecture is a table: which tensors of the file become which parameter, and what undoes the converter's change of
their values. A tensor that no rule names is refused, so nothing is left at random and nothing is dropped unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.hf.gguf.metadata import BLOCK, ComputesOtherwiseError, Metadata
from offmoe.hf.gguf.values import Undo
from offmoe.hf.upstream import Concatenate, WeightConverter

MAX_LAYERS = 10_000
"""A file with more decoder layers is damaged. The largest models have 126."""
SCALING_FACTORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Factors of the rotary embedding. They follow from the configuration."""
SOFTMAX, SIGMOID = 1, 2
"""expert_gating_func of routers that score an expert among all experts, or by itself."""
EXPERTS = "mlp.experts."
"""Where transformers keeps the experts of most families, below a decoder layer."""


class Rule(NamedTuple):
    """One parameter, and the tensors of a decoder layer (or of the model) that it is made of."""

    sources: tuple[str, ...]
    """The file's names, without "blk.N."."""
    target: str
    """The parameter's name below its decoder layer (or in the model)."""
    undo: Undo | None = None
    """Makes the parameter of the decoded sources; None: the one source as it is."""
    expert: bool = False
    """Whether the tensor holds the experts, one row for each."""


class Rebuilt(NamedTuple):
    """A tensor of the model under its full name, and where it comes from."""

    name: str
    sources: tuple[str, ...]
    undo: Undo | None
    expert: bool


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Args:
        model_types: model types of transformers that the files may be of.
        config: the configuration's values, "model_type" included, from the metadata.
        rules: the rules of a decoder layer, for a text configuration. If two rules have the same target, the first one
            whose sources are all present counts.
        converters: transformers' operations that make the experts' parameters out of the rules' targets.
        model: the rules of tensors outside the decoder layers.
        layers: where the model keeps its decoder layers.
    """

    model_types: tuple[str, ...]
    config: Callable[[Metadata], dict[str, Any]]
    rules: Callable[[PreTrainedConfig], Sequence[Rule]]
    converters: Callable[[], list[WeightConverter]]
    model: Callable[[], Sequence[Rule]]
    layers: str = "model.layers."

    def rebuilt(self, names: Iterable[str], config: PreTrainedConfig, layers: range, file: Path) -> list[Rebuilt]:
        """What every tensor of a file becomes.

        Args:
            names: the file's tensors.
            config: the model's text configuration.
            layers: the numbers of the decoder layers.
            file: the file's name for messages.

        Raises:
            UnsupportedModelError: a tensor that no rule names.
        """
        per_block: dict[str, set[str]] = {}
        for name in names:
            match = BLOCK.fullmatch(name)
            prefix, leaf = (f"blk.{match[1]}.", match[2]) if match else ("", name)
            if not match and leaf in SCALING_FACTORS:
                continue
            if match and int(match[1]) not in layers:
                raise UnsupportedModelError(
                    f"{file}: tensor {name!r} is of a layer that the configuration does not have; {OTHER_MODEL}"
                )
            per_block.setdefault(prefix, set()).add(leaf)
        rules, out = self.rules(config), []
        for prefix, leaves in per_block.items():
            target = f"{self.layers}{prefix[4:]}" if prefix else ""
            out += _apply(rules if prefix else self.model(), leaves, prefix, target, file)
        return out


OTHER_MODEL = "offmoe does not know this variant of the model: use its safetensors checkpoint"


def _apply(rules: Sequence[Rule], leaves: set[str], prefix: str, target: str, file: Path) -> list[Rebuilt]:
    """Apply the rules to the tensors of one block."""
    out: dict[str, Rebuilt] = {}
    rest = set(leaves)
    for rule in rules:
        if not leaves.issuperset(rule.sources):
            continue
        rest.difference_update(rule.sources)
        if rule.target not in out:
            sources = tuple(prefix + leaf for leaf in rule.sources)
            out[rule.target] = Rebuilt(target + rule.target, sources, rule.undo, rule.expert)
    if rest:
        raise UnsupportedModelError(f"{file}: tensor {prefix + min(rest)!r} is not known to offmoe; {OTHER_MODEL}")
    return list(out.values())


def plain(names: Mapping[str, str], endings: Sequence[str] = ("weight",)) -> list[Rule]:
    """Rules for tensors that are only renamed: the file's leaf -> the module, each with these endings."""
    return [Rule((f"{leaf}.{end}",), f"{module}.{end}") for leaf, module in names.items() for end in endings]


def common_model() -> list[Rule]:
    """The tensors outside the decoder layers of most families."""
    return plain({"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"})


ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
DENSE_FFN = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
ROUTER = {"ffn_gate_inp": "mlp.gate"}


def expert_rules(prefix: str = EXPERTS) -> list[Rule]:
    """The experts' matrices: gate and up apart, or one below the other (`--fuse-gate-up-exps` of the converter)."""
    names = {"gate": "gate_proj", "up": "up_proj", "gate_up": "gate_up_proj", "down": "down_proj"}
    return [Rule((f"ffn_{leaf}_exps.weight",), prefix + name, expert=True) for leaf, name in names.items()]


def gate_above_up() -> list[WeightConverter]:
    """Experts whose gate and up projections are one parameter, [experts, 2 * width, hidden]."""
    return [
        WeightConverter(
            source_patterns=["experts.gate_proj$", "experts.up_proj$"],
            target_patterns="experts.gate_up_proj",
            operations=[Concatenate(dim=1)],
        )
    ]


def common_config(metadata: Metadata) -> dict[str, Any]:
    """The values that nearly every architecture has."""
    heads = metadata.integer("attention.head_count")
    hidden = metadata.integer("embedding_length")
    values = {
        "num_hidden_layers": num_layers(metadata),
        "max_position_embeddings": metadata.integer("context_length"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "vocab_size": metadata.shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in metadata.shapes,
        "bos_token_id": metadata.token("bos"),
        "eos_token_id": end_tokens(metadata),
        "pad_token_id": metadata.token("padding"),
    }
    # The epsilon of layer norms: DBRX's is 1e-5 in transformers, others have none.
    metadata.ignore("vocab_size", "attention.value_length", "attention.layer_norm_epsilon")
    return values


def head_dim(metadata: Metadata) -> int:
    """Dimensions of an attention head."""
    heads = metadata.integer("attention.head_count")
    return metadata.integer("attention.key_length", metadata.integer("embedding_length") // max(1, heads))


def num_layers(metadata: Metadata) -> int:
    """Decoder layers, without those that predict further tokens: the file counts them, transformers has none.

    Raises:
        CheckpointError: no model has so many, or so few.
    """
    blocks, further = metadata.integer("block_count"), metadata.integer("nextn_predict_layers", 0)
    if not 0 < blocks - further <= MAX_LAYERS:
        raise CheckpointError(
            f"{metadata.file}: its metadata say {blocks} layers, {further} of them for further tokens; download it "
            "again"
        )
    return blocks - further


def end_tokens(metadata: Metadata) -> int | list[int] | None:
    """The tokens that end a text: the one that the file calls so, and those that end a turn or a message."""
    ids = [metadata.token(name) for name in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(token for token in ids if token is not None))
    return known[0] if len(known) == 1 else known or None


def is_sigmoid(metadata: Metadata, default: int) -> bool:
    """Whether routers score each expert by itself, in place of a softmax over all. default: of a file without the key.

    Raises:
        ComputesOtherwiseError: they do something else.
    """
    function = metadata.integer("expert_gating_func", default) or default
    if function not in (SOFTMAX, SIGMOID):
        raise ComputesOtherwiseError(
            f"{metadata.file}: its routers score experts by function {function}, which {metadata.architecture} of "
            "transformers does not have"
        )
    return function == SIGMOID


def demand_sigmoid(metadata: Metadata) -> None:
    """ComputesOtherwiseError if the routers of an architecture that scores each expert by itself do not."""
    if not is_sigmoid(metadata, SIGMOID):
        raise ComputesOtherwiseError(
            f"{metadata.file}: its routers take a softmax over all experts, which {metadata.architecture} of "
            "transformers does not; the file is damaged or of another model"
        )


def leading_dense(metadata: Metadata) -> int:
    """Decoder layers without experts before the first one with experts."""
    first = min(metadata.blocks_with("ffn_gate_inp.weight"), default=num_layers(metadata))
    return metadata.integer("leading_dense_block_count", first)


def expert_width(metadata: Metadata) -> int:
    """Width of one routed expert, from the tensor itself: [experts, hidden, width] of the down projection."""
    metadata.ignore("expert_feed_forward_length")
    return _first(metadata, "ffn_down_exps.weight")[-1]


def shared_width(metadata: Metadata) -> int:
    """Width of the shared expert, from the tensor itself; 0 without one."""
    metadata.ignore("expert_shared_feed_forward_length")
    blocks = metadata.blocks_with("ffn_down_shexp.weight")
    return metadata.shape(f"blk.{blocks[0]}.ffn_down_shexp.weight")[-1] if blocks else 0


def _first(metadata: Metadata, leaf: str) -> tuple[int, ...]:
    blocks = metadata.blocks_with(leaf)
    return metadata.shape(f"blk.{blocks[0] if blocks else 0}.{leaf}")
