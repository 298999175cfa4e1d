"""docs/families.md: what tests/test_families.py found, as a table; `tools/families` writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import transformers

from tests import families

PATH = Path(__file__).resolve().parents[1] / "docs" / "families.md"


@dataclass(frozen=True)
class Finding:
    """What one run of the test found out about a family in one dtype; texts as the table shows them."""

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
    """Filled by the tests of one run."""

    text: list[Finding] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)


HEAD = """# Families

Written by `tools/families`, not by hand: each line is what `tests/test_families.py` found with a tiny random model of
the family (transformers {version}, CPU, three expert slots per layer, or top_k where that is more).

* **path**: registry: experts dispatch through transformers' experts registry, and no code of ours knows the family;
  adapter: a class in `offmoe/hf/adapters/families/`.
* **layouts**: names of the experts' tensors in the family's own checkpoint format, and how one expert is read: per
  expert (tensors of its own) or slice (a row of a tensor of all experts); by block copies, or, where it says so, by a
  conversion (transformers' own operations, one expert at a time). transposed: turned on the way. [in, out], biased,
  interleaved, ungated, normed: how the module keeps and computes what it has. What one read brings was checked to be
  that expert's parameters, to the byte.
* **shared**: modules beside the routed experts that every token uses; they stay on the device.
* **prediction**: layers whose experts offmoe predicts exactly from the residual stream, tested on another prompt.
* **fp32, bf16**: equal: logits bit-equal to stock's grouped_mm (or its only implementation). x (stock y): stock's own
  implementations differ by up to y from each other, offmoe by x from grouped_mm, which is not more. Greedy tokens are
  equal in every case.
* **images**: the same for a prompt with an image, in bf16; -: no vision, or not tested with images.

All of them can be calibrated, benchmarked and driven by a recorded routing (`offmoe bench --replay-routing`); with one,
offmoe and stock give the same tokens, and in fp32 logits within 1e-5 (`tests/test_families_measured.py`). A token that
lacks an expert in the recording is refused, but where the family has such tokens: switch_transformers and nllb-moe
drop them, longcat_flash sends them to identities. nllb-moe computes with weight 0 for what it drops; in fp32 that can
change the last bits of other rows of the same product. diffusion_gemma writes blocks of tokens in several steps:
`bench` divides their time among the tokens, takes no `--random-tokens`, and leaves computing out of the bound.

{count} families.

"""
COLUMNS = ("family", "class", "path", "layouts", "shared", "prediction", "fp32", "bf16", "images")


def render(found: Found) -> str:
    """The page. Needs both dtypes of every family."""
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
                ]
            )
        )
    text = HEAD.format(version=transformers.__version__, count=len(by_family)) + "\n".join(lines)
    text += "\n\n## Refused\nKnown to transformers, with experts, and refused with a message by `offmoe inspect`:\n\n"
    return text + "\n".join(f"* `{name}`: {why}" for name, why in sorted(families.REFUSED.items())) + "\n"


def listed(text: str) -> list[str]:
    """Families of a page, in its order."""
    table = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.split(" | ")[0].removeprefix("| ") for line in table[2:]]


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"
