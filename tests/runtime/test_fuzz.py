"""Damaged checkpoints: 2,000 headers and indexes, and configs. A typed error or what the file says; no crash, no hang.

Case N is the same for ever: `Mutation(N)`. What gets through is read byte for byte and compared with the safetensors
library's own reading of the same file; some of it is loaded whole and compared with stock transformers.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import random
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.errors import OffmoeError
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.catalog.catalog import ExpertCatalog
from offmoe.hf.load.config import build_meta, model_class, read_config
from offmoe.storage.checkpoint import INDEX_FILE, Checkpoint
from offmoe.storage.store import ExpertStore
from tests import tiny

pytestmark = pytest.mark.slow

CASES = 2000
CONFIGS = 240
LOADS = 24
LIMIT_S = 20.0
"""Of one case, on a busy machine; they take 3 ms, a whole load 300."""
GROWTH_BYTES = 400 << 20
Files = dict[str, bytes]

ODD: list[Any] = [
    None, True, -1, 0, 1, 3, 2.5, "8", "", [], {}, [1], {"a": 1},
    2**31, 2**53 + 1, 2**63, 10**30, float("nan"), float("inf"), "a" * 10_000, "\ud800",
]  # fmt: skip
FIELDS = [
    "num_local_experts", "num_experts_per_tok", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "model_type", "quantization_config",
    "max_position_embeddings", "hidden_act", "rope_parameters", "sliding_window", "dtype", "tie_word_embeddings",
    "pad_token_id", "eos_token_id", "architectures", "rms_norm_eps", "attention_dropout", "auto_map",
]  # fmt: skip


@contextmanager
def watched(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], None]]:
    """Yields what starts the clock of the next case. One that hangs ends the process, with every thread's traceback."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with capfd.disabled():
        yield lambda: faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    faulthandler.cancel_dump_traceback_later()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < GROWTH_BYTES


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One tensor per expert, as published, and all experts in one tensor, as transformers v5 writes them."""
    root = tmp_path_factory.mktemp("fuzz")
    model = tiny.build("mixtral", num_hidden_layers=2, hidden_size=16, intermediate_size=12, num_local_experts=4)
    return [
        tiny.save(model, root / str(original), original_format=original, max_shard_size="12KB")
        for original in (True, False)
    ]


# --- mutations


def edit_bytes(files: Files, chance: random.Random) -> None:
    """One to three edits near the start of a file, where the structure is, or a truncation."""
    name = chance.choice(sorted(files))
    data = bytearray(files[name])
    tokens = b'{ } [ " -1 99999999999999999999 null NaN 1e3 ../ \0 \xff F4 , \xed\xa0\x80'.split()
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(min(len(data), 2000)) if data else 0
        kind, token = chance.randrange(6), chance.choice(tokens)
        if kind == 0 and data:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at:at] = token
        elif kind == 2:
            del data[at : at + chance.randint(1, 8)]
        elif kind == 3:
            data[at : at + len(token)] = token
        elif kind == 4:
            del data[chance.randrange(len(data) + 1) :]
        else:
            data[at:at] = bytes(data[at : at + chance.randint(1, 200)])
    files[name] = bytes(data)


def edit_length(files: Files, chance: random.Random) -> None:
    """The 8 bytes that announce the header."""
    name = shard(files, chance)
    true = int.from_bytes(files[name][:8], "little")
    size = len(files[name])
    length = chance.choice([0, 1, 7, true - 1, true + 1, true * 2, size, size - 8, size - 7, 2**31, 2**32 + true,
                            2**63 - 1, 2**63, 2**64 - 1, 100_000_000, chance.randrange(2**64)])  # fmt: skip
    files[name] = length.to_bytes(8, "little") + files[name][8:]


DTYPES: list[Any] = ["F32", "BF16", "F16", "F64", "I8", "U8", "BOOL", "F4", "F8_E4M3", "X", None, 1, []]
SHAPES = [[], [0], [1], [2**62], [2**32, 2**32], [-1, -1], [1.0], ["1"], None, "16"]
OFFSETS = [-1, 0, 1, 10**30, 2**63, None, 0.0, True]
METADATA: list[Any] = [None, {}, {"format": 1}, {"format": "tf"}, [], "x", {"a": None}]
NO_ENTRIES: list[Any] = [
    None, [], {}, 1, "x", {"dtype": "F32"}, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1},
]  # fmt: skip


def edit_header(files: Files, chance: random.Random) -> None:
    """One to three edits of the parsed header, written back well formed (mostly)."""
    name = shard(files, chance)
    entries, data = header_of(files[name])
    for _ in range(chance.randint(1, 3)):
        names = [key for key, entry in entries.items() if isinstance(entry, dict) and "data_offsets" in entry]
        if not names:
            break
        a, b = chance.choice(names), chance.choice(names)
        first, kind = entries[a], chance.randrange(13)
        if kind == 0:
            first["dtype"] = chance.choice(DTYPES)
        elif kind == 1:
            first["shape"] = chance.choice(SHAPES)
        elif kind == 2 and isinstance(first["shape"], list):
            first["shape"] = first["shape"][::-1]
        elif kind == 3:
            first["data_offsets"] = [chance.choice(OFFSETS), chance.choice([*OFFSETS, len(data)])]
        elif kind == 4:
            first["data_offsets"] = entries[b]["data_offsets"]
        elif kind == 5:
            entries[a], entries[b] = entries[b], entries[a]
        elif kind == 6:
            entries[a + chance.choice(["", "x", ".weight", "\0"])] = entries.pop(a)
        elif kind == 7:
            del entries[a]
        elif kind == 8:
            entries["__metadata__"] = chance.choice(METADATA)
        elif kind == 9:
            entries[a] = chance.choice(NO_ENTRIES)
        elif kind == 10 and all(type(n) is int for n in first["data_offsets"]):
            first["data_offsets"] = [n + chance.choice([-4, -1, 0, 1, 4]) for n in first["data_offsets"]]
        elif kind == 11:
            data += bytes(chance.randint(1, 9))
        elif kind == 12:
            data = data[: chance.randrange(len(data) + 1)]
    text = json.dumps(entries)
    if chance.random() < 0.05:
        text = text[:-1] + ", " + text[1:]  # every name twice
    if chance.random() < 0.05:
        text = text.replace(": [", ": " + "[" * chance.choice([2, 5000]), 1)
    files[name] = with_header(text.encode("utf-8", "surrogatepass"), data)


PLACES: list[Any] = [
    "../x.safetensors", "/etc/passwd", "sub/../../x.safetensors", "model.bin", "", "absent.safetensors", None, 3, [],
    "a\0.safetensors", "C:\\x.safetensors", "a" * 5000 + ".safetensors",
]  # fmt: skip


def edit_index(files: Files, chance: random.Random) -> None:
    """One to three edits of the parsed index."""
    index = json.loads(files[INDEX_FILE])
    places: dict[str, Any] = index["weight_map"]
    for _ in range(chance.randint(1, 3)):
        names, shards = sorted(places), sorted({file for file in places.values() if isinstance(file, str)})
        a, b = chance.choice(names), chance.choice(names)
        kind = chance.randrange(7)
        if kind == 0:
            places[a] = chance.choice(shards)
        elif kind == 1:
            places[a + chance.choice(["x", ".weight", "\u0000", "\ud800"])] = places.pop(a)
        elif kind == 2 and len(names) > 1:
            del places[a]
        elif kind == 3:
            places[a] = chance.choice([*PLACES, "./" + shards[0], "x/" + shards[0]])
        elif kind == 4:
            places[a], places[b] = places[b], places[a]
        elif kind == 5:
            first, second = chance.choice(shards), chance.choice(shards)
            swap = {first: second, second: first}
            index["weight_map"] = places = {
                name: swap.get(file, file) if isinstance(file, str) else file for name, file in places.items()
            }
        else:
            index["metadata"] = chance.choice([None, {}, [], {"total_size": -1}, {"total_size": "x"}, 1])
    if chance.random() < 0.1:
        index["weight_map"] = chance.choice([None, [], {}, "x", 1, sorted(places)])
    text = json.dumps(index)
    if chance.random() < 0.05:
        text = text.replace("{", '{"a":' * chance.choice([1, 3000]), 1)
    files[INDEX_FILE] = text.encode("utf-8", "surrogatepass")


def swap_files(files: Files, chance: random.Random) -> None:
    """Two files under each other's names, one of them twice, or one gone."""
    a, b = chance.choice(sorted(files)), chance.choice(sorted(files))
    kind = chance.randrange(4)
    if kind == 0:
        files[a], files[b] = files[b], files[a]
    elif kind == 1:
        files[a] = files[b]
    elif kind == 2:
        files[a] = b""
    else:
        del files[a]


