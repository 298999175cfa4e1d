"""A packed model is the model with its experts as the quantizer made them, whatever interrupted the packing."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import json
import re
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import offmoe
from offmoe.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    OffmoeError,
    TransferError,
    UnsupportedModelError,
)
from offmoe.hf.load.config import PACK_MANIFEST
from offmoe.pack import pack as packing
from offmoe.pack.pack import pack, weight_format
from offmoe.pack.quantizer import TorchQuantizer
from offmoe.quant.packed_weight import WeightFormat
from offmoe.storage.shard_writer import write_file
from tests import quantized, tiny
from tests.packed import values

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
PROMPT = {"input_ids": tiny.prompt()}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
INT4, INT4_ZEROS, INT8 = weight_format("int4"), weight_format("int4", 32, zero_points=True), weight_format("int8")
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
SHARD_BYTES = 40_000


def save(folder: Path, family: str = "mixtral", dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Path:
    own = {"moe_intermediate_size": 64} if "moe_intermediate_size" in tiny.CONFIGS[family] else {}
    return tiny.save(tiny.build(family, dtype, **{**SIZES, **own, **overrides}), folder, max_shard_size="100KB")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that the safetensors reader gives, by the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {file: load_file(folder / file) for file in set(index.values())}
    return {name: shards[file][name] for name, file in index.items()}


def expected(source: Path, how: WeightFormat) -> dict[str, torch.Tensor]:
    """The experts' weights as the quantizer decodes them, float32."""
    return {
        name: values(TorchQuantizer()(weight, WeightFormat(how.kind, how.group, how.zero_points, weight.dtype)))
        for name, weight in tensors(source).items()
        if EXPERT.search(name)
    }


def run(model: tiny.Model) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(**PROMPT).logits, model.generate(**PROMPT, **GREEDY)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CASES = [
    *((family, INT4, torch.bfloat16) for family in FAMILIES),
    ("mixtral", INT4_ZEROS, torch.bfloat16),
    ("mixtral", INT8, torch.bfloat16),
    ("qwen3_moe", INT4_ZEROS, torch.float16),
    ("qwen3_moe", INT8, torch.float32),
]


