"""What would run here, or on a machine that is known by its name: predicted, ranked, and as commands."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from rich.table import Table

from offmoe.cli import options
from offmoe.cli.option_docs import flag
from offmoe.cli.output import Output, new_table
from offmoe.config import OffloadConfig
from offmoe.device.machines import DISKS, GPUS, RAM_SPEEDS, Machine, parse_machine, ram_names
from offmoe.errors import CapacityError, ConfigError
from offmoe.profile import Profile
from offmoe.text import format_size, percent, size_option, span

if TYPE_CHECKING:
    from offmoe.budget.choices import Choice, CostsOf
    from offmoe.budget.inspect import Survey
    from offmoe.simulate.decode_prices import DecodePaths

LIST = "list"
MACHINE_HELP = (
    "predict for this machine in place of the one that is here: GPU, RAM and disk joined by '+', such as "
    f"rtx-3060-12g+ddr4-3200-64g+nvme-gen4; RAM and disk may be left out; '{LIST}' shows all names"
)
FASTER = 1.3
"""How many times as fast another way must be predicted to be for `generate` to mention it."""
LONG_WORD = 60
"""Characters of a prompt that a message repeats at most."""
ASKED_MEMORY = {"device", "device_memory", "host_memory", "max_context"}
"""Options after which `generate` still says what another form of the experts would give."""


def add_machine(parser: argparse._ActionsContainer) -> None:
    """The option --machine."""
    options.add_option(parser, "--machine", "NAME", MACHINE_HELP)


def machine_for(name: str, config: OffloadConfig) -> Machine:
    """The machine of that name, as far as it does not contradict the other options.

    Raises:
        ConfigError: the name is unknown, or the machine has no such device or memory.
    """
    machine = parse_machine(name)
    if config.device == "cpu":
        machine = replace(machine, gpu_name=None)
    elif config.device is not None and machine.gpu is None:
        raise ConfigError(f"--machine {name!r} has no GPU for --device {config.device}: add one, such as rtx-3060-12g.")
    if machine.ram.gib is None and config.host_memory not in ("auto", 0):
        machine = machine.with_ram_for(int(config.host_memory))
    wanted, free = config.device_memory, machine.device_free_bytes
    if machine.gpu is None and machine.ram.gib is None and wanted != "auto":
        return machine.with_ram_for(int(wanted))
    if wanted != "auto" and int(wanted) > free:
        raise ConfigError(
            f"--device-memory {format_size(int(wanted))}: {format_size(free)} are free on {machine.name}. Leave it "
            "out, or name a machine with more memory."
        )
    return machine


def show_machines(out: Output) -> None:
    """List the parts that a machine's name may have, with what is known of them."""
    gpus = new_table("GPUs, by their data sheets", ("name",), ("memory", "its bandwidth", "PCIe"))
    for name, gpu in GPUS.items():
        link = f"{gpu.generation}.0 x{gpu.lanes}, {gpu.link_gb_s:.1f} GB/s"
        gpus.add_row(name, f"{gpu.memory_gib} GiB", f"{gpu.memory_gb_s:.0f} GB/s", link)
    others = new_table("RAM and disks", ("name",), ("bandwidth",))
    for name in ram_names():
        others.add_row(name, f"{parse_machine(name).ram.gb_s:.1f} GB/s")
    for name, gb_s in DISKS.items():
        others.add_row(name, f"{gb_s:.1f} GB/s")
    out.result(
        gpus, others, "RAM has two channels and 32 GiB if its name says nothing else: ddr5-4800x8-256g has more."
    )
    ram = {
        f"{kind}-{speed}": parse_machine(f"{kind}-{speed}").ram.gb_s
        for kind in RAM_SPEEDS
        for speed in RAM_SPEEDS[kind]
    }
    facts = {
        name: {"memory_gib": gpu.memory_gib, "memory_gb_s": gpu.memory_gb_s, "link_gb_s": gpu.link_gb_s}
        for name, gpu in GPUS.items()
    }
    out.json({"gpus": facts, "ram_gb_s": ram, "disk_gb_s": dict(DISKS)})


