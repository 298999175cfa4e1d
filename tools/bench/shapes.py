"""The shapes of Mixtral 8x7B, Qwen3-30B-A3B and gpt-oss-20b with few layers, and the options of scripts for these."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from offmoe.pack.pack import LAYOUTS, ROWS
from tools.bench.synthetic import mixtral_config, qwen3_config

VOCABULARY, GROUP = 32000, 32
SHAPES = ("mixtral", "qwen3")
GPT_OSS = "gpt-oss-20b"
"""gpt-oss-20b's sizes, experts and top-k in Qwen3's architecture: of this shape there is a recorded routing."""


def configs(layers: int, *, tiny: bool = False) -> dict[str, Any]:
    """The shapes by name. tiny: such that a run takes seconds."""
    if tiny:
        return {
            "mixtral": mixtral_config(256, 512, layers, 8, 2, VOCABULARY),
            "qwen3": qwen3_config(256, 128, layers, 16, 4, VOCABULARY, heads=4),
            GPT_OSS: qwen3_config(256, 128, layers, 32, 4, VOCABULARY, heads=4),
        }
    return {
        "mixtral": mixtral_config(4096, 14336, layers, 8, 2, VOCABULARY),
        "qwen3": qwen3_config(2048, 768, layers, 128, 8, VOCABULARY, heads=32),
        GPT_OSS: qwen3_config(2880, 2880, layers, 32, 4, VOCABULARY, heads=32),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of a script that writes the shapes and measures decoding and prefill of each."""
    parser.add_argument("--work", type=Path, help="a folder for the models, kept (default: temporary)")
    parser.add_argument("--shape", choices=(*SHAPES, GPT_OSS), action="append", help=f"default: {' and '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="decoded per round")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--activations", choices=("int8", "float"), default="int8", help="of offmoe's experts")
    parser.add_argument("--dense", choices=("native", "int8", "int4"), default="native", help="of the dense weights")
    parser.add_argument("--layout", choices=LAYOUTS, default=ROWS, help="how experts stand on the disk (offmoe pack)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
