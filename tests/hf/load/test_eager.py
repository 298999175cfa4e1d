"""What records, transforms, copies or trains a model: works as in stock, or is refused; never another result."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import offmoe
from offmoe.errors import ConfigError
from offmoe.hf.load.config import model_class, read_config
from tests import families, tiny

IDS, OTHER = tiny.prompt(2, 9), tiny.prompt(2, 9, seed=8)
REFUSED = r"cannot be traced, exported or transformed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("eager") / "mixtral")


@pytest.fixture(scope="module")
def stock(folder: Path) -> tiny.Model:
    return tiny.comparable(AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture
def model(folder: Path) -> Iterator[tiny.Model]:
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)
    with model.offload:
        yield model


def logits(model: tiny.Model, ids: torch.Tensor = OTHER) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def trace(model: tiny.Model) -> object:
    return torch.jit.trace(lambda ids: model(ids, use_cache=False).logits, IDS, check_trace=False)


def trace_inner(model: tiny.Model) -> object:
    """Past the model's own forward."""
    return torch.jit.trace(lambda h: model.model.layers[0].mlp(h), torch.randn(1, 5, 32), check_trace=False)


def export(model: tiny.Model) -> object:
    return torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)


def record(mode: Any) -> Callable[[tiny.Model], object]:
    return lambda model: make_fx(lambda ids: model(ids, use_cache=False).logits, tracing_mode=mode)(IDS)


def record_inner(model: tiny.Model) -> object:
    return make_fx(lambda h: model.model.layers[0].mlp(h))(torch.randn(1, 5, 32))


def vmap(model: tiny.Model) -> object:
    return torch.vmap(lambda ids: model(ids[None], use_cache=False).logits[0])(IDS)


def vmap_inner(model: tiny.Model) -> object:
    return torch.vmap(lambda h: model.model.layers[0].mlp(h))(torch.randn(2, 1, 5, 32))


def grad(model: tiny.Model) -> object:
    return torch.func.grad(lambda x: model(inputs_embeds=x, use_cache=False).logits.sum())(torch.randn(1, 3, 32))


@pytest.mark.filterwarnings("ignore")  # torch's about what tracing turns into constants
@pytest.mark.parametrize(
    "call",
    [trace, trace_inner, export, record("real"), record("fake"), record_inner, vmap, vmap_inner, grad],
    ids=[
        *("jit.trace", "jit.trace of a block", "export", "make_fx", "make_fx of fake tensors", "make_fx of a block"),
        *("vmap", "vmap of a block", "func.grad"),
    ],
)
def test_what_records_or_transforms_is_refused(
    model: tiny.Model, stock: tiny.Model, call: Callable[[tiny.Model], object]
) -> None:
    with pytest.raises(ConfigError, match=REFUSED):
        call(model)
    assert torch.equal(logits(model), logits(stock)), "the model works on"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tangent_is_refused(model: tiny.Model) -> None:
    x = torch.randn(1, 5, 32)
    with forward_ad.dual_level(), pytest.raises(ConfigError, match="gradients do not pass"):
        model.model.layers[0].mlp(forward_ad.make_dual(x, torch.ones_like(x)))


