"""Every MoE family of transformers, in fp32 and bf16, gives the same logits and tokens as stock.

"Stock" is transformers' default implementation, grouped_mm. If stock's own implementations differ by rounding, offmoe
must be as close to grouped_mm as they are to each other. docs/families.md shows the results.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.errors import UnsupportedModelError
from offmoe.hf.adapters.base import RegistryExperts
from offmoe.hf.adapters.find import adapter_of, find_experts, require_adapter
from offmoe.hf.catalog.catalog import CatalogLayer, ExpertCatalog
from offmoe.hf.load.config import build_meta, model_class, read_config
from offmoe.hf.predict.route_recorder import unpredictable_reasons
from offmoe.hf.predict.router_probe import NOT_CALLED, tensors_in
from offmoe.simulate.replay import replay
from offmoe.storage.store import ExpertStore
from offmoe.trace.trace import read_trace
from offmoe.types import ExpertKey
from tests import families, families_table, tiny
from tests.families_table import Finding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
SLOTS = 3
NEW_TOKENS = 6


def stock_model(folder: Path, dtype: torch.dtype) -> tiny.Model:
    """The model as transformers loads it, made comparable."""
    return tiny.comparable(model_class(read_config(folder)).from_pretrained(folder, dtype=dtype))


def set_implementation(model: tiny.Model, name: str) -> None:
    """Set it on every experts module's own config, because some architectures give layers copies of the model's."""
    for module in find_experts(model).values():
        if in_registry(module):
            config: Any = module.config
            config._experts_implementation = name


def in_registry(module: nn.Module) -> bool:
    """Whether transformers has several implementations of these experts."""
    return isinstance(adapter_of(module), RegistryExperts)


def logits(model: tiny.Model, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def all_logits(stock: tiny.Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of every implementation of stock; the first one stays set."""
    if not any(map(in_registry, find_experts(stock).values())):
        return {"its own": logits(stock, inputs)}
    out = {}
    for name in reversed(IMPLEMENTATIONS):
        set_implementation(stock, name)
        out[name] = logits(stock, inputs)
    return {name: out[name] for name in IMPLEMENTATIONS}


def greedy(model: tiny.Model) -> Tensor:
    torch.manual_seed(0)  # one family starts from random tokens
    ids = tiny.prompt()
    out = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return out if isinstance(out, Tensor) else out.sequences


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def judge(ours: Tensor, stock: dict[str, Tensor]) -> str:
    """Assert that our logits are as close to stock's first implementation as stock's are to each other."""
    reference = next(iter(stock.values()))
    assert torch.isfinite(reference).all()
    if torch.equal(ours, reference):
        return "equal"
    among_stock = max(itertools.starmap(distance, itertools.combinations(stock.values(), 2)), default=0.0)
    found = distance(ours, reference)
    assert among_stock > 0, f"stock agrees with itself, offmoe is {found:.1e} away"
    assert found <= among_stock, f"offmoe is {found:.1e} away, stock's implementations only {among_stock:.1e}"
    return f"{found:.1e} (stock {among_stock:.1e})"


def check_expert_bytes(shards: Sequence[Path], catalog: ExpertCatalog, stock: tiny.Model) -> None:
    """Reading one expert reads its own bytes: as many as its parameters have, and with their values."""
    modules = find_experts(stock)
    with closing(ExpertStore(shards, catalog.records)) as store:
        for number, layer in enumerate(catalog.layers):
            for expert in (0, layer.num_experts - 1):
                key = ExpertKey(number, expert)
                data = read(store, key)
                views = layer.layout.views(torch.zeros(layer.layout.nbytes, dtype=torch.uint8))
                layer.assembly.place(store.record(key).segments, data, views, lambda into, source: into.copy_(source))
                assert sum(len(d) for d in data) == store.record(key).nbytes == sum(v.nbytes for v in views.values())
                if in_registry(modules[layer.name]):
                    for name, view in views.items():
                        assert torch.equal(view, modules[layer.name].get_parameter(name)[expert])


