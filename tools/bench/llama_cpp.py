#!/usr/bin/env python3
"""Compares offmoe with llama.cpp on models of the same bytes: experts in Q4_0 there, in int4 with groups of 32 here.

Two random models are written once per shape (or reused from --work): Mixtral 8x7B's and Qwen3-30B-A3B's with 8 layers,
as a folder for offmoe and as a GGUF file. Each round runs both programs, one after the other and the other first in
every second round, each in a process of its own with the same number of threads: first with everything resident, then,
per --cap, in a memory cgroup of that share of the file, which counts the page cache, with the files out of the cache.
Prints medians and ranges, and their ratio by round; --json prints one object as the last line.

--same-file compares them on one GGUF file in the mixture Q4_K_M, of Qwen3's shape (`gguf_model.py`). offmoe computes
with its dense weights as they are stored, or quantizes them by --dense.

llama.cpp is taken as --llama-bench PATH, or as --library FOLDER with prebuilt shared libraries (libllama, libggml and
their backends), which are driven by the C API. Its routers route by themselves, as offmoe's do here: a recorded routing
cannot be replayed in it. Needs the gguf package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import checkout  # noqa: F401

from offmoe.bench.memory_cap import MemoryCap
from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.device.cores import usable_cores
from offmoe.files import replacing
from offmoe.measure.probes import drop_page_cache
from offmoe.pack.pack import TILED, weight_format
from tools.bench.figures import spread
from tools.bench.gguf_model import write_model
from tools.bench.shapes import GROUP, SHAPES, VOCABULARY, add_options, configs
from tools.bench.synthetic import write_packed
from tools.bench.synthetic_gguf import write_gguf

WORKER = Path(__file__).with_name("llama_worker.py")
FIGURES = ("tokens_per_s", "prefill_tokens_per_s")


def written(work: Path, shape: str, args: argparse.Namespace, scratch: Path) -> tuple[Path, Path]:
    """The model for offmoe, a folder or a file, and its GGUF file, written if they are not there."""
    if args.same_file:
        file = work / f"q4_k_m-{args.layers}.gguf"
        if not file.exists():
            with replacing(file) as partial:
                write_model(partial, args.layers)
        return file, file
    config, tiles = configs(args.layers, tiny=args.tiny)[shape], args.layout == TILED
    name = f"{shape}-{args.layers}{'-tiny' if args.tiny else ''}"
    folder, file = work / f"{name}{'-tiles' if tiles else ''}", work / f"{name}-{args.dense}.gguf"
    if not folder.exists():
        write_packed(folder, config, weight_format("int4", GROUP), scratch, tiles=tiles)
    if not file.exists():
        with replacing(file) as partial:
            write_gguf(partial, config, args.dense)
    return folder, file


def run(task: dict[str, Any], cap: int | None) -> dict[str, float]:
    """The figures of one program in a process of its own. cap: bytes of its cgroup; None: it has none."""
    command = [sys.executable, str(WORKER), json.dumps(task)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if cap is None:
            said = process.communicate("\n")[0]
        else:
            with closing(MemoryCap.create(cap, task["program"])) as cgroup:
                cgroup.add(process.pid)
                said = process.communicate("\n")[0]
    if process.returncode:
        sys.exit(f"llama_cpp.py: {task['program']} ended with status {process.returncode}")
    if task["program"] != "llama-bench":
        figures: dict[str, float] = json.loads(said.splitlines()[-1])
        return figures
    prompt, decoding = json.loads(said)
    return {"prefill_tokens_per_s": prompt["avg_ts"], "tokens_per_s": decoding["avg_ts"]}


def rounds(ours: dict[str, Any], theirs: dict[str, Any], files: list[Path], cap: int | None, count: int) -> Any:
    """Paired rounds: medians and ranges of both programs, and of the ratio within a round."""
    found: dict[str, list[dict[str, float]]] = {"offmoe": [], "llama.cpp": []}
    for number in range(count):
        turns = [("offmoe", ours), ("llama.cpp", theirs)]
        for name, task in turns if number % 2 == 0 else reversed(turns):
            if cap is not None:
                drop_page_cache(files)
            found[name].append(run(task, cap))
    out: dict[str, Any] = {name: {key: spread([r[key] for r in rs]) for key in rs[0]} for name, rs in found.items()}
    pairs = list(zip(found["offmoe"], found["llama.cpp"], strict=True))
    out["ratio"] = {key: spread([mine[key] / other[key] for mine, other in pairs]) for key in FIGURES}
    return out


def compare(shape: str, work: Path, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All set-ups of one shape."""
    folder, file = written(work, shape, args, scratch)
    common = {key: getattr(args, key) for key in ("threads", "prompt", "tokens", "warm")} | {"vocabulary": VOCABULARY}
    options = {
        "experts": "native" if args.same_file else "int4",
        "exactness": "numeric",
        "activations": args.activations,
        "dense": args.dense,
    }
    program = "llama-bench" if args.llama_bench else "library"
    out: dict[str, Any] = {"file_bytes": file.stat().st_size}
    for share in ([] if args.no_resident else [None]) + args.cap:
        cap = None if share is None else int(share * file.stat().st_size)
        ours = {**common, "program": "offmoe", "model": str(folder), "options": options, "capped": share is not None}
        path = str((args.llama_bench or args.library).absolute())
        theirs = {**common, "program": program, "path": path, "model": str(file), "capped": share is not None}
        name = "resident" if share is None else f"cap {share}"
        out[name] = rounds(ours, theirs, [*folder.glob("*.safetensors"), file], cap, args.rounds)
    return out


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program = parser.add_mutually_exclusive_group(required=True)
    program.add_argument("--llama-bench", type=Path, help="llama.cpp's own benchmark")
    program.add_argument("--library", type=Path, help="a folder with libllama, libggml and their backends")
    add_options(parser)
    parser.add_argument("--warm", type=int, default=8, help="decoded before that")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--cap", type=float, action="append", default=[], help="share of the file that is memory")
    parser.add_argument("--same-file", action="store_true", help="one GGUF file for both, in place of the shapes")
    parser.add_argument("--no-resident", action="store_true", help="only with --cap")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    with ended_by_sigterm(), scratch_folder("offmoe-llama-", args.work) as scratch:
        for shape in ["Q4_K_M"] if args.same_file else args.shape or SHAPES:
            found[shape] = compare(shape, args.work or scratch, scratch, args)
    for shape, parts in found.items():
        for part, figures in parts.items():
            print(f"{shape}, {part}")
            for name, value in figures.items() if isinstance(figures, dict) else [("", figures)]:
                print(f"  {name:10} {value}")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
