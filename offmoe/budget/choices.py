"""The ways in which a model could run on a device: forms of its experts and contexts, planned, predicted and ranked.

Nothing is loaded, quantized or downloaded. Every way is planned by `divide`, as loading would do it, so its bytes are
those of a run. Its speed is predicted (predict.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from offmoe.budget.estimate import with_format
from offmoe.budget.inspect import Inspected, Survey
from offmoe.budget.memory_plan import MemoryPlan
from offmoe.budget.needs import ModelNeeds, catalog_needs, num_layers
from offmoe.budget.predict import ExpertForm, Prediction, Rates, predict, scaled
from offmoe.budget.resolve import divide_or_refusal
from offmoe.budget.scope import recorded_hit_rates
from offmoe.compute.kernels.library import status
from offmoe.config import OffloadConfig
from offmoe.device.planned import PlannedBackend
from offmoe.errors import CapacityError, ConfigError, UnsupportedModelError
from offmoe.hf.adapters.find import expert_parameters, find_experts, require_adapter
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.catalog.catalog import ExpertCatalog
from offmoe.hf.upstream import expert_names
from offmoe.pack.on_load import with_experts
from offmoe.pack.pack import weight_format
from offmoe.pack.plan import check_packable
from offmoe.profile import CostModel, Profile
from offmoe.simulate.expect import tuned_hit_rate
from offmoe.types import CacheShape

CONTEXTS = (4096, 32768)
"""Tokens of context that ways are planned for if max_context is not set: a chat, and a long document."""
SAME_SPEED = 1.05
"""Speeds up to this ratio count as equal."""
QUALITY = {
    "bitwise": "equal to transformers, bit for bit",
    "numeric": "same weights, sums in another order",
    "int8": "perplexity +0.03 % (demo model)",
    "int4": "perplexity +0.75 % (demo model)",
}
"""What a way does to the results, by its form, from least to most. The figures are those of docs/measurements.md,
"Quality of int4 and int8"."""
CostsOf = Callable[[ExpertForm, str], CostModel | None]
"""(form, exactness) -> its costs; None if they are not known."""


@dataclass(frozen=True)
class Choice:
    """One way to run a model.

    Args:
        experts: form of the experts: "native", "int8" or "int4".
        options: options of `OffloadConfig` that make this way, besides those that were asked for.
        config: all options, resolved.
        plan: the division of memory; for a device that is large enough if there is a refusal.
        refusal: why it does not fit; None if it does.
        resident: share of the experts that have a slot.
        predicted: its speed; None if it does not fit, or if no costs are known.
        shape: experts, top_k and bytes of each MoE layer in this way.
        form: what its time depends on, besides the machine.
        dropped: options that were asked for and that this way gives up.
    """

    experts: str
    options: dict[str, str | int]
    config: OffloadConfig
    plan: MemoryPlan
    refusal: CapacityError | None
    resident: float
    predicted: Prediction | None
    shape: CacheShape
    form: ExpertForm
    dropped: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.refusal is None

    @property
    def unchanged(self) -> bool:
        """Whether results are those of stock transformers, bit for bit."""
        return self.config.exactness == "bitwise"

    @property
    def quality(self) -> str:
        """What this way does to the results, in words."""
        return QUALITY[self._form]

    @property
    def change(self) -> int:
        """How much this way changes results, as a rank: 0 for not at all."""
        return list(QUALITY).index(self._form)

    @property
    def _form(self) -> str:
        return self.config.exactness if self.experts == "native" else self.experts

    @property
    def tokens_per_s(self) -> float:
        """The predicted speed; 0.0 without one."""
        return 0.0 if self.predicted is None else self.predicted.tokens_per_s


def choices(survey: Survey, asked: OffloadConfig, costs_of: CostsOf | None) -> list[Choice]:
    """All ways that the options leave open, the best first; those that do not fit come last, the nearest first.

    Args:
        survey: the model and the device.
        asked: the options as they were given. What they fix is not varied.
        costs_of: the costs of each form; None: no speed is predicted.
    """
    limit = survey.needs.bytes.context_limit
    contexts = sorted({min(tokens, limit) for tokens in CONTEXTS}) if asked.max_context is None else [asked.max_context]
    found = []
    for options, needs, form in _forms(survey, asked):
        for context in contexts:
            more = options if asked.max_context is not None else options | {"max_context": context}
            choice = plan_choice(survey, asked, more, needs, form, costs_of)
            if choice is not None:
                found.append(choice)
    return _ranked(found)


def in_default_context(survey: Survey, asked: OffloadConfig, costs_of: CostsOf | None) -> list[Choice]:
    """As `choices`, each form with the context that is reserved if max_context is not set."""
    ways = [
        plan_choice(survey, asked, options, needs, form, costs_of) for options, needs, form in _forms(survey, asked)
    ]
    return _ranked([way for way in ways if way is not None])


def _ranked(ways: list[Choice]) -> list[Choice]:
    """The ways, the best first.

    Speeds within SAME_SPEED of the fastest that is left count as equal, since no prediction is better than that. Among
    them, what changes results least wins, then the longer context.
    """
    fast = sorted((way for way in ways if way.fits), key=lambda way: -way.tokens_per_s)
    out: list[Choice] = []
    while fast:
        equal = [way for way in fast if way.tokens_per_s * SAME_SPEED >= fast[0].tokens_per_s]
        out += sorted(equal, key=lambda way: (way.change, -way.plan.max_context, -way.resident))
        fast = fast[len(equal) :]
    needing = [way for way in ways if not way.fits]
    return out + sorted(needing, key=lambda way: (way.plan.smallest, way.change))


def plan_choice(
    survey: Survey,
    asked: OffloadConfig,
    options: dict[str, str | int],
    needs: ModelNeeds,
    form: ExpertForm,
    costs_of: CostsOf | None,
) -> Choice | None:
    """Plan one way. None if the device cannot honor the options in this form."""
    config = asked.overridden(**options)
    if config.exactness == "auto" and _is_decided(survey, config):
        config = config.resolved(exactness="numeric")
    try:
        resolved, plan, refusal = divide_or_refusal(config, needs, survey.backend, survey.free)
    except (ConfigError, CapacityError):
        return None
    predicted = None
    if refusal is None and costs_of is not None:
        costs = costs_of(form, resolved.exactness)
        if costs is not None:
            hit_rate = _recorded_hit_rate(asked, resolved, needs.shape)
            predicted = predict(needs.shape, resolved, plan, costs, hit_rate=hit_rate)
    resident = sum(plan.slots_per_layer) / needs.shape.num_keys
    return Choice(config.experts, options, resolved, plan, refusal, resident, predicted, needs.shape, form)


def _recorded_hit_rate(asked: OffloadConfig, config: OffloadConfig, shape: CacheShape) -> float | None:
    """The hit rate that the profile's trace has with this cache; None if no profile tells.

    A profile that was tuned for these slots knows it exactly, else its curve over the number of slots does.
    """
    if not isinstance(asked.profile, Profile):
        return None
    cache = config.cache()
    tuned = tuned_hit_rate(shape, cache, asked.profile)
    rates = recorded_hit_rates(asked, shape)
    if tuned is not None or rates is None:
        return tuned
    return float(np.interp(sum(cache.quotas(shape)), *rates[config.scope]))


def _forms(survey: Survey, asked: OffloadConfig) -> Iterator[tuple[dict[str, str | int], ModelNeeds, ExpertForm]]:
    """(options, needs, form) of every form of the experts that the options leave open, as they were asked for first."""
    yield {}, survey.needs, _form(survey, survey.needs, survey.config.experts, survey.config.is_numeric, survey)
    if "experts" in asked.explicit:
        return
    if "exactness" not in asked.explicit and _is_decided(survey, survey.config):
        stock = _without_kernels(survey)
        yield {"exactness": "bitwise"}, stock.needs, _form(survey, stock.needs, "native", False, stock)
    if "exactness" not in asked.explicit and survey.config.exactness == "bitwise":
        numeric = _for_kernels(survey)
        form = _form(survey, numeric.needs, "native", True, numeric)
        if form.by_kernels:
            yield {"exactness": "numeric"}, numeric.needs, form
    if asked.exactness == "bitwise":
        return
    for experts in ("int8", "int4"):
        if _can_quantize(survey, experts):
            config = with_experts(survey.hf_config, experts)
            unified = survey.backend.unified_memory
            needs = with_format(survey.needs, survey.meta, config, survey.stored, unified_memory=unified)
            yield {"experts": experts}, needs, _form(survey, needs, experts, True, survey)


def _is_decided(survey: Survey, config: OffloadConfig) -> bool:
    """Whether exactness="auto" is numeric with these options because of how the checkpoint's experts are stored."""
    return survey.requested.is_numeric and config.experts == config.dense == "native"