MUTATIONS = (edit_header, edit_bytes, edit_header, edit_index, edit_header, edit_length, edit_index, swap_files)


def shard(files: Files, chance: random.Random) -> str:
    return chance.choice(sorted(name for name in files if name != INDEX_FILE))


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def intact(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if "safetensors" in path.name}


@contextmanager
def damaged(folder: Path, files: Files, number: int) -> Iterator[None]:
    """The folder as case `number` has it, while the block runs."""
    changed = dict(files)
    MUTATIONS[number % len(MUTATIONS)](changed, random.Random(number))
    touched = {name for name in files | changed if files.get(name) != changed.get(name)}
    try:
        for name in touched:
            if name in changed:
                (folder / name).write_bytes(changed[name])
            else:
                (folder / name).unlink()
        yield
    finally:
        for name in touched:
            (folder / name).write_bytes(files[name])


# --- what must hold


def check_bytes(checkpoint: Checkpoint, catalog: ExpertCatalog) -> None:
    """Every tensor and every expert is what the safetensors library reads from the same file under the same name."""
    raw = [path.read_bytes() for path in checkpoint.shards]
    theirs: dict[str, bytes] = {}
    for number, path in enumerate(checkpoint.shards):
        with safe_open(path, "pt") as reference:
            for name, info in checkpoint.tensors.items():
                if info.shard == number:
                    tensor = reference.get_tensor(name)
                    assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape)), name
                    theirs[name] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    assert raw[number][info.offset : info.offset + info.nbytes] == theirs[name], name
    store = ExpertStore(checkpoint.shards, catalog.records)
    # a mapping begins at a page, which is as aligned as the store wants it
    buffer = torch.frombuffer(mmap.mmap(-1, store.buffer_bytes), dtype=torch.uint8)
    try:
        for key, record in catalog.records.items():
            store.read_into(key, buffer.numpy().data)
            for segment, read in zip(record.segments, store.segments(key, buffer), strict=True):
                whole = theirs[segment.name]
                row = 0 if segment.nbytes == len(whole) else key.expert
                assert read.numpy().tobytes() == whole[row * segment.nbytes : (row + 1) * segment.nbytes], segment.name
    finally:
        store.close()


