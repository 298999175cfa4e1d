"""Greedy tokens of the demo as a GGUF file are those of llama.cpp.

Runs where pytest is given --llama-library FOLDER, with libllama, libggml-base, libggml and its backends. On a CPU
llama.cpp rounds the inputs of a product to the type that goes with the weights, to 8 bits for quantized ones, which
offmoe does not. Where two experts are as likely to the router, up to that rounding, each program may take another one;
then the token's logits move by up to 1.2.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import offmoe
from tests import gguf_models
from tests.gguf_models import Kinds, Q, Quantize, all_of

WORKER = Path(__file__).resolve().parents[1] / "tools" / "bench" / "llama_worker.py"
PROMPT = "The king said unto him"
TOKENS = 48
TIE = 0.005
"""Distance of the last chosen and the first unchosen expert, in router logits (standard deviation 1.2). In Q4_K_M the
token 45 differs: there it is 0.003 in one layer, and two tokens' logits are 0.3 apart."""
MEAN = 0.06
"""Mean distance of logits (standard deviation 2.7). It was 0.042 in Q4_K_M, and 0.006 in BF16."""


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--llama-library")
    if folder is None:
        pytest.skip("needs --llama-library FOLDER with llama.cpp's libraries")
    return Path(folder)


def quantized_by_llama_cpp(library: Path) -> Quantize:
    """ggml_quantize_chunk, which has all types."""
    base = ctypes.CDLL(str(next(library.glob("libggml-base.*"))))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    base.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, size, size, size, pointer)
    base.ggml_quantize_chunk.restype = ctypes.c_size_t

    def quantize(values: np.ndarray, kind: Any) -> np.ndarray:
        rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]), np.float32)
        count, nbytes = gguf.GGML_QUANT_SIZES[kind]
        out = np.zeros((len(rows), rows.shape[1] // count * nbytes), np.uint8)
        written = base.ggml_quantize_chunk(
            int(kind), rows.ctypes.data, out.ctypes.data, 0, len(rows), rows.shape[1], None
        )
        assert written == out.nbytes
        return out.reshape(*values.shape[:-1], -1)

    return quantize


def q4_k_m(name: str) -> Any:
    """The mixture of llama-quantize's Q4_K_M. Rows of 128 values hold no block of 256, so other types replace it."""
    if "down" in name:
        return gguf_models.q4_k_m(name)
    return Q.Q8_0 if "token_embd" in name else Q.Q5_0


KINDS = {"Q4_K_M": q4_k_m, "Q8_0": all_of(Q.Q8_0), "MXFP4": all_of(Q.MXFP4), "BF16": all_of(Q.BF16)}


def greedy_in_llama_cpp(library: Path, file: Path, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """Tokens, and the logits [TOKENS, vocabulary] that each was chosen by."""
    task = {"program": "greedy", "path": str(library), "model": str(file), "ids": ids, "tokens": TOKENS}
    command = [sys.executable, str(WORKER), json.dumps({**task, "threads": 1, "capped": True})]
    done = subprocess.run(command, input="\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["tokens"], torch.tensor(found["logits"])


def router_margins(model: Any) -> list[torch.Tensor]:
    """Per MoE layer, how far the first unchosen expert was from the last chosen one, [tokens]; filled by a pass."""
    found: list[torch.Tensor] = []

    def look(gate: Any, args: tuple[torch.Tensor, ...], out: object) -> None:
        logits = args[0].flatten(0, -2) @ gate.weight.mT
        best = logits.topk(model.config.num_experts_per_tok + 1).values
        found.append(best[:, -2] - best[:, -1])

    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(look)
    return found


@pytest.mark.parametrize("exactness", ["bitwise", "numeric"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens(library: Path, tmp_path: Path, kind: str, exactness: str) -> None:
    kinds: Kinds = KINDS[kind]
    file = gguf_models.save_demo(tmp_path, kinds, quantized_by_llama_cpp(library)).file
    ids = AutoTokenizer.from_pretrained(gguf_models.DEMO)(PROMPT)["input_ids"]
    tokens, theirs = greedy_in_llama_cpp(library, file, ids)
    model: Any = offmoe.from_pretrained(file, device="cpu", slots_per_layer=3, dtype="float32", exactness=exactness)
    margins = router_margins(model)
    with model.offload, torch.inference_mode():
        ours = model(torch.tensor([ids + tokens[:-1]])).logits[0, len(ids) - 1 :].float()
    assert (ours - theirs).abs().mean() < MEAN
    differing = [i for i, token in enumerate(tokens) if int(ours[i].argmax()) != token]
    assert len(margins) == 6
    nearest = torch.stack(margins).amin(0)[len(ids) - 1 :]
    assert all(nearest[i] < TIE for i in differing), (differing, nearest)
    assert kind == "Q4_K_M" or not differing