@pytest.mark.parametrize(("family", "how", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_a_packed_model_computes_what_the_quantized_weights_do(
    tmp_path: Path, family: str, how: WeightFormat, dtype: torch.dtype
) -> None:
    source, out = save(tmp_path / "source", family, dtype), tmp_path / "out"
    done = pack(source, out, how, shard_bytes=SHARD_BYTES)
    wanted, before, after = expected(source, how), tensors(source), tensors(out)
    assert len(wanted) == 3 * tiny.NUM_EXPERTS * len(done.layers)
    for name in before.keys() - wanted.keys():
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
    assert {name for name in after if name.startswith(tuple(wanted))} == after.keys() - before.keys()
    # stock transformers on a checkpoint of the values
    tiny.edit(source, {name: values.to(dtype) for name, values in wanted.items()})
    stock = run(AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval())
    ours = offmoe.from_pretrained(out, device="cpu", slots_per_layer=3, exactness="bitwise")
    with ours.offload:
        logits, tokens = run(ours)
    assert torch.equal(logits, stock[0])
    assert torch.equal(tokens, stock[1])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_fused_experts_are_cut_into_the_same_matrices(tmp_path: Path, family: str) -> None:
    own = {"moe_intermediate_size": 64} if family != "mixtral" else {}
    model = tiny.build(family, torch.bfloat16, **SIZES, **own)
    packed = []
    for original in (True, False):
        source, out = tmp_path / f"source{original}", tmp_path / f"out{original}"
        tiny.save(model, source, original_format=original)
        done = pack(source, out, INT4)
        ours = offmoe.from_pretrained(out, device="cpu", slots_per_layer=3, exactness="bitwise")
        with ours.offload:
            packed.append((done.bytes_in, done.layers, *run(ours)))
    (size, losses, logits, tokens), other = packed
    assert (size, losses) == other[:2]
    assert torch.equal(logits, other[2])
    assert torch.equal(tokens, other[3])


def test_what_was_lost_is_what_is_reported(tmp_path: Path) -> None:
    source, out = save(tmp_path / "source"), tmp_path / "out"
    seen: list[tuple[int, int]] = []
    done = pack(source, out, INT4, shard_bytes=SHARD_BYTES, progress=lambda *at: seen.append(at))
    weights, wanted = tensors(source), expected(source, INT4)
    decoded = {name: values.bfloat16().double() for name, values in wanted.items()}
    for number, (name, loss) in enumerate(done.layers.items()):
        assert name == f"model.layers.{number}.mlp.experts"
        mine = [key for key in decoded if f".layers.{number}." in key]
        error = torch.stack([(decoded[key] - weights[key]).abs() for key in mine])
        square = torch.stack([weights[key].double().square() for key in mine]).sum()
        assert loss.max_error == pytest.approx(float(error.max()))
        assert loss.mean_error == pytest.approx(float(error.mean()), rel=1e-4)
        assert loss.relative_error == pytest.approx(float((error.square().sum() / square).sqrt()), rel=1e-4)
        assert 0.05 < loss.relative_error < 0.12
    assert done.max_error == max(loss.max_error for loss in done.layers.values())
    assert done.bytes_in == sum(t.nbytes for t in weights.values())
    assert done.bytes_out == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert seen == sorted(seen)
    assert seen[-1] == (done.bytes_in, done.bytes_in)


def test_an_expert_is_one_run_of_bytes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(save(tmp_path / "source"), out, INT4)
    shard = (out / "model-00002-of-00002.safetensors").read_bytes()
    names = list(json.loads(shard[8 : 8 + int.from_bytes(shard[:8], "little")]))[1:]
    experts = [re.sub(r"(\.experts\.\d+)\..*", r"\1", name) for name in names]
    runs = [expert for expert, _ in itertools.groupby(experts)]
    assert len(runs) == len(set(runs)) == 2 * tiny.NUM_EXPERTS


@pytest.mark.parametrize("how", [INT4, INT4_ZEROS, INT8], ids=str)
def test_the_config_says_what_the_tensors_are(tmp_path: Path, how: WeightFormat) -> None:
    source, out = save(tmp_path / "source", "qwen2_moe"), tmp_path / "out"
    (source / "vocab.txt").write_text("a b c")
    pack(source, out, how)
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    weights = quantization["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (how.bits, how.group)
    assert weights["symmetric"] is not how.zero_points
    dense = {name.removesuffix(".weight") for name, t in tensors(source).items() if t.ndim == 2}
    assert {name for name in dense if not EXPERT.search(f"{name}.weight")} <= set(quantization["ignore"])
    assert not any(".experts." in name for name in quantization["ignore"])
    assert "model.layers.0.mlp.shared_expert.up_proj" in quantization["ignore"]
    assert (out / "vocab.txt").read_text() == "a b c"
    assert (out / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


@pytest.mark.parametrize("how", [INT4, INT4_ZEROS, INT8], ids=str)
def test_compressed_tensors_decodes_the_same_values(tmp_path: Path, how: WeightFormat) -> None:
    ct = pytest.importorskip("compressed_tensors")
    source, out = save(tmp_path / "source", num_hidden_layers=1), tmp_path / "out"
    pack(source, out, how)
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    config = ct.quantization.QuantizationConfig.model_validate(quantization)
    scheme = config.config_groups["group_0"]
    packed = tensors(out)
    endings = ["packed", "scale", "shape", *(["zero_point"] if how.zero_points else [])]
    compressor = ct.compressors.PackedQuantizationCompressor
    for name, weight in expected(source, how).items():
        raw = {f"weight_{ending}": packed[f"{name}_{ending}"] for ending in endings}
        assert torch.equal(compressor.decompress(raw, scheme)["weight"], weight.bfloat16())


# --- interruptions


class Stopped(Exception):
    pass


def interrupted(source: Path, out: Path, after: int) -> None:
    """Pack until `after` bytes of the source are done."""

    def stop(done: int, total: int) -> None:
        if done >= after:
            raise Stopped

    with pytest.raises(Stopped):
        pack(source, out, INT4, shard_bytes=SHARD_BYTES, progress=stop)


def test_an_interrupted_run_goes_on_and_makes_the_same_files(tmp_path: Path) -> None:
    source, out = save(tmp_path / "source"), tmp_path / "out"
    whole = pack(source, tmp_path / "whole", INT4, shard_bytes=SHARD_BYTES)
    interrupted(source, out, 0)
    assert not out.exists()
    for share in (0.3, 0.7):
        interrupted(source, out, int(share * whole.bytes_in))
        assert not list(out.glob("*.partial"))
        assert not (out / "config.json").exists()
        with pytest.raises(CheckpointError, match=r"was interrupted; run the same 'offmoe pack' again"):
            offmoe.from_pretrained(out, device="cpu")
    kept = pack(source, out, INT4, shard_bytes=SHARD_BYTES)
    assert 0 < kept.kept < len(list(out.glob("*.safetensors")))
    assert (kept.layers, whole.kept) == (whole.layers, 0)
    assert contents(out) == contents(tmp_path / "whole")
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    again = pack(source, out, INT4, shard_bytes=SHARD_BYTES)
    assert again.kept == len(times)
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}


def test_a_finished_shard_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    source, out = save(tmp_path / "source"), tmp_path / "out"
    pack(source, out, INT4, shard_bytes=SHARD_BYTES)
    before = contents(out)
    shard = min(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert pack(source, out, INT4, shard_bytes=SHARD_BYTES).kept == len(list(out.glob("*.safetensors"))) - 1
    assert contents(out) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda manifest: {**manifest, "version": 2}, "by another version of offmoe"),
        (lambda manifest: {**manifest, "options": {**manifest["options"], "group": 32}}, "with other options"),
        (lambda manifest: {**manifest, "source": {}}, "from another model"),
        (lambda manifest: {**manifest, "shards": [1]}, "not a manifest"),
        (lambda manifest: [], "not a manifest"),
    ],
)
def test_another_manifest_is_refused(tmp_path: Path, change, says: str) -> None:
    source, out = save(tmp_path / "source"), tmp_path / "out"
    interrupted(source, out, 200_000)
    (out / PACK_MANIFEST).write_text(json.dumps(change(json.loads((out / PACK_MANIFEST).read_text()))))
    before = contents(out)
    with pytest.raises(ConfigError, match=f"{says}.*pack again"):
        pack(source, out, INT4, shard_bytes=SHARD_BYTES)
    assert contents(out) == before


# --- refusals


def refused(error: type[OffmoeError], says: str, source: Path, out: Path, how: WeightFormat = INT4) -> None:
    with pytest.raises(error, match=says):
        pack(source, out, how, shard_bytes=SHARD_BYTES)
    assert not list(out.parent.rglob("*.partial"))


def test_models_that_cannot_be_packed_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    already, _ = quantized.save(tmp_path, "mixtral", "ct-int4")
    refused(UnsupportedModelError, "quantized by 'compressed-tensors' already", already, out)
    transposed = save(tmp_path / "a", "gpt_oss")
    refused(UnsupportedModelError, "'model.layers.0.mlp.experts' cannot be packed.*in 'model", transposed, out)
    nameless = save(tmp_path / "c", "granitemoe")
    refused(UnsupportedModelError, "cannot be packed.*no names for single ones", nameless, out)
    odd = save(tmp_path / "d", intermediate_size=72)
    refused(
        UnsupportedModelError, r"w1.weight is \[72, 64\]; int4 in groups of 64 needs multiples of \[16, 64\]", odd, out
    )
    wide = save(tmp_path / "e", intermediate_size=96)
    refused(UnsupportedModelError, "needs multiples", wide, out)
    assert not out.exists()
    pack(wide, out, weight_format("int4", 32))


@pytest.mark.parametrize(("value", "how"), [(float("nan"), INT4), (float("inf"), INT4), (float("-inf"), INT8)], ids=str)
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float, how: WeightFormat) -> None:
    source, out = save(tmp_path / "source"), tmp_path / "out"
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    weight = tiny.tensor(source, name)
    weight[5, 6] = value
    tiny.edit(source, {name: weight})
    refused(CheckpointError, f"{re.escape(name)} holds NaN or infinity", source, out, how)
    assert not (out / "config.json").exists()


