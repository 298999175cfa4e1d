"""Writes docs/families.md, the table of what tests/test_families.py saw; `tools/families` runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import transformers

from offmoe.hf.gguf.architectures import ARCHITECTURES
from tests import families

PATH = Path(__file__).resolve().parents[1] / "docs" / "families.md"


@dataclass(frozen=True)
class Finding:
    """What one run of the test saw of a family in one dtype, as the table shows it."""

    family: str
    dtype: str
    architecture: str
    path: str
    layouts: str
    shared: str
    prediction: str
    result: str


@dataclass(frozen=True)
class Found:
    """Everything that the tests of one run saw. The tests fill it."""

    text: list[Finding] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)


HEAD = """# Families

`tools/families` writes this page. Each line is what `tests/test_families.py` saw on a tiny random model of the
family: transformers {version}, a CPU, three expert slots per layer (top_k if that is more).

* **path**: "registry" means that the experts go through transformers' experts registry and no code of offmoe knows
  the family. "adapter" means that a class in `offmoe/hf/adapters/families/` knows it.
* **layouts**: the names of the experts' tensors in the family's own checkpoint format, and how one expert is read.
  "per expert": every expert has tensors of its own. "slice": an expert is one row of a tensor of all experts. Blocks
  of bytes are copied; "+ conversion" means that transformers' own operations convert one expert at a time, and
  "transposed" that a copy transposes. "[in, out]", "biased", "interleaved", "ungated" and "normed" say how the module
  stores its weights and what it computes. The test checks that one read returns exactly the bytes of that expert's
  parameters.
* **shared**: modules that every token uses besides the routed experts. They stay on the device.
* **prediction**: the layers whose experts offmoe predicts exactly from their residual stream, on a prompt that it has
  not seen.
* **fp32, bf16**: "equal" means that the logits are bit-equal to stock's grouped_mm, or to stock's only
  implementation. "x (stock y)" means that stock's own implementations differ from each other by up to y, and offmoe
  from grouped_mm by x, which is not more. Greedy tokens are equal in every case.
* **images**: the same for a prompt with an image, in bf16. "-": the family has no vision, or is not tested with
  images.
* **GGUF**: llama.cpp's name of the family, whose files run too (`tests/test_gguf.py` compares them with stock). "-":
  no file gives this class; of Llama 4 and Qwen3.5-MoE, files run as the text model.

Every family can be calibrated, benchmarked and driven by a recorded routing (`offmoe bench --replay-routing`). Driven
by one recording, offmoe and stock give the same tokens, and fp32 logits that differ by at most 1e-5
(`tests/test_families_measured.py`). Four families need a remark:

* A recording in which a token lacks an expert is refused, except where the family itself has such tokens:
  switch_transformers and nllb-moe drop tokens, longcat_flash sends them to identities.
* nllb-moe computes the experts of dropped tokens with weight 0. In fp32 that can change the last bits of other rows
  of the same product.
* diffusion_gemma writes blocks of tokens in several steps. `bench` divides their time among the tokens, takes no
  `--random-tokens`, and leaves computation out of the bound.

{count} families.

"""
COLUMNS = ("family", "class", "path", "layouts", "shared", "prediction", "fp32", "bf16", "images", "GGUF")


def render(found: Found) -> str:
    """Render the page; both dtypes of every family must have been tested."""
    by_family: dict[str, dict[str, Finding]] = {}
    for finding in found.text:
        by_family.setdefault(finding.family, {})[finding.dtype] = finding
    lines = [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
    for family in sorted(by_family):
        fp32, bf16 = by_family[family]["fp32"], by_family[family]["bf16"]
        predictions = [fp32.prediction]
        if bf16.prediction != fp32.prediction:
            predictions.append(f"bf16: {bf16.prediction}")
        lines.append(
            _row(
                [
                    family,
                    bf16.architecture,
                    bf16.path,
                    bf16.layouts,
                    bf16.shared,
                    "<br>".join(predictions),
                    fp32.result,
                    bf16.result,
                    found.images.get(family, "-"),
                    gguf_name(family),
                ]
            )
        )
    text = HEAD.format(version=transformers.__version__, count=len(by_family)) + "\n".join(lines)
    text += "\n\n## Refused\n`offmoe inspect` says why it refuses these families of transformers with experts:\n\n"
    return text + "\n".join(f"* `{name}`: {why}" for name, why in sorted(families.REFUSED.items())) + "\n"


def listed(text: str) -> list[str]:
    """The families that a page lists, in its order."""
    table = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.split(" | ")[0].removeprefix("| ") for line in table[2:]]


def gguf_name(family: str) -> str:
    """The architecture of the GGUF files of a family; "-" if they do not run."""
    return next((name for name, how in ARCHITECTURES.items() if family in how.model_types), "-")


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"