class Ranking:
    """The ways in which a model would run, the best first, and where their speeds come from."""

    def __init__(self, args: argparse.Namespace, asked: OffloadConfig, survey: Survey, machine: Machine | None):
        from offmoe.budget.choices import choices

        self._args, self._asked, self._survey, self._machine = args, asked, survey, machine
        self._costs_of, self._source, self._assumed = costs_for(asked, survey, machine)
        self.ways: list[Choice] = choices(survey, asked, self._costs_of)

    @property
    def same(self) -> Choice | None:
        """The best way whose results are those of stock transformers; None if none fits."""
        return next((way for way in self.ways if way.fits and way.unchanged), None)

    @property
    def fastest(self) -> Choice | None:
        """The best way of all; None if none fits."""
        return next((way for way in self.ways if way.fits), None)

    @cached_property
    def nearest(self) -> Choice | None:
        """The way that is nearest to what was asked for and fits, if none of `ways` does; None if there is none."""
        from offmoe.budget.nearest import nearest

        return nearest(self._survey, self._asked, self._costs_of)

    @cached_property
    def paths(self) -> DecodePaths | None:
        """What the fastest way would decode without waiting for the host, on a machine by name with a GPU."""
        from offmoe.budget.decode_paths import decode_paths
        from offmoe.budget.predict import Rates

        way = self.fastest
        if self._machine is None or way is None:
            return None
        return decode_paths(way.shape, way.config, way.plan, way.form, Rates.of_machine(self._machine))

    def command(self, way: Choice) -> str:
        """The command that runs the model this way."""
        return command(self._args, way, "MODEL" if self._survey.catalog is None else self._args.model)

    def table(self) -> Table:
        """All ways, one per row."""
        where = "here" if self._machine is None else f"on {self._machine.name}"
        columns = ("experts", "slots"), ("resident", "context", "tokens/s", "bound")
        table = new_table(f"what would run {where}, the best first; tokens/s are predicted, not measured", *columns)
        for way in self.ways:
            context = f"{way.plan.max_context}"
            if not way.fits:
                table.add_row(_name(way), f"needs {format_size(way.plan.smallest)}", "-", context, "-", "-")
                continue
            speed, bound = "-", "-"
            if way.predicted is not None:
                most = f" ({way.predicted.most_tokens_per_s:.3g})"
                speed, bound = f"{way.predicted.tokens_per_s:.3g}{most}", way.predicted.bound_by
            table.add_row(_name(way), _slots(way), percent(way.resident), context, speed, bound)
        return table

    def lines(self) -> list[str]:
        """What to do, as commands, and what the predictions rest on."""
        results = dict.fromkeys(f"{_name(way)}: {way.quality}" for way in self.ways)
        said = [f"Results: {'; '.join(results)}."]
        same, fastest = self.same, self.fastest
        if fastest is None:
            if self.nearest is not None:
                said.append(f"Nothing fits. The nearest way that does: {self.command(self.nearest)}")
            elif self.ways:
                more = format_size(self.ways[0].plan.smallest - self._survey.free)
                said.append(f"Nothing fits. With {more} more free, the nearest way: {self.command(self.ways[0])}")
        else:
            if same is not None:
                said.append(f"Best with the results of transformers{_speed(same)}: {self.command(same)}")
            if fastest is not same:
                said.append(f"Fastest{_speed(fastest)}, {_name(fastest)}: {self.command(fastest)}")
            if fastest.experts != "native" and self._survey.config.experts == "native":
                model = options.model_words(self._args) if self._survey.catalog is not None else "MODEL"
                said.append(
                    f"That quantizes at every load; once is enough: offmoe pack {model} OUT --experts {fastest.experts}"
                )
        if self.paths is not None:
            eager, lag_1, captured = self.paths
            said.append(
                f"If the GPU did not wait for the host, the fastest would decode {lag_1:.3g} tokens/s (lag=1, untried "
                f"on a GPU) or {captured:.3g} (captured in graphs, untried too) in place of {eager:.3g}: predicted."
            )
        if any(way.predicted for way in self.ways):
            assumed = f", assuming {' and '.join(self._assumed)}" if self._assumed else ""
            said.append(
                f"Predicted from {self._source}{assumed}: if every expert were equally likely, in brackets if none "
                "were missed. Real routing lies between."
            )
        return said

    def instead_of(self, refusal: CapacityError) -> CapacityError:
        """The refusal of what was asked for, with the command of the nearest way that fits."""
        best = self.same or self.fastest or self.nearest
        if best is None:
            return refusal
        fits = self.command(best) if self._args.words[0] == "inspect" else again(self._args, best)
        return CapacityError(f"{refusal} What fits: {fits}")

    def to_dict(self) -> dict[str, object]:
        """The ranking for JSON."""
        same, fastest = self.same, self.fastest
        return {
            "machine": None if self._machine is None else self._machine.name,
            "predicted_from": self._source,
            "predicted_assuming": list(self._assumed),
            "choices": [self._facts(way) for way in self.ways],
            "best_command": None if fastest is None else self.command(fastest),
            "best_command_same_results": None if same is None else self.command(same),
            "decode_paths": None if self.paths is None else self.paths.to_dict(),
            "nearest_command": None if fastest is not None or self.nearest is None else self.command(self.nearest),
        }

    def _facts(self, way: Choice) -> dict[str, object]:
        plan = way.plan
        facts: dict[str, object] = {
            "experts": way.experts,
            "exactness": way.config.exactness,
            "fits": way.fits,
            "smallest_device_memory": plan.smallest,
            "results": way.quality,
            "max_context": plan.max_context,
            "command": self.command(way),
        }
        if way.fits:
            facts |= {
                "scope": way.config.scope,
                "slots": sum(plan.slots_per_layer),
                "resident": way.resident,
                "parked_layers": plan.offloaded_layers,
                "on_miss": way.config.on_miss,
                "device_bytes": plan.used,
                "host_bytes": 0 if plan.host is None else plan.host.slots,
            }
        return facts | ({} if way.predicted is None else way.predicted.to_dict())


