"""`offmoe inspect MODEL`: show what a model needs and what fits on this machine; loads no weights.

MODEL may also be a config.json, or a folder without weights. Sizes then follow from the shapes, and the output says so.
The last table ranks what would run here, or on the machine that --machine names. Its speeds are predicted.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.table import Table

from offmoe.cli import options
from offmoe.cli.choices import LIST, Ranking, add_machine, machine_for, show_machines
from offmoe.cli.model import survey_model
from offmoe.cli.output import Output, new_table
from offmoe.config import ON_MISS, OffloadConfig
from offmoe.errors import ConfigError
from offmoe.profile import Profile
from offmoe.simulate.expect import Expectation, expect
from offmoe.text import format_size, percent, plain, size_option, span

if TYPE_CHECKING:
    from offmoe.budget.inspect import Survey
    from offmoe.budget.memory_plan import MemoryPlan

Unpredictable = tuple[str | None, ...] | None
"""Per MoE layer, the reason why its experts cannot be predicted, or None if they can. None if only a run can tell."""
KNEE = 2
"""Slots per top_k at which hit rates stop rising steeply. With fewer, a layer evicts what its next token needs."""


CALIBRATE = "A closer prediction needs measured costs: offmoe calibrate MODEL -o FILE, then --profile FILE."
PREDICTED = ("tokens_per_s", "tokens_per_s_bound", "tokens_per_s_uniform", "on_miss")
"""Keys of the JSON object whose values are predicted and do not say so by their names."""
MISS_IN_WORDS = {
    "fetch": "every missed expert gets a slot",
    "cpu": "a missed expert gets a slot only while one is free",
    "auto": "a missed expert gets a slot if it is likelier to return than its victim",
}
"""What each value of on_miss does."""


def parser() -> options.Parser:
    parser = options.Parser(
        "inspect", "Show what a model needs and what fits on this machine, from its headers or its config.json alone."
    )
    options.add_loading(parser, required=False)
    options.add_cache(parser)
    add_machine(parser.add_argument_group("predicting"))
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    gc.disable()  # imports make no garbage, and collecting took a sixth of this command's time
    try:
        _run(args, out)
    finally:
        gc.enable()


def _run(args: argparse.Namespace, out: Output) -> None:
    if args.machine == LIST:
        show_machines(out)
        return
    if args.model is None:
        raise ConfigError("MODEL is missing; give a folder, a Hub id, a config.json, or 'demo'.")
    config = options.offload_config(args)
    machine = None if args.machine is None else machine_for(args.machine, config)
    survey = survey_model(args, config, machine)
    ranking = Ranking(args, config, survey, machine)
    unpredictable = survey.unpredictable()
    needs = _needs(args.model, survey, unpredictable)
    if survey.refusal is not None:
        out.result(needs, ranking.table(), *ranking.lines())
        out.json({**_facts(survey, unpredictable, None, {}), "plan": None, **ranking.to_dict()})
        raise ranking.instead_of(survey.refusal)
    speed, ways = _speeds(survey)
    out.result(needs, _fit(config, survey), _advice(config, survey), *_in_words(speed), *_ways_in_words(ways))
    out.result(ranking.table(), *ranking.lines())
    if speed is None and machine is None:
        out.result(CALIBRATE)
    out.json({**_facts(survey, unpredictable, speed, ways), "plan": survey.plan.to_dict(), **ranking.to_dict()})


def _facts(
    survey: Survey, unpredictable: Unpredictable, speed: Expectation | None, ways: Mapping[str, Expectation]
) -> dict[str, object]:
    shape = survey.shape
    kernel_layers, without_kernels = _kernels(survey) or (None, [])
    facts = {
        "family": survey.hf_config.model_type,
        "architecture": survey.model_class.__name__,
        "layers": _layers(survey),
        "moe_layers": shape.layers,
        "experts": plain(shape.experts),
        "top_k": plain(shape.top_k),
        "parameters": survey.needs.parameters.total,
        "dense_parameters": survey.needs.parameters.dense,
        "quantisation": survey.quantization,
        "expert_formats": _formats(survey),
        "expert_bytes": plain(shape.expert_bytes),
        "expert_bytes_total": survey.expert_bytes,
        "dense_bytes": survey.plan.dense + survey.plan.offloaded,
        "smallest_device_memory": survey.plan.smallest,
        "smallest_with_dense": survey.plan.smallest_dense,
        "device": survey.config.device,
        "dtype": str(survey.dtype).removeprefix("torch."),
        "predictable": None if unpredictable is None else [reason is None for reason in unpredictable],
        "exactness": survey.config.exactness,
        "kernel_layers": kernel_layers,
        "without_kernels": without_kernels,
        "source": "config" if survey.catalog is None else "headers",
        "shards": _shards(survey),
        "tokens_per_s": None if speed is None else speed.likely,
        "on_miss": {how: {"tokens_per_s": e.uniform, "roofline": e.roofline} for how, e in ways.items()},
    }
    if speed is not None:
        facts |= {"tokens_per_s_bound": speed.bound, "tokens_per_s_uniform": speed.uniform}
    return {**facts, "predicted": [name for name in PREDICTED if facts.get(name)]}


def _formats(survey: Survey) -> list[str]:
    """The formats that quantized experts are stored in; a configuration alone does not tell."""
    return [] if survey.catalog is None else list(survey.catalog.formats)


def _kernels(survey: Survey) -> tuple[int, list[str]] | None:
    """In how many MoE layers the CPU's kernels compute, and why not in the others; None if not asked or not known."""
    catalog = survey.catalog
    if survey.config.exactness == "bitwise" or catalog is None:
        return None
    reasons = dict.fromkeys(layer.without_kernel for layer in catalog.layers if layer.without_kernel)
    return sum(layer.cpu_slot is not None for layer in catalog.layers), list(reasons)


