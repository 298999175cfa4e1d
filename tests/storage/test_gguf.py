"""Headers of GGUF files: what the gguf package writes is read, and every damage is an error that says what to do."""

from __future__ import annotations

import random
import struct
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offmoe.errors import CheckpointError, MissingTensorError, OffmoeError, UnsupportedModelError
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.gguf import FIRST_READ, MAX_ARRAY, GgufHead, Skipped, parse_gguf, read_gguf
from offmoe.storage.gguf_set import open_set

Q = gguf.GGMLQuantizationType


def write(path: Path, **options: Any) -> Path:
    """A small file with every kind of value and several types of tensors."""
    writer = gguf.GGUFWriter(str(path), "llama", **options)
    writer.add_block_count(2)
    writer.add_bool("a.flag", True)
    writer.add_float64("a.double", 1.5)
    writer.add_int8("a.int8", -3)
    writer.add_uint16("a.short", 7)
    writer.add_uint64("a.long", 1 << 40)
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_string("a.text", "Grüße")
    writer.add_token_list([f"token {i}" for i in range(20)])
    rng = np.random.default_rng(0)
    writer.add_tensor("plain", rng.standard_normal((3, 8)).astype(np.float32))
    writer.add_tensor("half", rng.standard_normal(5).astype(np.float16))
    for kind in (Q.Q8_0, Q.MXFP4, Q.BF16):
        values = rng.standard_normal((2, 4, 64)).astype(np.float32)
        writer.add_tensor(f"stacked.{kind.name}", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def parse(data: bytes) -> GgufHead:
    return parse_gguf(lambda offset, count: data[offset : offset + count], len(data), Path("x.gguf"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "x.gguf").read_bytes()


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_every_tensor_is_where_the_gguf_package_finds_it(tmp_path: Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_custom_alignment(alignment)
    for i in range(5):
        writer.add_tensor(f"tensor {i}", np.full((i + 1, 3), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _compare(tmp_path / "x.gguf")


def test_types_shapes_and_bytes_are_those_that_the_gguf_package_reads(tmp_path: Path) -> None:
    _compare(write(tmp_path / "x.gguf"))


def _compare(path: Path) -> None:
    head, reader, raw = read_gguf(path), gguf.GGUFReader(path), path.read_bytes()
    assert list(head.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = head.tensors[tensor.name]
        assert head.types[tensor.name] == tensor.tensor_type
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        columns = tensor.data.shape[-1] // (2 if tensor.tensor_type == Q.BF16 else 1)  # the package has no bfloat16
        assert info.shape == (*tensor.data.shape[:-1], columns)
        assert raw[info.offset : info.offset + info.nbytes] == tensor.data.tobytes()


def test_metadata_are_those_that_were_written(small: bytes) -> None:
    metadata = parse(small).metadata
    assert metadata["general.architecture"] == "llama"
    assert (metadata["a.flag"], metadata["a.double"], metadata["a.int8"]) == (True, 1.5, -3)
    assert (metadata["a.short"], metadata["a.long"], metadata["a.text"]) == (7, 1 << 40, "Grüße")
    assert metadata["a.numbers"] == (1, 2, 3)
    assert metadata["tokenizer.ggml.tokens"] == Skipped(20)


def test_version_2_is_read_too(small: bytes) -> None:
    assert parse(small[:4] + struct.pack("<I", 2) + small[8:]) == parse(small)


class Built:
    """A header that is written by hand, to break it."""

    def __init__(self, *keys: bytes, tensors: tuple[bytes, ...] = (), data: int = 0) -> None:
        self.keys, self.tensors, self.data = keys, tensors, data

    def __bytes__(self) -> bytes:
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.keys)) + b"".join(self.keys + self.tensors)
        return head + bytes(-len(head) % 32) + bytes(self.data)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int = 4, raw: bytes = bytes(4)) -> bytes:
    return text(name) + struct.pack("<I", kind) + raw


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = b"".join(struct.pack("<Q", n) for n in reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def array(element: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", element, count) + raw


def nested(depth: int) -> bytes:
    return array(9, 1, nested(depth - 1)) if depth else array(4, 0)


@pytest.mark.parametrize(
    ("built", "what"),
    [
        (Built(key("a"), key("a")), "'a' occurs twice"),
        (Built(key(b"\xff")), "malformed"),
        (Built(key("a", 13)), "unknown type 13"),
        (Built(key("a", 7, b"\2")), "a boolean is 2"),
        (Built(key("a", 9, array(13, 1))), "unknown type 13"),
        (Built(key("a", 9, array(8, 1 << 60))), "announces .* strings"),
        (Built(key("a", 9, array(9, 1 << 60))), "announces .* arrays"),
        (Built(key("a", 9, array(4, 1 << 60))), "end in the header"),
        (Built(key("a", 9, array(8, 1, struct.pack("<Q", 1 << 60)))), "end in the header"),
        (Built(key("a", 8, struct.pack("<Q", 2**64 - 1))), "end in the header"),
        (Built(key("a", 9, nested(5))), "nested deeper"),
        (Built(tensors=(tensor("a", (8,)), tensor("a", (8,), 0, 32)), data=64), "'a' occurs twice"),
        (Built(tensors=(tensor("a", (1,) * 5),), data=4), "5 dimensions"),
        (Built(tensors=(tensor("a", (8,)), tensor("b", (8,), 0, 0)), data=64), "'b' overlaps"),
        (Built(tensors=(tensor("a", (16,)), tensor("b", (8,), 0, 32)), data=64), "'b' overlaps"),
        (Built(tensors=(tensor("a", (8,), 0, 8),), data=64), "not at a multiple of 32"),
        (Built(tensors=(tensor("a", (2**40, 2**40)),)), "impossible shape"),
        (Built(tensors=(tensor("a", (0, 2**63)),)), "impossible shape"),
        (Built(tensors=(tensor("a", (8,), 0, 1 << 63),)), "impossible shape"),
        (Built(tensors=(tensor("a", (33,), 8),), data=64), "no whole blocks of Q8_0"),
        (Built(tensors=(tensor("a", (), 8),), data=64), "no whole blocks of Q8_0"),
        (Built(tensors=(tensor("a", (16,)),), data=32), "describes 128 bytes, the file has 96; it is truncated"),
        (Built(key("general.alignment", 4, struct.pack("<I", 24))), "not a power of two"),
        (Built(key("general.alignment", 4, struct.pack("<I", 0))), "not a power of two"),
        (Built(key("general.alignment", 8, text("32"))), "not a power of two"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(64), "announces .* tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(64), "announces .* keys"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (b"GGUF", "not a GGUF file"),
        (b"", "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><title>Not found", "a web page, not the file.*/resolve/.*a token"),
        (b"Invalid username or password.\n", "text, not a GGUF file: 'Invalid username or password.'; download"),
        (b'{"error":"Repository not found"}', "text, not a GGUF file: '{\"error"),
        (bytes(4096), "begins with zeros, so its download has not finished"),
        (b"tjgg\3\0\0\0" + bytes(64), r"from before GGUF \(ggjt\); use a file of the model in Q4_K_M"),
    ],
)
def test_a_damaged_header_is_an_error_that_says_what_is_wrong(built: Built | bytes, what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        parse(bytes(built))


@pytest.mark.parametrize(
    ("built", "what"),
    [
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
        (Built(tensors=(tensor("a", (256,), 16),)), "'a' is IQ2_XXS, which offmoe cannot decode; use a file"),
        (Built(tensors=(tensor("a", (256,), 29),)), "IQ1_M"),
        (Built(tensors=(tensor("a", (256,), 21),)), "IQ3_S"),
        (Built(tensors=(tensor("a", (256,), 99),)), "of the unknown type 99"),
    ],
)
def test_what_offmoe_does_not_read_is_refused_by_name(built: Built | bytes, what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=what):
        parse(bytes(built))


def test_a_file_of_the_gguf_package_in_the_other_byte_order_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        read_gguf(path)


def test_truncation_at_every_byte_is_an_error(small: bytes) -> None:
    end = max(info.offset + info.nbytes for info in parse(small).tensors.values())
    for size in range(end):
        with pytest.raises(CheckpointError, match="download it again"):
            parse(small[:size])
    parse(small[:end])  # the padding behind the last tensor is not needed


def test_every_flipped_byte_of_the_header_gives_a_header_or_an_error(small: bytes) -> None:
    refused = 0
    for at in range(parse(small).header_bytes):
        for mask in (1, 0x80, 0xFF):
            damaged = bytearray(small)
            damaged[at] ^= mask
            refused += not _reads(bytes(damaged))
    assert refused > 200  # most flips hit counts, lengths and types


def _reads(data: bytes) -> bool:
    """Whether a header is read; what is read lies in the file, and anything but an `OffmoeError` fails the test."""
    try:
        head = parse(data)
    except OffmoeError:
        return False
    assert all(info.offset + info.nbytes <= len(data) for info in head.tensors.values())
    return True


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_gives_a_header_or_an_error(small: bytes, data: st.DataObject) -> None:
    damaged = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(small) - 9))
        change: Callable[[], bytes] = data.draw(
            st.sampled_from(
                [lambda: struct.pack("<Q", 2**63), lambda: struct.pack("<I", 9), lambda: b"\xff", lambda: b""]
            )
        )
        raw = change()
        damaged[at : at + len(raw)] = raw
    _reads(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))


@pytest.mark.slow
def test_five_thousand_damaged_headers_give_a_header_or_an_error(small: bytes) -> None:
    rng = random.Random(0)
    for _ in range(5000):
        damaged = bytearray(small)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(parse(small).header_bytes)
            raw = rng.choice((rng.randbytes(1), rng.randbytes(8), bytes(4), b"\xff" * 4, b"\1\0\0\0"))
            damaged[at : at + len(raw)] = raw
        _reads(bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))]))


