"""Measures what int8 and int4 experts cost in perplexity: the demo model on held-out text, with quantized experts.

The demo model runs in float32, so that only the weights differ. The text is quality.txt, 180 kB of documents that
training held out (tools/train_demo.py, every fiftieth): the King James Bible, statements of Metamath's set.mm, the
Jargon File and the Devil's Dictionary, all in the public domain (set.mm: CC0). Scoring is that of
offmoe/measure/perplexity.py, with windows of 512 tokens. int4 is in groups of 64. "rtn" rounds to nearest with
symmetric absmax scales, without the search of offmoe/pack/fit.py.

The perplexity of a small text moves by chance too, in either direction. The divergence from the native model does not,
and is more reliable.

Prints a table; with --json one last line {"ppl_native", "ppl_int8", "ppl_int4", "ppl_int4_rtn"}. The exit status is 1
if the figures miss their limits: int8 is at most 0.3 % worse than native, and the search recovers at least a quarter of
what rounding to nearest loses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import checkout
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from offmoe.hf.load.kernel_linears import dense_formats
from offmoe.measure.perplexity import WINDOW, scores, windows
from offmoe.pack.fit import round_to_nearest
from offmoe.pack.plan import encode
from offmoe.pack.quantizer import TorchQuantizer
from offmoe.quant.int_formats import PackedInt
from offmoe.quant.packed_values import values
from offmoe.quant.packed_weight import INT8, WeightFormat, int4

ROOT = checkout.ROOT
MODEL = ROOT / "offmoe" / "demo" / "model"
TEXT = Path(__file__).with_suffix(".txt")
INT8_AT_MOST, SEARCH_RECOVERS = 0.003, 0.25

Quantizer = Callable[[torch.Tensor], torch.Tensor]
"""weight [rows, cols] -> the quantized weight, decoded to float32."""


def quantizer(how: WeightFormat, search: bool = True) -> Quantizer:
    quantize = TorchQuantizer() if search else TorchQuantizer(round_to_nearest)

    def decoded(weight: torch.Tensor) -> torch.Tensor:
        packed = quantize(weight, how)
        raw = {**encode(packed), "scale": packed.scales.float()}  # products in float32
        return PackedInt(how.bits, how.group, symmetric=not how.zero_points).decode(raw, torch.float32)

    return decoded


def changed_model(change: Quantizer | None) -> MixtralForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for stacked in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):  # [experts, rows, cols]
                for expert in stacked if change else ():
                    expert.copy_(change(expert))  # type: ignore[misc]
    return model


def dense_model(form: str) -> MixtralForCausalLM:
    """The model with dense weights as the option `dense` has them; its experts are native."""
    model = changed_model(None)
    quantize = TorchQuantizer()
    with torch.no_grad():
        for name, how in dense_formats(model, form, {}).items():
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_(values(quantize(weight, how, name)))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of the demo model with quantized experts.")
    parser.add_argument("--all", action="store_true", help="also other groups, and zero points")
    parser.add_argument("--dense", action="store_true", help="also dense weights in int8 and int4")
    parser.add_argument("--every", type=int, default=1, help="score every Nth window")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    rows: dict[str, Quantizer | None] = {
        "native": None,
        "int8": quantizer(INT8),
        "int4": quantizer(int4(64)),
        "int4_rtn": quantizer(int4(64), search=False),
    }
    if arguments.all:
        rows |= {
            "int4 in groups of 32": quantizer(int4(32)),
            "int4 in groups of 128": quantizer(int4(128)),
            "int4 with zero points": quantizer(int4(64, zero_points=True)),
        }
    transformers.logging.disable_progress_bar()
    tokens = AutoTokenizer.from_pretrained(MODEL)(TEXT.read_text("utf-8"), return_tensors="pt", verbose=False)
    ids = windows(tokens["input_ids"][0])[:: arguments.every]
    print(f"{len(ids)} windows of {WINDOW} tokens, {len(ids) * WINDOW // 2} tokens scored")
    models = {name: changed_model(change) for name, change in rows.items()}
    if arguments.dense:
        models |= {f"dense {form}": dense_model(form) for form in ("int8", "int4")}
    found = scores(models, ids)
    native, rtn = found["native"], found["int4_rtn"]
    print("                         perplexity           divergence")
    for name, score in found.items():
        worse = 100 * (score.perplexity / native.perplexity - 1)
        print(f"{name:24} {score.perplexity:10.4f}  {worse:+.3f} %  {score.divergence:10.6f}")
    recovered = (rtn.perplexity - found["int4"].perplexity) / (rtn.perplexity - native.perplexity)
    print(
        f"of what rounding to nearest loses the search recovers {recovered:.2f} of the perplexity "
        f"(at least {SEARCH_RECOVERS}), {1 - found['int4'].divergence / rtn.divergence:.2f} of the divergence"
    )
    if arguments.json:
        names = ("native", "int8", "int4", "int4_rtn")
        print(json.dumps({f"ppl_{name}": round(found[name].perplexity, 4) for name in names}))
    if found["int8"].perplexity > native.perplexity * (1 + INT8_AT_MOST) or recovered < SEARCH_RECOVERS:
        sys.exit("quality.py: worse than promised")


if __name__ == "__main__":
    main()