def _computed(survey: Survey) -> str:
    if survey.quantization == "gguf" and not str(survey.config.device).startswith("cpu"):
        exact = ", bit for bit as transformers does" if survey.config.exactness == "bitwise" else ""
        return f"by torch on decoded blocks{exact}; a GPU has no kernels for GGUF yet"
    if survey.config.exactness == "bitwise":
        return "as transformers does, bit for bit"
    kernels = _kernels(survey)
    if kernels is None:
        return "by kernels where there are any, sums in another order"
    (number, reasons), layers = kernels, survey.shape.layers
    if number == layers:
        return f"by the CPU's kernels, {survey.config.activations} activations, sums in another order"
    because = f" ({', '.join(reasons)})" if reasons else ""
    by_torch = f"by torch on decoded weights{because}"
    return by_torch if number == 0 else f"by the CPU's kernels in {number} of {layers} layers; else {by_torch}"


def _speeds(survey: Survey) -> tuple[Expectation | None, dict[str, Expectation]]:
    """The expected speed at the profile's costs, and that of each on_miss that this device allows, with the same slots.

    None and {} without costs. {} also if every expert has a slot, so that none is missed twice.
    """
    profile, numeric = survey.config.profile, survey.config.exactness != "bitwise"
    if not isinstance(profile, Profile) or profile.costs is None:
        return None, {}
    # The routing is synthetic, so there are no predictions that a prefetch could act on.
    cache = replace(survey.config.cache(), prefetch=0)
    speed = expect(survey.shape, cache, profile)
    if survey.plan.slots_per_layer == survey.shape.experts:
        return speed, {}
    own_memory = not survey.backend.unified_memory
    costs = profile.costs.miss_costs(max(survey.shape.expert_bytes)) if own_memory and numeric else None
    allowed = ON_MISS if numeric or not own_memory else ("fetch",)
    ways = {how: expect(survey.shape, replace(cache, on_miss=how, miss_costs=costs), profile) for how in allowed}
    if not own_memory and cache.scope == "layer":
        ways["auto"] = ways["fetch"]
    return speed, ways