def test_a_reader_that_returns_less_than_it_was_asked_for_is_noticed(small: bytes) -> None:
    with pytest.raises(CheckpointError, match="ends before its header does"):
        parse_gguf(lambda offset, count: b"", len(small), Path("x.gguf"))


def test_long_arrays_of_numbers_are_skipped() -> None:
    long = key("long", 9, array(4, MAX_ARRAY + 1, bytes(4 * MAX_ARRAY + 4)))
    metadata = parse(bytes(Built(long, key("behind", 4, struct.pack("<I", 5))))).metadata
    assert metadata == {"long": Skipped(MAX_ARRAY + 1), "behind": 5}


def test_a_vocabulary_of_ten_megabytes_takes_few_ranges_and_two_calls_per_token() -> None:
    """Calls are counted, since a loaded machine has seconds of its own: two per token take 0.055 s, asked are 0.3."""
    tokens = b"".join(text(f"token number {i:08}, quite long") for i in range(250_000))
    data = bytes(Built(key("tokens", 9, array(8, 250_000, tokens)), tensors=(tensor("a", (8,)),), data=32))
    assert len(data) > 9_000_000
    ranges: list[tuple[int, int]] = []

    def read(offset: int, count: int) -> bytes:
        ranges.append((offset, count))
        return data[offset : offset + count]

    calls = Counter[str]()
    sys.setprofile(lambda frame, event, argument: calls.update((event,)))
    try:
        head = parse_gguf(read, len(data), Path("x.gguf"))
    finally:
        sys.setprofile(None)
    assert calls["call"] + calls["c_call"] < 2 * 250_000 + 1_000
    assert head.metadata["tokens"] == Skipped(250_000)
    assert ranges[0] == (0, FIRST_READ)
    assert len(ranges) <= 10
    assert all(a + b == c for (a, b), (c, _) in pairwise(ranges))  # no byte twice


