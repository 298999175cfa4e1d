"""Silence transformers, accelerate and huggingface_hub under the command line, by their own switches."""

from __future__ import annotations

import logging as python_logging
import sys
import warnings

import huggingface_hub.utils.logging
from transformers.utils import logging


def quiet(verbose: bool, json: bool) -> None:
    """Leave stderr to offmoe.

    Args:
        verbose: show the libraries' warnings.
        json: show no progress bars, as on a stderr that is no terminal.
    """
    if json or sys.stderr is None or not sys.stderr.isatty():
        hide_bars()
    if not verbose:
        logging.set_verbosity_error()
        python_logging.getLogger("accelerate").setLevel(python_logging.ERROR)
        huggingface_hub.utils.logging.set_verbosity_error()
        warnings.simplefilter("ignore")


def hide_bars() -> None:
    """Show no progress bar from now on: a download is worth one, loading the dense part is not."""
    logging.disable_progress_bar()
