"""The shared library of C kernels, loaded, checked and called through ctypes, which releases the GIL around every call.

Moves: nothing. Bound: none.
Must never: use a library that was built from other sources than those in its folder, or keep a thread or a pointer
alive after its pool was closed.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from offmoe.compute.kernels.native.build import LIBRARY, sources_digest
from offmoe.errors import CapacityError, ConfigError

MAX_TOKENS = 64
"""Most rows of one call, of all its experts together (offmoe.h)."""

MAX_MULTIPLIED = 128
"""Most rows of one call of `offmoe_multiply` (offmoe.h)."""

KINDS = {"int4": 0, "mxfp4": 1, "int8": 2, "fp8": 3, "bf16": 4, "int5": 5, "int6": 6, "int2": 7, "int3": 8}
KINDS |= {"int8 in groups": 9, "iq4": 10}
SCALE_TYPES = {"bfloat16": 0, "float16": 1, "float32": 2, "uint8": 3, "int8": 4}


def _fields(pointers: str, integers: str) -> tuple[tuple[str, type], ...]:
    """The fields of a structure of offmoe.h: its pointers, then its int32s."""
    return (
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_int32) for name in integers.split()),
    )


class WeightStruct(ctypes.Structure):
    """`struct weight` of offmoe.h."""

    _fields_ = _fields("words scales zeros bias minima high supers", "rows cols group kind scale_type")


class ExpertStruct(ctypes.Structure):
    """`struct expert` of offmoe.h."""

    _fields_ = (
        *((name, WeightStruct) for name in ("gate", "up", "down")),
        ("glu", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("limit", "alpha")),
    )


class AttentionStruct(ctypes.Structure):
    """`struct attention` of offmoe.h."""

    _fields_ = (
        *((name, ctypes.POINTER(WeightStruct)) for name in ("q", "k", "v", "out")),
        *_fields("q_norm k_norm", "width rotary norm"),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    )


class RouterStruct(ctypes.Structure):
    """`struct router` of offmoe.h."""

    _fields_ = (
        ("weight", ctypes.POINTER(WeightStruct)),
        *_fields("correction", "experts top_k sigmoid rounds normalize groups kept_groups logits_float scores_float"),
        ("scale", ctypes.c_float),
    )


class LayerStruct(ctypes.Structure):
    """`struct layer` of offmoe.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention", "router", "experts")),
        ("norms", ctypes.c_void_p * 2),
        ("kinds", ctypes.c_int32 * 2),
        *((name, ctypes.c_int32) for name in ("hidden", "predicts")),
        ("eps", ctypes.c_float * 2),
    )


class StatesStruct(ctypes.Structure):
    """`struct states` of offmoe.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_size_t) for name in ("key_step", "value_step")),
        ("tokens", ctypes.c_int32),
    )


class PassageStruct(ctypes.Structure):
    """`struct passage` of offmoe.h."""

    _fields_ = _fields("x cos sin memory outs normed ids predicted scores", "most done misses")


class EncodingStruct(ctypes.Structure):
    """`struct encoding` of offmoe.h."""

    _fields_ = _fields(
        "weight words scales zeros factors", "rows cols group bits weight_type scale_type candidates refits"
    )


class EncodedStruct(ctypes.Structure):
    """`struct encoded` of offmoe.h."""

    _fields_ = _fields("weight words scales zeros out", "rows cols group bits weight_type scale_type")


class DecodingStruct(ctypes.Structure):
    """`struct decoding` of offmoe.h."""

    _fields_ = _fields("blocks out", "count block_bytes type out_type streams")


class RetilingStruct(ctypes.Structure):
    """`struct retiling` of offmoe.h."""

    _fields_ = _fields("blocks words scales minima high supers", "rows blocks_per_row type")


class TilingStruct(ctypes.Structure):
    """`struct tiling` of offmoe.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "tiles")),
        ("stride", ctypes.c_size_t),
        *((name, ctypes.c_int32) for name in ("count", "width", "entry_bytes")),
        ("flip", ctypes.c_uint32),
    )


class PlacingStruct(ctypes.Structure):
    """`struct placing` of offmoe.h."""

    _fields_ = (
        *(("blocks", RetilingStruct), ("rows", TilingStruct)),
        *((name, ctypes.c_int32) for name in ("tensor", "has_blocks")),
    )