def split(folder: Path, parts: int, name: str = "model", total: int | None = None, scale: float = 1.0) -> list[Path]:
    """A model in parts, written by the gguf package, of 2 tensors each."""
    writer = gguf.GGUFWriter(str(folder / f"{name}.gguf"), "llama", split_max_tensors=2)
    for i in range(2 * parts):
        writer.add_tensor(f"tensor {i}", np.full((4, 8), i * scale, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{name}-*.gguf"))


def test_a_split_model_is_opened_by_any_of_its_parts(tmp_path: Path) -> None:
    files = split(tmp_path, 3)
    opened = [open_set(file) for file in files]
    assert opened[0].files == tuple(files)
    assert all(other == opened[0] for other in opened)
    assert opened[0].metadata["general.architecture"] == "llama"
    for i in range(6):
        info = opened[0].tensors[f"tensor {i}"]
        raw = files[info.shard].read_bytes()[info.offset : info.offset + info.nbytes]
        assert np.frombuffer(raw, np.float32).tolist() == [i] * 32


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    files = split(tmp_path, 3)
    files[1].unlink()
    with pytest.raises(MissingTensorError, match=r"model-00002-of-00003\.gguf.*complete the download"):
        open_set(files[0])


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    files = split(tmp_path, 3)
    (tmp_path / "other").mkdir()
    longer = split(tmp_path / "other", 4)
    files[1].write_bytes(longer[1].read_bytes())
    with pytest.raises(CheckpointError, match="of 4, its name says 1 of 3"):
        open_set(files[0])
    files[1].write_bytes(split(tmp_path, 3, "same")[0].read_bytes())
    with pytest.raises(CheckpointError, match=r"part 0 .* its name says 1 of 3"):
        open_set(files[0])


def test_a_part_with_the_tensors_of_another_is_refused(tmp_path: Path) -> None:
    files = split(tmp_path, 2)
    raw = files[0].read_bytes().replace(b"tensor 1", b"tensor 2")
    files[0].write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"'tensor 2', as .* does"):
        open_set(files[0])


def test_a_total_that_is_wrong_is_refused(tmp_path: Path) -> None:
    files = split(tmp_path, 2)
    name = b"split.tensors.count" + struct.pack("<I", 5)
    raw = files[1].read_bytes()
    assert name + struct.pack("<i", 4) in raw
    files[1].write_bytes(raw.replace(name + struct.pack("<i", 4), name + struct.pack("<i", 5)))
    with pytest.raises(CheckpointError, match="has 5 tensors, its 2 parts have 4"):
        open_set(files[0])


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    files = split(tmp_path, 2)
    renamed = files[0].rename(tmp_path / "whole.gguf")
    with pytest.raises(CheckpointError, match=r"part 0 \(from 0\) of 2, its name says 0 of 1"):
        open_set(renamed)
    with pytest.raises(CheckpointError, match="part 3 of 2"):
        open_set(tmp_path / "model-00003-of-00002.gguf")


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ((key("general.architecture", 8, text("clip")),), "the image encoder of a model"),
        ((key("general.type", 8, text("adapter")), key("general.architecture", 8, text("llama"))), "a LoRA adapter"),
        ((key("general.type", 8, text("imatrix")),), "an importance matrix"),
        ((key("general.type", 8, text("vocab")), key("general.architecture", 8, text("llama"))), "a vocabulary, not a"),
        ((key("general.architecture", 8, text("llama")),), "holds no weights"),
        (
            (
                key("general.architecture", 8, text("llama")),
                key("tokenizer.ggml.tokens", 9, array(8, 2, text("a") + text("b"))),
            ),
            "a vocabulary of 2 tokens and no weights",
        ),
    ],
)
def test_a_file_that_holds_no_model_is_refused_by_what_it_holds(
    tmp_path: Path, keys: tuple[bytes, ...], what: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(bytes(Built(*keys)))
    with pytest.raises(UnsupportedModelError, match=what):
        open_set(tmp_path / "x.gguf")


def test_a_file_without_an_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(bytes(Built(tensors=(tensor("a", (8,)),), data=32)))
    with pytest.raises(CheckpointError, match="names no architecture"):
        open_set(tmp_path / "x.gguf")


def test_a_checkpoint_notices_that_its_file_was_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    checkpoint = Checkpoint.open_gguf(path)
    assert (checkpoint.folder, checkpoint.model, checkpoint.shards) == (tmp_path, path, (path,))
    segment = checkpoint.segment("stacked.Q8_0", 1, 2)
    assert (segment.nbytes, segment.dtype, segment.shape) == (4 * 68, torch.uint8, (4, 68))
    checkpoint.check_unchanged()
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(OffmoeError, match="replaced or rewritten"):
        checkpoint.check_unchanged()


def test_a_file_that_is_absent_or_unreadable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match="complete the download"):
        read_gguf(tmp_path / "absent.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_gguf(tmp_path / "folder.gguf")