def test_compiled_it_gives_the_same_bits(model: tiny.Model, stock: tiny.Model) -> None:
    """Experts run outside the graphs. A backend that rounds otherwise would show nothing here."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for ids in (IDS, OTHER, tiny.prompt(1, 1)):
        assert torch.equal(logits(compiled, ids), logits(stock, ids))
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(IDS[:1], **options), stock.generate(IDS[:1], **options))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # torch's
def test_with_a_compiled_block_it_gives_the_same_bits(model: tiny.Model, stock: tiny.Model) -> None:
    torch.compiler.reset()
    model.model.layers[1].mlp.compile(backend="eager")
    for ids in (IDS, OTHER):
        assert torch.equal(logits(model, ids), logits(stock, ids))


def compile_whole(model: tiny.Model) -> object:
    return torch.compile(model, backend="eager", fullgraph=True)(IDS, use_cache=False)


def export_strictly(model: tiny.Model) -> object:
    return torch.export.export(model, (IDS,), {"use_cache": False}, strict=True)


@pytest.mark.parametrize("call", [compile_whole, export_strictly])
def test_one_graph_of_everything_is_refused_with_the_reason(
    model: tiny.Model, call: Callable[[tiny.Model], object]
) -> None:
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"offmoe chooses and moves experts .* fullgraph=True"):
        call(model)


def test_dense_weights_can_be_replaced_for_a_call(model: tiny.Model, stock: tiny.Model) -> None:
    dense = {name: weight * 1.01 for name, weight in model.named_parameters()}
    found, wanted = (torch.func.functional_call(m, dense, (IDS,), {"use_cache": False}).logits for m in (model, stock))
    assert torch.equal(found, wanted)
    assert torch.equal(logits(model), logits(stock)), "and are as before afterwards"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "jetmoe", "llama4", "switch_transformers"])
def test_weights_of_experts_cannot_be_replaced(tmp_path: Path, family: str) -> None:
    folder = tiny.save(families.build(family), tmp_path / "model")
    stock = tiny.comparable(model_class(read_config(folder)).from_pretrained(folder))
    model = offmoe.from_pretrained(folder, slots_per_layer=3)
    inputs = families.inputs(family)
    with model.offload, torch.no_grad():
        dense = dict(model.named_parameters())
        experts = {name: weight * 2 for name, weight in stock.named_parameters() if name not in dense}
        assert experts
        before = model(**inputs).logits
        for name, weight in list(experts.items())[:6]:
            assert not torch.equal(torch.func.functional_call(stock, {name: weight}, (), inputs).logits, before)
            with pytest.raises((ConfigError, TypeError, AttributeError)):
                torch.func.functional_call(model, {name: weight}, (), inputs)
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda x: torch.save(x, io.BytesIO())],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("part", ["model", "model.model.layers", "offload"])
def test_copies_are_refused(model: tiny.Model, part: str, duplicate: Callable[[Any], object]) -> None:
    thing: Any = {"model": model, "model.model.layers": model.model.layers, "offload": model.offload}[part]
    if duplicate is copy.copy and part == "model.model.layers":
        assert copy.copy(thing)[0] is thing[0], "a shallow copy of a list of layers shares them"
        return
    with pytest.raises(ConfigError, match="cannot be copied or pickled"):
        duplicate(thing)


def test_data_parallel(model: tiny.Model, stock: tiny.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one device it only calls the model; for several it makes replicas."""
    data_parallel = importlib.import_module("torch.nn.parallel.data_parallel")
    monkeypatch.setattr(data_parallel, "_get_available_device_type", lambda: None)  # tests may bring a device
    assert torch.equal(torch.nn.DataParallel(model)(OTHER, use_cache=False).logits, logits(stock))
    with pytest.raises(ConfigError, match="cannot be replicated"):
        model._replicate_for_data_parallel()


def loss(model: tiny.Model) -> torch.Tensor:
    return model(IDS, labels=IDS, use_cache=False).loss


def test_training_is_refused_and_its_remedies_work(model: tiny.Model, stock: tiny.Model, tmp_path: Path) -> None:
    model.train()
    for refused in (lambda: loss(model), lambda: loss(Accelerator(cpu=True).prepare_model(model))):
        with pytest.raises(ConfigError, match=r"in training mode .* model\.eval\(\), or .* torch\.no_grad\(\)"):
            refused()
    with torch.no_grad():
        assert torch.equal(loss(model), loss(stock))
    assert torch.equal(
        model.generate(IDS, max_new_tokens=3, do_sample=False), stock.generate(IDS, max_new_tokens=3, do_sample=False)
    )
    assert torch.equal(loss(model.eval()), loss(stock))
    options: Any = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 1}
    for precision in (False, True):
        trainer = Trainer(
            model,
            TrainingArguments(str(tmp_path / "out"), bf16=precision, **options),
            train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}],
        )
        with pytest.raises(ConfigError, match="in training mode"):
            trainer.train()


def test_weights_behind_the_last_experts_can_be_trained(model: tiny.Model, stock: tiny.Model) -> None:
    model.train()
    try:
        gradients = []
        for each in (model, stock):
            each.lm_head.requires_grad_(True)
            loss(each).backward()
            gradients.append(each.lm_head.weight.grad)
        assert torch.equal(*gradients)
    finally:
        stock.lm_head.requires_grad_(False)
        stock.lm_head.weight.grad = None


def test_weights_before_experts_cannot(model: tiny.Model) -> None:
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ConfigError, match="gradients do not pass"):
        loss(model)