def test_places_that_are_something_else_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    before = contents(source)
    for out in (source, source / "out", tmp_path):
        refused(ConfigError, "the model's own folder", source, out)
    (tmp_path / "link").symlink_to(source)
    refused(ConfigError, "the model's own folder", source, tmp_path / "link" / "out")
    file = tmp_path / "file"
    file.write_text("mine")
    refused(ConfigError, "is not a folder", source, file)
    refused(ConfigError, "cannot be used", source, file / "out")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    refused(ConfigError, r"holds other files \(notes.txt\).*delete", source, other)
    assert contents(source) == before
    assert contents(other) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (("int3",), "use 'int4' or 'int8'"),
        (("native",), "use 'int4' or 'int8'"),
        (("int4", 48), "48 is not one of 32, 64, 128"),
        (("int8", 64), "one scale per row"),
        (("int8", None, True), "one scale per row"),
    ],
)
def test_formats_that_cannot_be(wrong: tuple, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        weight_format(*wrong)


def test_a_disk_that_is_too_small_is_refused_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = save(tmp_path / "source"), tmp_path / "out"
    needed = pack(source, tmp_path / "other", INT4, shard_bytes=SHARD_BYTES).bytes_out
    interrupted(source, out, 200_000)
    kept = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert kept
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - kept - 1))
    refused(CapacityError, r"KiB are to be written, and .* KiB are free", source, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - kept))
    assert pack(source, out, INT4, shard_bytes=SHARD_BYTES).kept


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = save(tmp_path / "source"), tmp_path / "out"
    open_file = builtins.open

    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Path, *args: Any, **options: Any):
        if Path(path).name == full:
            return Full(path, "wb")
        return open_file(path, *args, **options)

    monkeypatch.setattr(builtins, "open", opened)
    full = f"{PACK_MANIFEST}.partial"
    refused(CapacityError, "the disk is full.*make room", source, out)
    assert not out.exists()
    full = "model-00005-of-00005.safetensors.partial"
    refused(CapacityError, "the disk is full.*make room.*finished shards are kept", source, out)
    monkeypatch.undo()
    assert pack(source, out, INT4, shard_bytes=SHARD_BYTES).kept


