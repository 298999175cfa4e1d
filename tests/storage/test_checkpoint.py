import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from offmoe.errors import CheckpointError, MissingTensorError, OffmoeError, UnsupportedModelError
from offmoe.storage.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from offmoe.storage.layout import Segment, TensorInfo

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def example_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, dtype=torch.bfloat16),
        "b.scale": torch.randn(7),
        "c.fused": torch.randn(4, 2, 3).to(torch.float16),
        "d.scalar": torch.tensor(3, dtype=torch.int64),
        "e.empty": torch.empty(0, 4),
        "f.mask": torch.tensor([True, False, True]),
    }


def write_two_shards(folder: Path) -> dict[str, torch.Tensor]:
    tensors = example_tensors()
    names = sorted(tensors)
    files = {FIRST: names[:3], SECOND: names[3:]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, members in files.items() for name in members}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return tensors


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bytes_at(checkpoint: Checkpoint, place: Segment | TensorInfo) -> bytes:
    with open(checkpoint.shards[place.shard], "rb") as file:
        file.seek(place.offset)
        return file.read(place.nbytes)


class TestReading:
    def test_index_places_every_tensor_bit_identically(self, tmp_path: Path) -> None:
        tensors = write_two_shards(tmp_path)
        checkpoint = Checkpoint.open(tmp_path)
        assert checkpoint.shards == (tmp_path / FIRST, tmp_path / SECOND)
        assert checkpoint.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            info = checkpoint.tensors[name]
            assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
            assert bytes_at(checkpoint, info) == raw_bytes(tensor)

    def test_single_file_is_preferred_to_an_index_as_transformers_does(self, tmp_path: Path) -> None:
        write_two_shards(tmp_path)
        save_file({"only": torch.ones(2)}, tmp_path / SINGLE_FILE)
        assert set(Checkpoint.open(tmp_path).tensors) == {"only"}

    def test_without_index_all_shards_count(self, tmp_path: Path) -> None:
        tensors = write_two_shards(tmp_path)
        (tmp_path / INDEX_FILE).unlink()
        assert Checkpoint.open(str(tmp_path)).tensors.keys() == tensors.keys()

    def test_the_index_names_files_whose_tensors_all_count_as_in_transformers(self, tmp_path: Path) -> None:
        tensors = write_two_shards(tmp_path)
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a.weight": FIRST}}))
        checkpoint = Checkpoint.open(tmp_path)
        assert (checkpoint.shards, set(checkpoint.tensors)) == ((tmp_path / FIRST,), set(sorted(tensors)[:3]))

    def test_of_a_tensor_in_two_files_the_last_counts_as_in_transformers(self, tmp_path: Path) -> None:
        tensors = write_two_shards(tmp_path)
        for file, other in ((FIRST, "d.scalar"), (SECOND, "a.weight")):
            with safe_open(tmp_path / file, "pt") as shard:
                held = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 -- no mapping
            save_file(held | {other: tensors[other] * 2}, tmp_path / file)
        checkpoint = Checkpoint.open(tmp_path)
        assert bytes_at(checkpoint, checkpoint.tensors["a.weight"]) == raw_bytes(tensors["a.weight"] * 2)
        assert bytes_at(checkpoint, checkpoint.tensors["d.scalar"]) == raw_bytes(tensors["d.scalar"])

    def test_segment_is_a_tensor_or_an_equal_part_of_it(self, tmp_path: Path) -> None:
        tensors = write_two_shards(tmp_path)
        checkpoint = Checkpoint.open(tmp_path)
        whole = checkpoint.segment("c.fused")
        assert (whole.shape, whole.dtype, whole.name) == ((4, 2, 3), torch.float16, "c.fused")
        for parts, shape in ((4, (2, 3)), (2, (2, 2, 3)), (1, (4, 2, 3))):
            for part, expected in enumerate(tensors["c.fused"].chunk(parts)):
                segment = checkpoint.segment("c.fused", part, parts)
                assert segment.shape == shape
                assert bytes_at(checkpoint, segment) == raw_bytes(expected)

    @pytest.mark.parametrize(
        ("name", "part", "parts"),
        [("c.fused", 4, 4), ("c.fused", -1, 4), ("c.fused", 0, 3), ("d.scalar", 0, 1), ("e.empty", 0, 1)],
    )
    def test_part_that_a_tensor_does_not_have(self, tmp_path: Path, name: str, part: int, parts: int) -> None:
        write_two_shards(tmp_path)
        with pytest.raises(CheckpointError, match=f"{name}.*no part {part} of {parts}"):
            Checkpoint.open(tmp_path).segment(name, part, parts)

    def test_unknown_tensor_is_named(self, tmp_path: Path) -> None:
        write_two_shards(tmp_path)
        with pytest.raises(MissingTensorError, match=r"'experts\.9\.w1'"):
            Checkpoint.open(tmp_path).segment("experts.9.w1")

    def test_shards_may_be_links_into_a_cache(self, tmp_path: Path) -> None:
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
        blobs.mkdir()
        snapshot.mkdir()
        tensors = write_two_shards(blobs)
        for file in (FIRST, SECOND, INDEX_FILE):
            (snapshot / file).symlink_to(blobs / file)
        assert Checkpoint.open(snapshot).tensors.keys() == tensors.keys()


