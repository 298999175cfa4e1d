"""Imported first by every script of this folder, so that it runs from any folder, with offmoe installed or not.

The checkout comes first on the path: offmoe is the one that the script belongs to, and the scripts of this folder are
`tools.bench.NAME`. Their own folder is removed from the path, because transformers looks for a package `kernels` and
would run kernels.py.
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
