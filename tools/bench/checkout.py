"""Imported first by every script here, so that it runs from any folder, whether offmoe is installed or not.

The checkout comes first on the path: offmoe is the one that the script belongs to, and the scripts beside it are
`tools.bench.NAME`. Their own folder leaves the path: transformers looks for a package `kernels`, and would find and run
kernels.py.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent)]
if find_spec("torch") is None or find_spec("transformers") is None:
    sys.exit(
        f"{sys.executable} has no torch or no transformers. {ROOT / 'tools' / 'offmoe'} makes an environment that has "
        f"them: use {ROOT / '.venv' / 'bin' / 'python'}"
    )