class TestFolder:
    def test_missing_shard_is_named(self, tmp_path: Path) -> None:
        write_two_shards(tmp_path)
        (tmp_path / SECOND).unlink()
        with pytest.raises(MissingTensorError, match=f"{SECOND}.*missing.*download"):
            Checkpoint.open(tmp_path)

    @pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth"])
    def test_pickles_are_refused(self, tmp_path: Path, file: str) -> None:
        (tmp_path / file).write_bytes(b"\x80\x04.")
        with pytest.raises(UnsupportedModelError, match=f"{file}.*safetensors"):
            Checkpoint.open(tmp_path)

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(MissingTensorError, match=r"no \*\.safetensors"):
            Checkpoint.open(tmp_path)

    @pytest.mark.parametrize("name", ["absent", "file", "a\0b"])
    def test_not_a_folder(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="not a readable checkpoint folder"):
            Checkpoint.open(tmp_path / name)

    def test_same_tensor_twice_without_an_index(self, tmp_path: Path) -> None:
        save_file({"x": torch.ones(1)}, tmp_path / "one.safetensors")
        save_file({"x": torch.ones(1)}, tmp_path / "two.safetensors")
        with pytest.raises(CheckpointError, match=r"'x' is in one\.safetensors and in two\.safetensors"):
            Checkpoint.open(tmp_path)

    def test_a_folder_as_shard(self, tmp_path: Path) -> None:
        (tmp_path / SINGLE_FILE).mkdir()
        with pytest.raises(CheckpointError, match="not a regular file"):
            Checkpoint.open(tmp_path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="platform without named pipes")
    def test_a_pipe_as_shard_does_not_block(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / SINGLE_FILE)
        with pytest.raises(CheckpointError, match="not a regular file"):
            Checkpoint.open(tmp_path)


class TestIndex:
    @pytest.mark.parametrize(
        "file",
        [
            "../x.safetensors",
            "/etc/x.safetensors",
            "sub/../../x.safetensors",
            "..\\x.safetensors",
            "C:\\x.safetensors",
            "weights.bin",
            "",
            "a\0.safetensors",
            "\ud800.safetensors",
            3,
            None,
        ],
    )
    def test_place_outside_the_folder_or_not_safetensors(self, tmp_path: Path, file: object) -> None:
        write_two_shards(tmp_path)
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a.weight": file}}))
        with pytest.raises(CheckpointError, match=r"'a.weight'.*not a safetensors file inside the folder"):
            Checkpoint.open(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
    def test_malformed(self, tmp_path: Path, text: str) -> None:
        write_two_shards(tmp_path)
        (tmp_path / INDEX_FILE).write_text(text)
        with pytest.raises(CheckpointError, match="index"):
            Checkpoint.open(tmp_path)

    def test_tensor_that_its_shard_does_not_have(self, tmp_path: Path) -> None:
        write_two_shards(tmp_path)
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a.weight": FIRST, "b.scale": SECOND}}))
        checkpoint = Checkpoint.open(tmp_path)  # in FIRST it is
        assert (checkpoint.tensors["b.scale"].shard, checkpoint.misplaced, checkpoint.index_fault) == (0, {}, "")
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a.weight": FIRST, "z": SECOND}}))
        checkpoint = Checkpoint.open(tmp_path)
        with pytest.raises(MissingTensorError, match=f"no tensor 'z'.*{INDEX_FILE} places tensor 'z' in {SECOND}"):
            checkpoint.segment("z")


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to three edits where the structure is: in the first 600 bytes, or the file's length."""
    changed = bytearray(data)
    tokens = [
        b"{",
        b"}",
        b"[",
        b'"',
        b"-1",
        b"0",
        b"9" * 20,
        b"null",
        b"1e3",
        b"../",
        b"\0",
        b"\xff",
        b"BF16",
        b"F4",
        b",",
    ]
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(min(len(changed), 600)) if changed else 0
        kind = chance.randrange(5)
        if kind == 0 and changed:
            changed[at] = chance.randrange(256)
        elif kind == 1:
            changed[at:at] = chance.choice(tokens)
        elif kind == 2:
            del changed[at : at + chance.randint(1, 8)]
        elif kind == 3:
            token = chance.choice(tokens)
            changed[at : at + len(token)] = token
        else:
            del changed[chance.randrange(len(changed) + 1) :]
    return bytes(changed)


@pytest.mark.parametrize("file", [FIRST, INDEX_FILE])
def test_mutated_files_end_in_a_typed_error_or_a_correct_load(tmp_path: Path, file: str) -> None:
    write_two_shards(tmp_path)
    intact = (tmp_path / file).read_bytes()
    chance = random.Random(7)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(150):
        (tmp_path / file).write_bytes(mutate(intact, chance))
        try:
            checkpoint = Checkpoint.open(tmp_path)
        except OffmoeError:
            outcomes["refused"] += 1
            continue
        outcomes["loaded"] += 1
        for name, info in checkpoint.tensors.items():
            with safe_open(checkpoint.shards[info.shard], "pt") as reference:
                expected = reference.get_tensor(name)
            assert (info.dtype, info.shape) == (expected.dtype, tuple(expected.shape))
            assert bytes_at(checkpoint, info) == raw_bytes(expected)
    assert outcomes["refused"] > 50


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_shard(tmp_path: Path, keep: int) -> None:
    write_two_shards(tmp_path)
    content = (tmp_path / SECOND).read_bytes()
    (tmp_path / SECOND).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=SECOND):
        Checkpoint.open(tmp_path)