def read(store: ExpertStore, key: ExpertKey) -> list[Tensor]:
    """The bytes of one expert, per segment."""
    memory = torch.zeros(store.buffer_bytes + 4096, dtype=torch.uint8)
    aligned = memory[-memory.data_ptr() % 4096 :][: store.buffer_bytes]
    store.read_into(key, aligned.numpy().data)
    return store.segments(key, aligned)


def predictions(model: tiny.Model, family: str) -> str:
    """Record routes on one prompt; every route must give the experts of another prompt exactly."""
    experts = list(find_experts(model).values())
    probe = tiny.watch(model, experts, lambda: logits(model, families.inputs(family, seed=1)))
    residuals: dict[int, Tensor] = {}
    handles = probe.install(lambda layer, residual: residuals.__setitem__(layer, residual))
    actual = routed(experts, lambda: logits(model, families.inputs(family, batch=1, length=9, seed=7)))
    for handle in handles:
        handle.remove()
    exact = []
    for layer in range(len(experts)):
        if probe.can_predict(layer):
            assert torch.equal(probe.predict(layer, residuals[layer]), actual[layer]), f"layer {layer}"
            exact.append(layer)
    meta = build_meta(model.config, type(model))
    reasons_on_meta = unpredictable_reasons(meta, list(find_experts(meta).values()))
    assert reasons_on_meta in (None, probe.reasons), "the meta device gives other reasons"
    called = [layer for layer in range(len(experts)) if probe.reasons[layer] != NOT_CALLED]
    if len(exact) == len(called):
        return "exact"
    reasons = {str(probe.reasons[layer]) for layer in called if layer not in exact}
    return f"exact in {len(exact)} of {len(called)} layers; else {', '.join(sorted(reasons))}"


def routed(experts: list[nn.Module], run: Callable[[], object]) -> dict[int, Tensor]:
    """The ids that each layer's experts get during `run`, for layers whose ids can be read from a router."""
    seen: dict[int, Tensor] = {}
    hooks = []
    for layer, module in enumerate(experts):
        routing = require_adapter(module).routing(module)
        if routing is None:
            continue
        if routing.router is None:
            hook = module.register_forward_pre_hook(partial(keep_argument, seen, layer))
        else:
            hook = routing.router.register_forward_hook(partial(keep_output, seen, layer, routing.ids))
        hooks.append(hook)
    run()
    for hook in hooks:
        hook.remove()
    return seen