def _ways_in_words(ways: Mapping[str, Expectation]) -> list[str]:
    each = [f"{how} {e.uniform:.1f} ({percent(e.uniform / e.roofline)} of {e.roofline:.1f})" for how, e in ways.items()]
    what = "Predicted by what a miss gets (--on-miss), of what the busiest of disk, link and computing allows"
    return [f"{what}: {', '.join(each)}."] if ways else []


def _in_words(speed: Expectation | None) -> list[str]:
    if speed is None:
        return []
    tuned = ""
    if speed.tuned is not None and speed.tuned_hit_rate is not None:
        tuned = f"about {speed.tuned:.1f} at the profile's hit rate of {percent(speed.tuned_hit_rate)}; "
    return [
        f"Predicted tokens/s at the profile's costs: {tuned}{speed.uniform:.1f} if every expert were equally likely "
        f"(hit rate {percent(speed.uniform_hit_rate)}), {speed.bound:.1f} at most, with nothing missed."
    ]


def _packed(survey: Survey) -> str:
    """In what other form than the dtype to compute in some dense weights are."""
    if survey.config.dense != "native":
        return f" and {survey.config.dense}"
    return " and as stored" if survey.catalog is not None and survey.catalog.stored else ""


def _needs(name: str, survey: Survey, unpredictable: Unpredictable) -> Table:
    shape, dtype = survey.shape, str(survey.dtype).removeprefix("torch.")
    dense = survey.plan.dense + survey.plan.offloaded
    share = percent(survey.expert_bytes / (survey.expert_bytes + dense))
    table = new_table(f"{name}: what it is")
    table.add_row("architecture", f"{survey.model_class.__name__} ({survey.hf_config.model_type})")
    table.add_row("layers", f"{_layers(survey)}, of which {shape.layers} have experts")
    counts = survey.needs.parameters
    table.add_row("parameters", f"{_billions(counts.total)}, of which {_billions(counts.dense)} not of routed experts")
    table.add_row("experts per layer", f"{span(shape.experts)}, top_k {span(shape.top_k)}")
    formats = " and ".join(_formats(survey)) or survey.quantization
    stored = f", {formats}" if formats else ""
    table.add_row("one expert", f"{format_size(max(shape.expert_bytes))} ({max(shape.expert_bytes)} bytes){stored}")
    table.add_row("all experts", f"{format_size(survey.expert_bytes)} in {sum(shape.experts)}, {share} of the model")
    table.add_row("dense part", f"{format_size(dense)} in {dtype}{_packed(survey)}, needed for every token")
    table.add_row("experts ahead", _predictable(unpredictable))
    from offmoe.storage.open_shards import most_open

    shards, at_once = _shards(survey), most_open()
    if shards is not None and shards > at_once:
        table.add_row("shards", f"{shards:,} files, of which at most {at_once} are open at a time")
    if survey.catalog is None:
        table.add_row("known from", f"{survey.folder.name} alone: no weights here, sizes follow from shapes and dtype")
    return table


def _shards(survey: Survey) -> int | None:
    """The number of files that hold the weights; a configuration alone does not tell."""
    return None if survey.catalog is None else len(survey.catalog.view.checkpoint.shards)