def test_a_killed_run_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run leaves a half-written file; neither a refused run nor one that resumes stumbles over it."""
    source, out = save(tmp_path / "source"), tmp_path / "out"
    whole = pack(source, out, INT4, shard_bytes=SHARD_BYTES)
    before = contents(out)
    unfinished = json.loads(before[PACK_MANIFEST]) | {"shards": {}}
    for path in out.iterdir():
        path.unlink()
    (out / PACK_MANIFEST).write_text(json.dumps(unfinished))
    (out / "model-00001-of-00005.safetensors.partial").write_bytes(b"half")
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1000))
        with pytest.raises(CapacityError):
            pack(source, out, INT4, shard_bytes=SHARD_BYTES)
    assert pack(source, out, INT4, shard_bytes=SHARD_BYTES).bytes_out == whole.bytes_out
    assert contents(out) == before


def test_memory_that_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever memory runs out, the error is the same, and the next run resumes."""
    source, out = save(tmp_path / "source"), tmp_path / "out"
    empty = torch.empty

    def scarce(*shape: Any, **options: Any) -> torch.Tensor:
        if threading.current_thread().name.startswith("offmoe-pack") and next(room, None) is None:
            raise error
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", scarce)
    full = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes")
    for allocations, reason in ((0, full), (9, full), (60, full), (40, MemoryError())):
        room, error = iter(range(allocations)), reason
        refused(
            CapacityError,
            "no memory to make it, which (takes 8.0 KiB|is only copied).*finished shards are kept",
            source,
            out,
        )
    monkeypatch.undo()
    assert pack(source, out, INT4, shard_bytes=SHARD_BYTES).kept


def test_shards_are_made_at_the_same_time_and_all_are_given_up_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two wait for each other inside `write_file`; then one fails, and the other leaves no file."""
    source, out = save(tmp_path / "source"), tmp_path / "out"
    both, write = threading.Barrier(2, timeout=60), write_file

    def meet(path: Path, pieces: Iterator[bytes]) -> str:
        if path.suffix != ".safetensors":
            return write(path, pieces)
        if both.wait() == 0:
            raise OSError("this one's disk is gone")
        list(pieces)
        raise AssertionError("it went on though the other had failed")

    def halt(done: int, total: int) -> None:
        time.sleep(0.005)  # the failure has time to be noticed before the last piece

    monkeypatch.setattr(packing, "write_file", meet)
    with pytest.raises(OSError, match="disk is gone"):
        pack(source, out, INT4, shard_bytes=200_000, progress=halt)
    assert not out.exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("offmoe-pack")]


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    source, out = save(tmp_path / "source"), tmp_path / "out"
    shard = max(source.glob("*.safetensors"))

    def replace(done: int, total: int) -> None:
        if done > 200_000:
            shutil.copyfile(shard, tmp_path / "copy")
            shutil.move(tmp_path / "copy", shard)

    with pytest.raises((CheckpointError, TransferError), match="was replaced"):
        pack(source, out, INT4, shard_bytes=SHARD_BYTES, progress=replace)
    with pytest.raises(ConfigError, match="the model has changed since"):
        pack(source, out, INT4, shard_bytes=SHARD_BYTES)