def _without_kernels(survey: Survey) -> Survey:
    """The same checkpoint with slots laid out as transformers computes, if kernels of the CPU would compute it."""
    return _laid_out(survey, lambda found: build_catalog(found.checkpoint, found.meta))


def _for_kernels(survey: Survey) -> Survey:
    """The same model with slots laid out for the CPU's kernels, if it would compute with them."""
    return _laid_out(survey, lambda found: found.catalog.for_kernels(found.meta))


def _laid_out(survey: Survey, catalog_of: Callable[[Inspected], ExpertCatalog]) -> Survey:
    """The same checkpoint with other slots, where its device is a CPU, whose kernels have a layout of their own."""
    if not isinstance(survey, Inspected) or survey.backend.has_device_kernels or not survey.backend.unified_memory:
        return survey
    catalog = catalog_of(survey)
    needs = catalog_needs(catalog, survey.meta, survey.dtype, survey.stored, unified_memory=True)
    needs = needs.with_dense(survey.meta, survey.config.dense, survey.dtype, catalog.stored)
    return replace(survey, catalog=catalog, needs=needs)


def _form(survey: Survey, needs: ModelNeeds, experts: str, numeric: bool, laid_out: Survey) -> ExpertForm:
    """What the time of this form depends on. laid_out: the survey whose catalog says what kernels compute."""
    parameters, kernels = needs.parameters, survey.backend.has_device_kernels
    if not kernels and survey.backend.unified_memory:
        kernels = _on_cpu_kernels(laid_out, experts)
    return ExpertForm(
        nbytes=max(needs.shape.expert_bytes),
        weights=(parameters.total - parameters.dense) / needs.shape.num_keys,
        by_kernels=numeric and kernels,
        is_decoded=experts != "native" or survey.quantization is not None,
        itemsize=survey.dtype.itemsize,
        dense_bytes=needs.bytes.dense - _lookup_bytes(survey),
        layers=num_layers(survey.hf_config),
        moe_layers=needs.shape.layers,
        dense_by_kernels=numeric and _has_dense_kernels(survey),
    )


