"""The model that a verb works on: inspected first, then fetched, loaded and closed.

Nothing of torch or transformers is imported before the options of the command have been checked.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offmoe.cli import options
from offmoe.cli.choices import Ranking
from offmoe.cli.output import Output
from offmoe.cli.state_file import state_file
from offmoe.config import OffloadConfig
from offmoe.errors import OffmoeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offmoe.budget.inspect import Inspected, Survey
    from offmoe.device.machines import Machine
    from offmoe.handle import Offload


class OpenModel:
    """A model named on the command line; made by `open_model`."""

    def __init__(self, args: argparse.Namespace, out: Output, config: OffloadConfig, closing: ExitStack):
        self.config = config
        """The options as they were asked for."""
        self._args, self._out, self._closing = args, out, closing
        self.inspect()

    def inspect(self, **overrides: Any) -> None:
        """Inspect the model, with these options in place of those that were asked for.

        Raises:
            CapacityError: the model does not fit; the message ends with the command of the nearest way that does.
        """
        from offmoe.budget.inspect import inspect_or_refusal
        from offmoe.hf.load.options import ModelOptions

        config, hub = replace(self.config, **overrides), options.hub_options(self._args)
        asked = ModelOptions(plain=getattr(self._args, "no_generation_config", False))
        found = inspect_or_refusal(self._args.model, config, dtype=self._args.dtype, asked=asked, **hub)
        if found.refusal is not None:
            raise Ranking(self._args, config, found, None).instead_of(found.refusal)
        self.inspected: Inspected = found

    def fetch(self) -> Inspected:
        """Download absent shards, and quantize the experts if the options ask for it."""
        from offmoe.api import fetch
        from offmoe.hf.quiet import hide_bars

        self._out.note(f"memory on {self.inspected.config.device}: {self.inspected.plan.describe()}")
        self.inspected = fetch(self.inspected)
        self._closing.callback(self.inspected.release)
        hide_bars()
        return self.inspected

    def load(self, trace: str | None = None, *, warm: bool = False) -> tuple[PreTrainedModel, Offload]:
        """Fetch and load the model.

        Args:
            trace: The file to record the routing into.
            warm: Whether the model begins where the last run ended, fills free slots and RAM in the background, and
                keeps its state when it is closed. Its verb has the options of `options.add_state`.

        Returns:
            The model and its handle.
        """
        from offmoe.api import load

        inspected, state = self.fetch(), None
        if warm:
            state = state_file(self._args, inspected)
            inspected = replace(inspected, config=inspected.config.resolved(state=state, fill=True))
        model = load(inspected, name=self._args.model, trace=trace)
        offload: Any = model.offload
        self._closing.callback(offload.close)
        if state is not None:
            self._closing.callback(self._keep_state, offload, state)
        return model, offload

    def _keep_state(self, offload: Offload, path: Path) -> None:
        """Write the state for the next run, if this one has run the model. A state that cannot be kept is only said."""
        if not offload.stats().demands:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            offload.save_state(path)
        except (OSError, OffmoeError) as error:
            self._out.note(f"the state for the next run is not kept: {error}")


@contextmanager
def open_model(
    args: argparse.Namespace, out: Output, *, trace: str | None = None, **overrides: Any
) -> Iterator[OpenModel]:
    """Inspect the model that a command names; when the block ends, close it and remove temporary files.

    Args:
        args: Parsed options of `options.add_loading` and `options.add_cache`.
        out: Output of the command.
        trace: A file that a recording will be written to; checked before anything is downloaded.
        overrides: Options of `OffloadConfig` that the verb sets itself.
    """
    config = replace(options.offload_config(args), **overrides)
    if trace is not None:
        from offmoe.trace.recorder import check_writable

        check_writable(trace)
    from offmoe.hf.quiet import quiet

    quiet(args.verbose, args.json)
    with ExitStack() as closing:
        yield OpenModel(args, out, config, closing)


def survey_model(args: argparse.Namespace, config: OffloadConfig, machine: Machine | None) -> Survey:
    """What the model of a command needs, whether or not it fits or has weights.

    machine: the machine to plan for; None: this one.
    """
    from offmoe.budget.inspect import survey
    from offmoe.device.planned import PlannedBackend
    from offmoe.hf.quiet import quiet

    quiet(args.verbose, args.json)
    backend = None if machine is None else PlannedBackend(machine)
    return survey(args.model, config, dtype=args.dtype, backend=backend, **options.hub_options(args))