class Library:
    """A loaded library of kernels, in several variants for processors with different instruction sets."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if `path` is no library, or was built from other sources."""
        c = ctypes.CDLL(str(path))
        c.offmoe_sources.restype = c.offmoe_variant_name.restype = ctypes.c_char_p
        if (built := c.offmoe_sources().decode()) != sources_digest():
            raise OSError(f"{path} was built from other sources ({built})")
        c.offmoe_variant.restype = c.offmoe_pool_new.restype = ctypes.c_void_p
        c.offmoe_variant_name.argtypes = c.offmoe_many_tokens.argtypes = (ctypes.c_void_p,)
        c.offmoe_pool_free.argtypes = (ctypes.c_void_p,)
        c.offmoe_pool_free.restype = None
        weight, pointer, integer = ctypes.POINTER(WeightStruct), ctypes.c_void_p, ctypes.c_int
        c.offmoe_experts.argtypes = (pointer, pointer, pointer, pointer, integer, integer, pointer, pointer)
        c.offmoe_gate_up.argtypes = (pointer, pointer, pointer, integer, pointer, pointer)
        c.offmoe_linear.argtypes = (pointer, pointer, weight, integer, pointer, integer, pointer)
        c.offmoe_multiply.argtypes = (pointer, pointer, weight, pointer, integer, pointer)
        attention = ctypes.POINTER(AttentionStruct)
        c.offmoe_attention_floats.argtypes = (attention,)
        c.offmoe_attention_floats.restype = ctypes.c_size_t
        c.offmoe_heads.argtypes = (pointer, pointer, attention, integer, *(pointer,) * 6)
        steps = (ctypes.c_size_t, ctypes.c_size_t)
        c.offmoe_attend.argtypes = (
            *(pointer, pointer, attention, integer, pointer, pointer, integer),
            *(*steps, pointer, pointer),
        )
        c.offmoe_route.argtypes = (pointer, pointer, ctypes.POINTER(RouterStruct), integer, *(pointer,) * 6)
        c.offmoe_layers_bytes.argtypes = (pointer, integer)
        c.offmoe_layers_bytes.restype = ctypes.c_size_t
        c.offmoe_layers.argtypes = (*(pointer,) * 4, integer, integer, ctypes.POINTER(PassageStruct))
        c.offmoe_norm.argtypes = (*(pointer,) * 3, integer, integer, ctypes.c_float, integer, pointer)
        c.offmoe_norm.restype = None
        c.offmoe_read.argtypes = (pointer, pointer, pointer, ctypes.c_size_t)
        c.offmoe_read.restype = ctypes.c_uint64
        c.offmoe_encode.argtypes = (pointer, pointer, ctypes.POINTER(EncodingStruct))
        c.offmoe_compare.argtypes = (pointer, pointer, ctypes.POINTER(EncodedStruct))
        c.offmoe_compare.restype = None
        c.offmoe_decode.argtypes = (pointer, pointer, ctypes.POINTER(DecodingStruct))
        c.offmoe_decode.restype = None
        c.offmoe_retile.argtypes = (ctypes.POINTER(RetilingStruct),)
        c.offmoe_retile.restype = None
        c.offmoe_tile.argtypes = (ctypes.POINTER(TilingStruct),)
        c.offmoe_tile.restype = None
        c.offmoe_place.argtypes = (ctypes.POINTER(PlacingStruct), integer, pointer, ctypes.POINTER(pointer))
        c.offmoe_place.restype = None
        self.calls = c
        self._variants: dict[str, int] = {}
        while handle := c.offmoe_variant(len(self._variants)):
            self._variants[c.offmoe_variant_name(handle).decode()] = handle

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that this processor runs, the fastest last."""
        return tuple(self._variants)

    def variant(self, name: str | None = None) -> int:
        """Handle of a variant; None: of the fastest. Raises ConfigError if this processor does not run it."""
        name = name or self.variants[-1]
        if name not in self._variants:
            raise ConfigError(f"kernel variant {name!r} does not run here; there are {', '.join(self.variants)}")
        return self._variants[name]


class Threads:
    """A pool of threads of the library; the calling thread is one of them."""

    def __init__(self, library: Library, count: int) -> None:
        """Raises CapacityError if there is no memory for the threads."""
        self._calls, self._process = library.calls, os.getpid()
        self._pool = library.calls.offmoe_pool_new(count)
        if not self._pool:
            raise CapacityError("no memory for the CPU kernels' threads; give them fewer")

    @property
    def handle(self) -> int:
        """The pool, as C functions take it."""
        assert self._pool, "used after close"
        assert self._process == os.getpid(), "threads do not follow into a forked process"
        return self._pool  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the threads; idempotent."""
        if self._pool and self._process == os.getpid():
            self._calls.offmoe_pool_free(self._pool)
        self._pool = None


@dataclass(frozen=True)
class KernelStatus:
    """Whether the C kernels can compute experts here."""

    library: Library | None
    """None: they cannot."""
    message: str
    """The variant in use, or the reason and the remedy."""

    @property
    def variant(self) -> str | None:
        """The variant in use."""
        return self.library.variants[-1] if self.library else None


@cache
def status(path: Path = LIBRARY) -> KernelStatus:
    """The state of the C kernels, as `offmoe doctor` reports it. The library is loaded once and kept."""
    remedy = (
        "experts are computed on the CPU by torch's operators, several times slower. "
        "Install a C compiler (Debian, Ubuntu: apt install gcc libc6-dev) and install offmoe again"
    )
    if not path.exists():
        return KernelStatus(None, f"the CPU kernels were not built: {remedy}")
    try:
        library = Library(path)
    except (OSError, AttributeError) as error:
        return KernelStatus(None, f"the CPU kernels do not load ({error}): {remedy}")
    return KernelStatus(library, f"CPU kernels {library.variants[-1]} (available: {', '.join(library.variants)})")