@pytest.mark.parametrize("layout", [0, 1], ids=["per-expert", "fused"])
def test_headers_and_indexes(folders: list[Path], layout: int, capfd: pytest.CaptureFixture[str]) -> None:
    folder = folders[layout]
    config = read_config(folder)
    meta = build_meta(config, model_class(config))
    files = intact(folder)
    outcomes: Counter[str] = Counter()
    with watched(capfd) as start:
        for number in range(layout, CASES, 2):
            start()
            with damaged(folder, files, number), reported(number):
                try:
                    checkpoint = Checkpoint.open(folder)
                    catalog = build_catalog(checkpoint, meta)
                except OffmoeError as error:
                    outcomes[type(error).__name__] += 1
                else:
                    check_bytes(checkpoint, catalog)
                    outcomes["read"] += 1
    # An index that names the wrong shard is no loss: the tensor is found where it is, as stock finds it.
    assert outcomes["read"] > 150, outcomes
    assert outcomes["CheckpointError"] > 300, outcomes
    assert outcomes["MissingTensorError"] >= 10, outcomes
    check_bytes(Checkpoint.open(folder), build_catalog(Checkpoint.open(folder), meta))  # all is as it was


def test_whole_loads_of_what_can_be_read(folders: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Logits as from stock transformers for the same damaged folder."""
    folder, ids = folders[0], tiny.prompt(1, 5)
    files = intact(folder)
    loaded = refused = 0
    with watched(capfd) as start:
        for number in range(CASES):
            if loaded == LOADS:
                break
            with damaged(folder, files, number), reported(number):
                start()
                try:
                    Checkpoint.open(folder)
                    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)
                except OffmoeError:
                    refused += 1
                    continue
                loaded += 1
                with model.offload, torch.no_grad():
                    ours = model(input_ids=ids).logits
                    stock = AutoModelForCausalLM.from_pretrained(folder)
                    assert torch.equal(ours, stock(input_ids=ids).logits)
    assert loaded == LOADS
    assert refused > LOADS


def test_configs(folders: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = folders[0]
    path = folder / "config.json"
    text = path.read_text()
    values = json.loads(text)
    outcomes: Counter[str] = Counter()
    with watched(capfd) as start:
        try:
            for number in range(CONFIGS):
                chance = random.Random(number)
                changed = {**values, chance.choice(FIELDS): chance.choice(ODD)}
                if chance.random() < 0.2:
                    del changed[chance.choice(sorted(changed))]
                path.write_text(json.dumps(changed))
                start()
                with reported(number):
                    try:
                        inspect(folder, OffloadConfig(device="cpu", device_memory="64MiB"))
                        outcomes["inspected"] += 1
                    except OffmoeError as error:
                        outcomes[type(error).__name__] += 1
        finally:
            path.write_text(text)
    assert outcomes["inspected"] > 20, outcomes
    assert outcomes["CheckpointError"] > 50, outcomes


@contextmanager
def reported(number: int) -> Iterator[None]:
    """What goes wrong in the block says in which case."""
    try:
        yield
    except Exception as error:
        error.add_note(f"case {number}")
        raise