def _has_dense_kernels(survey: Survey) -> bool:
    """Whether the CPU's kernels compute the dense part in numeric mode."""
    if survey.backend.has_device_kernels or not survey.backend.unified_memory:
        return False
    readable = survey.config.dense != "native" or str(survey.dtype) == "torch.bfloat16"
    return readable and (status().library is not None or isinstance(survey.backend, PlannedBackend))


def _on_cpu_kernels(survey: Survey, experts: str) -> bool:
    """Whether the CPU's kernels compute the experts. Without headers they are expected to, as for most families."""
    if experts == "native" and isinstance(survey, Inspected):
        return all(layer.cpu_slot is not None for layer in survey.catalog.layers)
    if experts == "native" and survey.quantization is None and str(survey.dtype) != "torch.bfloat16":
        return False
    return status().library is not None or isinstance(survey.backend, PlannedBackend)


def _lookup_bytes(survey: Survey) -> int:
    """Bytes of the table of token embeddings if nothing but its rows for the tokens is read."""
    table = getattr(survey.meta.get_input_embeddings(), "weight", None)
    if table is None or getattr(survey.hf_config.get_text_config(), "tie_word_embeddings", True):
        return 0
    return int(table.numel()) * survey.dtype.itemsize


def _can_quantize(survey: Survey, experts: str) -> bool:
    """Whether the experts can be quantized on loading: they are not quantized, and their matrices fit the format."""
    if survey.quantization is not None:
        return False
    how = weight_format(experts)
    try:
        if isinstance(survey, Inspected):
            check_packable(survey.catalog, survey.meta, how)
        elif not _have_names(survey):
            return False
        for name, module in find_experts(survey.meta).items():
            if getattr(module, "is_transposed", False):
                return False
            for param, shape in require_adapter(module).shapes(module).items():
                if len(shape) == 2:
                    how.check(f"{name}.{param}", *shape)
    except UnsupportedModelError:
        return False
    return True


def _have_names(survey: Survey) -> bool:
    """Whether transformers knows the names of single experts' matrices, which packing gives to those of a stack."""
    stacks = {
        place.param: name
        for name, (_, place) in expert_parameters(survey.meta).items()
        if place.expert is None and survey.meta.get_parameter(name).ndim > 2
    }
    return all(expert_names(survey.meta, name) is not None for name in stacks.values())


def measured_costs(profile: Profile, measured: ModelNeeds, exactness: str) -> CostsOf:
    """The costs of a profile, for every form.

    Experts of another size than those that were measured are priced by their bytes. A checkpoint that is quantized
    takes quite another time with kernels than without, so the other exactness has no costs then.

    Args:
        profile: must have costs.
        measured: what the model needs in the form that the options name, which is taken for the measured one.
        exactness: of that form.
    """
    costs = profile.costs
    assert costs is not None
    measured_bytes = max(measured.shape.expert_bytes)

    def of(form: ExpertForm, wanted: str) -> CostModel | None:
        if form.nbytes == measured_bytes and form.is_decoded and wanted != exactness:
            return None
        return scaled(costs, measured_bytes, form.nbytes)

    return of


def rated_costs(rates: Rates) -> CostsOf:
    """The costs by a machine's rates."""
    return lambda form, exactness: rates.costs(form)