def keep_argument(seen: dict[int, Tensor], layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen[layer] = args[1].clone()


def keep_output(
    seen: dict[int, Tensor], layer: int, ids: Callable[[list[Tensor]], Tensor], _: nn.Module, __: object, output: object
) -> None:
    seen[layer] = ids(list(tensors_in(output))).clone()


def describe_layouts(catalog: ExpertCatalog, model: tiny.Model) -> str:
    modules = find_experts(model)
    return "<br>".join(dict.fromkeys(describe_layout(layer, modules[layer.name]) for layer in catalog.layers))


def describe_layout(layer: CatalogLayer, module: nn.Module) -> str:
    first, second = layer.records[0].segments, layer.records[1].segments
    each = all(a.name != b.name for a, b in zip(first, second, strict=True))
    whole = all(a.name == b.name for a, b in zip(first, second, strict=True))
    how = "per expert" if each else "slice" if whole else "per expert and slice"
    kinds = [
        *(["+ conversion"] if layer.assembly.convert else []),
        *(["transposed"] if any(part.transposed for part in layer.assembly.destinations) else []),
    ]
    if in_registry(module):
        flags = {
            "[in, out]": module.is_transposed,
            "biased": module.has_bias,
            "interleaved": not module.is_concatenated,
            "ungated": not module.has_gate,
            "normed": getattr(module, "has_post_expert_norm", False),
        }
        kinds += [name for name, is_so in flags.items() if is_so]
    names = [re.sub(r"\.\d+(?=\.|$)", ".#", segment.name) for segment in first]
    block = re.match(r".*?layers\.#\.|", names[0])
    assert block is not None
    short = sorted(dict.fromkeys(f"`{name.removeprefix(block[0])}`" for name in names))
    return f"{', '.join(short)}: {', '.join([how, *kinds])}"


def shared_modules(model: tiny.Model) -> str:
    """Modules named as shared in the blocks around the experts, outermost only."""
    found: list[str] = []
    for name in find_experts(model):
        block = name.rpartition(".")[0]
        for place in (block, block.rpartition(".")[0]):
            found += [child for child, _ in model.get_submodule(place).named_children() if "shared" in child]
    return ", ".join(dict.fromkeys(found)) or "-"


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated"
)  # diffusion_gemma imports torch's compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_family_equals_stock(tmp_path: Path, family: str, dtype: str, families_found: families_table.Found) -> None:
    folder = tiny.save(families.build(family, DTYPES[dtype]), tmp_path / "model")
    inputs = families.inputs(family)
    top_k = 3 if "moe_topk" in families.CONFIGS[family] else 2
    with_trace = tmp_path / "run.npz"
    ours = offmoe.from_pretrained(
        folder, device="cpu", slots_per_layer=max(SLOTS, top_k), on_miss="fetch", trace=with_trace
    )
    with ours.offload:
        found = logits(ours, inputs)
        tokens = greedy(ours)
        stats = ours.offload.stats()
    trace = read_trace(with_trace)
    assert trace.options is not None
    assert replay(trace, trace.options).stats == stats
    assert stats.evictions > 0 or family == "nllb-moe"  # whose tiny routers prefer three experts

    stock = stock_model(folder, DTYPES[dtype])
    assert type(ours) is type(stock)
    by_implementation = all_logits(stock, inputs)
    assert torch.equal(tokens, greedy(stock))
    inspected = inspect(folder, ours.offload.config)
    check_expert_bytes(inspected.checkpoint.shards, inspected.catalog, stock)
    result = judge(found, by_implementation)
    families_found.text.append(
        Finding(
            family=family,
            dtype=dtype,
            architecture=type(stock).__name__,
            path="registry" if all(map(in_registry, find_experts(stock).values())) else "adapter",
            layouts=describe_layouts(inspected.catalog, stock),
            shared=shared_modules(stock),
            prediction=predictions(stock, family),
            result=result,
        )
    )


@pytest.mark.parametrize("family", [f for f in families.IMAGES if f in families.FAMILIES])
def test_image_equals_stock(tmp_path: Path, family: str, families_found: families_table.Found) -> None:
    folder = tiny.save(families.build(family, torch.bfloat16), tmp_path / "model")
    inputs = families.image_inputs(family, torch.bfloat16)
    ours = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=SLOTS)
    with ours.offload:
        found = logits(ours, inputs)
    stock = stock_model(folder, torch.bfloat16)
    by_implementation = all_logits(stock, inputs)
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    assert distance(logits(stock, other), found) > 0, "the image makes no difference"
    families_found.images[family] = judge(found, by_implementation)


@pytest.mark.parametrize("family", sorted(families.REFUSED))
def test_refused_family_says_why(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="no text-generating class"):
        model_class(AutoConfig.for_model(family))


def test_every_experts_class_of_transformers_is_in_a_family() -> None:
    sources = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    pattern = re.compile(r"^@use_experts_implementation(?:\(.*?\))?\s*\nclass (\w+)", re.MULTILINE | re.DOTALL)
    registered = {name for source in sources for name in pattern.findall(source.read_text())}
    assert len(registered) >= 60
    tested = set()
    for family in families.FAMILIES:
        config = families.config(family)
        modules = find_experts(build_meta(config, model_class(config))).values()
        tested |= {type(module).__name__ for module in modules}
    assert registered - tested == set(families.REFUSED_CLASSES)


def test_page_lists_the_families_that_are_tested(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-families"):
        pytest.skip("the page is written when all others pass")
    page = families_table.PATH.read_text()
    assert families_table.listed(page) == sorted(families.CONFIGS)
    for family in families.CONFIGS:  # the one column that no test of a family fills
        (line,) = re.findall(rf"^\| {family} \|.*", page, re.MULTILINE)
        assert line.endswith(f"| {families_table.gguf_name(family)} |")