def _predictable(unpredictable: Unpredictable) -> str:
    if unpredictable is None:
        return "whether they can be predicted shows when the model runs"
    reasons = dict.fromkeys(reason for reason in unpredictable if reason)
    number = sum(reason is None for reason in unpredictable)
    if not reasons:
        return "can be predicted in all layers"
    return f"can be predicted in {number} of {len(unpredictable)} layers; else {', '.join(reasons)}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _fit(config: OffloadConfig, survey: Survey) -> Table:
    plan, shape = survey.plan, survey.shape
    resident = percent(sum(plan.slots_per_layer) / sum(shape.experts))
    source = "free here, less a reserve" if config.device_memory == "auto" else "--device-memory"
    table = new_table(f"what fits on {survey.config.device}")
    offloaded = f"{plan.offloaded_layers} of {_layers(survey)} layers, from {plan.offloaded_in} in every pass"
    for name, size, note in (
        ("budget", plan.budget, source),
        ("dense part", plan.dense, "what stays" if plan.offloaded_layers else ""),
        ("dense, elsewhere", plan.offloaded if plan.offloaded_layers else None, offloaded),
        ("a dense layer", plan.in_flight if plan.offloaded_layers else None, "in flight"),
        ("expert slots", plan.slots, f"{_slots(plan)}, {resident} resident"),
        ("KV cache", plan.kv, f"{plan.max_context} tokens of context"),
        ("scratch", plan.scratch or None, "experts that are computed without a slot"),
        ("staging", plan.staging or None, "reads on their way"),
        ("workspace", plan.workspace, "activations, logits"),
    ):
        if size is not None:
            table.add_row(name, format_size(size), note)
    table.add_row("experts", survey.config.exactness, f"computed {_computed(survey)}")
    if plan.slots_per_layer != shape.experts:
        resolved = "" if survey.config.on_miss == config.on_miss else f" (what {config.on_miss!r} means here)"
        table.add_row("on a miss", survey.config.on_miss, MISS_IN_WORDS[survey.config.on_miss] + resolved)
    if plan.reason:
        table.add_row("slots are", "shared" if plan.scope == "model" else "each layer's", plan.reason)
    slots = "2 slots in all" if config.scope in ("auto", "model") else "a slot in each layer"
    if plan.smallest < plan.smallest_dense:
        table.add_row("smallest, all dense", format_size(plan.smallest_dense), f"{slots} ({plan.smallest_dense} bytes)")
        slots += ", dense layers elsewhere"
    table.add_row("smallest budget", format_size(plan.smallest), f"{slots} ({plan.smallest} bytes)")
    return table


def _slots(plan: MemoryPlan) -> str:
    """The number of slots in words."""
    if plan.scope == "model":
        return f"{sum(plan.slots_per_layer)} in one pool"
    return f"{span(plan.slots_per_layer)} per layer"


def _advice(config: OffloadConfig, survey: Survey) -> str:
    """What to change for a better hit rate."""
    plan, shape = survey.plan, survey.shape
    knee = tuple(min(KNEE * k, e) for k, e in zip(shape.top_k, shape.experts, strict=True))
    where = f"the knee of {KNEE} x top_k = {span(knee)} slots per layer"
    if config.slots_per_layer is None:  # device memory that holds the plan's context, all dense layers and these slots
        slots = sum(n * expert.slot for n, expert in zip(knee, survey.needs.experts, strict=True))
        others = plan.used - plan.slots - plan.in_flight + plan.offloaded
        if "on_miss" not in survey.requested.explicit:  # at the knee every miss gets a slot
            others -= plan.scratch
        to_it = f"--device-memory {size_option(others + slots)} --max-context {plan.max_context}"
    else:
        to_it = f"--slots-per-layer {','.join(map(str, sorted(set(knee)) if len(set(knee)) == 1 else knee))}"
    if plan.slots_per_layer == shape.experts:
        return f"Every expert has a slot, so none is read twice. With {to_it} the model would be just at {where}."
    if all(n >= m for n, m in zip(plan.slots_per_layer, knee, strict=True)):
        return f"At or above {where}: more slots help gradually; {to_it} would just reach it."
    return f"Below {where}, where hit rates fall steeply; use {to_it} if the device can."


def _layers(survey: Survey) -> int:
    from offmoe.budget.needs import num_layers

    return num_layers(survey.hf_config)