def costs_for(asked: OffloadConfig, survey: Survey, machine: Machine | None) -> tuple[CostsOf, str, Sequence[str]]:
    """(costs of each form, where they come from, what was assumed): a machine's name, a profile, or a probe."""
    from offmoe.budget.choices import measured_costs, rated_costs
    from offmoe.budget.predict import Rates

    if machine is not None:
        rates = Rates.of_machine(machine)
    elif isinstance(asked.profile, Profile) and asked.profile.costs is not None:
        return measured_costs(asked.profile, survey.needs, survey.config.exactness), "the profile's costs", ()
    else:
        from offmoe.measure.quick import probe

        rates = probe(survey)
    return rated_costs(rates), rates.source, rates.assumed


def command(args: argparse.Namespace, way: Choice, model: str) -> str:
    """The command that runs a model in one way: the options that were given, and those that make this way."""
    words = ["offmoe", "generate", shlex.quote(model), "PROMPT"]
    given = {name: getattr(args, name, None) for name in OffloadConfig.__dataclass_fields__}
    given |= {name: getattr(args, name, None) for name in ("dtype", "revision", "gguf_file")}
    given |= dict.fromkeys(way.dropped)
    if way.refusal is not None:
        given["device_memory"] = size_option(way.plan.smallest)
    for name, value in {**given, **way.options}.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [flag(name), shlex.quote(text)]
    return " ".join(words)


def again(args: argparse.Namespace, way: Choice) -> str:
    """The command that was given, with the options that make one way in place of its own. A long prompt is PROMPT."""
    changed = {flag(name) for name in (*way.dropped, *way.options)}
    words: list[str] = []
    given = iter(args.words)
    for word in given:
        name, has_value, _ = word.partition("=")
        if name in changed:
            if not has_value:
                next(given, None)
            continue
        is_long = len(word) > LONG_WORD or " ".join(word.split()) != word
        words.append("PROMPT" if is_long and word == getattr(args, "prompt", None) else shlex.quote(word))
    more = [word for name, value in way.options.items() for word in (flag(name), shlex.quote(str(value)))]
    end = words.index("--") if "--" in words else len(words)
    return " ".join(["offmoe", *words[:end], *more, *words[end:]])


def say_what_is_faster(args: argparse.Namespace, survey: Survey, out: Output) -> None:
    """One line if another form of the experts would be much faster, and the options do not say which form to take.

    Nothing is probed where every expert has a slot and computes as it is stored, so that no run that is fast anyway
    waits for it.
    """
    plan, asked = survey.plan, options.offload_config(args)
    resident = plan.slots_per_layer == survey.shape.experts and not plan.offloaded_layers
    if asked.explicit - ASKED_MEMORY or (resident and survey.quantization is None):
        return
    from offmoe.budget.choices import in_default_context

    costs_of, source, _ = costs_for(asked, survey, None)
    ways = [way for way in in_default_context(survey, asked, costs_of) if way.fits and way.predicted is not None]
    now = next((way for way in ways if not way.options), None)
    if not ways or now is None or ways[0].tokens_per_s < FASTER * now.tokens_per_s:
        return
    best = ways[0]
    more = " ".join(f"{flag(name)} {value}" for name, value in best.options.items())
    out.note(
        f"{more} would give about {best.tokens_per_s / now.tokens_per_s:.1f} times the tokens/s (predicted from "
        f"{source}: {best.tokens_per_s:.3g} in place of {now.tokens_per_s:.3g}; {best.quality})"
    )


def _name(way: Choice) -> str:
    """The form of the experts, and whether sums run in another order."""
    return "native, numeric" if way.experts == "native" and not way.unchanged else way.experts


def _slots(way: Choice) -> str:
    slots = way.plan.slots_per_layer
    text = f"pool of {sum(slots)}" if way.config.scope == "model" else f"{span(slots)} a layer"
    return text + (f", {way.plan.offloaded_layers} layers elsewhere" if way.plan.offloaded_layers else "")


def _speed(way: Choice) -> str:
    return "" if way.predicted is None else f" (predicted {way.predicted.tokens_per_s:.3g} tokens/s)"
