"""Random use of a model: files of a checkpoint, options of loading, and calls, with stock transformers as the oracle.

A case is right if offmoe does what stock does, bit for bit, or refuses with one of `REFUSALS`. It must never fail in
another way where stock works, and never work where stock fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

import offmoe
from offmoe.errors import CapacityError, OffmoeError
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace
from tests import tiny

Values = dict[str, Any]

REFUSALS = (
    r"option '\w+' of transformers: offmoe (sets it itself|cannot honor it); .+",
    r"config= must be a configuration of transformers or the path of one, .+",
    r"'\w+' and config= are both given, .+",
    r"config='.+': there is no such folder or file; .+",
    r"dtype=.+ is not one to compute in\. .+",
    r"dtype=.+ is unknown\. .+",
    r".+generation_config\.json: '\w+' is .+, not (a|a list) .+; download the file again",  # stock may not look at it
    r"slots_per_layer=\d+ .+below top_k=.+",
    r".+ has no experts that offmoe can find .+",
)
"""What offmoe refuses although stock takes it; each message says what to do."""
RANDOM_WEIGHTS = re.compile(
    r"has no tensor|no tensor of|tensor .+ has shape|holds no such model|asks for \d+ experts per token", re.DOTALL
)
"""Refusals where stock fills in random weights: a weight that is absent or of another size is an error in offmoe."""


@dataclass(frozen=True)
class Case:
    """One use of a model.

    Args:
        family: Of `tiny.FAMILIES`.
        dtype: Of the weights at rest.
        config: Values to change in config.json; None removes one.
        generation: generation_config.json: values, or None for no file.
        options: Options of offmoe.
        keywords: Options of transformers' from_pretrained, as both get them.
        calls: Names of functions of `CALLS`, and their arguments.
    """

    family: str
    dtype: torch.dtype
    config: Values
    generation: Values | None
    options: Values
    keywords: Values
    calls: tuple[tuple[str, Values], ...]


@dataclass
class Outcome:
    """What came of a case: why loading failed, or what every call returned or raised."""

    failure: Exception | None = None
    results: list[Any] = field(default_factory=list)
    random_weights: bool = False
    generates: bool = True
    """Whether the model can generate with its own settings."""


class Checkpoints:
    """One checkpoint per family and dtype, written when it is first asked for."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._written: dict[tuple[str, torch.dtype], Path] = {}

    def of(self, family: str, dtype: torch.dtype) -> Path:
        key = (family, dtype)
        if key not in self._written:
            path = self._folder / f"{family}-{str(dtype).removeprefix('torch.')}"
            # For the width of gpt_oss see tests/test_parity.py: at 24, fp32 differs in the last bits.
            sizes = {"intermediate_size": 32} if family == "gpt_oss" else {}
            self._written[key] = tiny.save(tiny.build(family, dtype, **sizes), path)
        return self._written[key]

    @contextmanager
    def folder(self, case: Case) -> Iterator[Path]:
        """The checkpoint of a case: the shards are shared, the configurations are its own."""
        source = self.of(case.family, case.dtype)
        with TemporaryDirectory(dir=self._folder) as name:
            target = Path(name)
            for path in source.iterdir():
                if path.suffix == ".safetensors":
                    os.link(path, target / path.name)
                else:
                    shutil.copyfile(path, target / path.name)
            values = json.loads((source / "config.json").read_text()) | case.config
            values = {key: value for key, value in values.items() if value is not None or key not in case.config}
            (target / "config.json").write_text(json.dumps(values))
            (target / "generation_config.json").unlink(missing_ok=True)
            if case.generation is not None:
                (target / "generation_config.json").write_text(json.dumps(case.generation))
            yield target


def _special(value: Any, folder: Path) -> Any:
    """The object that a word of a strategy stands for."""
    if value == "<object>":
        return AutoConfig.from_pretrained(folder)
    if value == "<folder>":
        return str(folder)
    if value == "<generation>":
        return GenerationConfig(num_beams=2, pad_token_id=0)
    return value


def stock(folder: Path, case: Case) -> Outcome:
    """What stock transformers makes of a case, with its own code: a checkpoint's own is never run by offmoe."""
    keywords = {"dtype": "auto"} | {name: _special(value, folder) for name, value in case.keywords.items()}
    keywords.pop("trust_remote_code", None)
    if keywords.get("torch_dtype") is not None:
        del keywords["dtype"]
    try:
        if isinstance(keywords.get("config"), str):  # Auto classes ignore a path; the architecture's class reads it
            if not Path(keywords["config"]).exists():
                raise FileNotFoundError(keywords["config"])
            dtypes = {name: keywords.pop(name) for name in ("dtype", "torch_dtype") if name in keywords}
            config, unused = AutoConfig.from_pretrained(keywords.pop("config"), return_unused_kwargs=True, **keywords)
            keywords = {**unused, **dtypes, "config": config}
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **{**keywords, "output_loading_info": True})
    except Exception as error:
        return Outcome(failure=error)
    model, info = loaded
    incomplete = bool(info["missing_keys"] or info["mismatched_keys"])
    results = _run(tiny.comparable(model), case)
    (last,) = _run(model, replace(case, calls=(("generate", {"max_new_tokens": 2}),)))
    return Outcome(results=results, random_weights=incomplete, generates=not isinstance(last, Exception))


def ours(folder: Path, case: Case) -> Outcome:
    """What offmoe makes of a case; a recording under way must replay to the same counts."""
    keywords = {name: _special(value, folder) for name, value in case.keywords.items()}
    options = dict(case.options)
    recording = folder / "run.npz" if options.pop("record", False) else None
    try:
        model: tiny.Model = offmoe.from_pretrained(folder, device="cpu", trace=recording, **options, **keywords)
    except Exception as error:
        return Outcome(failure=error)
    with model.offload as offload:
        results = _run(model, case)
        stats = offload.stats()
    if recording is not None and recording.exists():
        trace = read_trace(recording)
        assert trace.options is not None
        assert replay(trace, trace.options).stats == stats, "the recording replays to other counts"
    return Outcome(results=results)


def _run(model: tiny.Model, case: Case) -> list[Any]:
    results = []
    for name, arguments in case.calls:
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                results.append(_plain(CALLS[name](model, dict(arguments))))
        except Exception as error:
            results.append(error)
    return results


def _plain(value: Any) -> Any:
    """Tensors and numbers of any output, in lists and dicts; everything else, such as caches, is left out."""
    if isinstance(value, torch.Tensor | int | float | str | bool):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else None


def same(a: Any, b: Any) -> bool:
    """Whether two outputs have the same bits, dtypes and shapes. Times are not compared."""
    if isinstance(a, torch.Tensor):
        equal = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return equal and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def fault(want: Outcome, got: Outcome) -> str | None:
    """What is wrong with what offmoe made of a case; None if nothing is. want: what stock made of it."""
    if got.failure is not None:
        return _wrong_refusal(want, got.failure)
    if want.failure is not None:
        return f"stock fails ({_words(want.failure)}), offmoe does not"
    if want.random_weights:
        return "stock lacks weights, offmoe does not notice"
    for number, (wanted, result) in enumerate(zip(want.results, got.results, strict=True)):
        if isinstance(result, CapacityError) and "tokens of context" in str(result):
            continue  # of a max_context that the case asked for, or of another limit that memory sets
        if isinstance(result, Exception) or isinstance(wanted, Exception):
            if type(result) is not type(wanted):
                return f"call {number}: stock: {_words(wanted)}; offmoe: {_words(result)}"
        elif not same(wanted, result):
            return f"call {number}: other bits"
    return None


def _wrong_refusal(want: Outcome, error: Exception) -> str | None:
    if not isinstance(error, OffmoeError):
        return f"loading fails with a traceback: {_words(error)}"
    message = str(error)
    if "\n" in message:
        return f"a message of several lines: {message!r}"
    if want.failure is not None or any(re.match(pattern, message) for pattern in REFUSALS):
        return None
    if want.random_weights and RANDOM_WEIGHTS.search(message):
        return None
    if all(isinstance(result, Exception) for result in want.results):
        return None  # stock fails later
    if not want.generates and "generation_config.json: " in message:
        return None
    return f"refused, though stock works: {_words(error)}"


def _words(value: object) -> str:
    return f"{type(value).__name__}: {value}" if isinstance(value, Exception) else f"a {type(value).__name__}"


def check(checkpoints: Checkpoints, case: Case) -> str | None:
    """Run one case with both. Returns what is wrong, or None."""
    with warnings.catch_warnings(), checkpoints.folder(case) as folder:
        warnings.simplefilter("ignore")  # transformers warns of half of these settings, in stock and in ours
        return fault(stock(folder, case), ours(folder, case))


class _Collected(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.clone())

    def end(self) -> None:
        pass


def _forward(model: tiny.Model, arguments: Values) -> Any:
    return model(input_ids=_ids(arguments), **arguments)


def _embeds(model: tiny.Model, arguments: Values) -> Any:
    return model(inputs_embeds=model.get_input_embeddings()(_ids(arguments)), **arguments)


def _continued(model: tiny.Model, arguments: Values) -> Any:
    """Two steps: the second continues the cache of the first."""
    ids = _ids(arguments)
    first = model(input_ids=ids[:, :-2], use_cache=True, **arguments)
    return [first, model(input_ids=ids[:, -2:], past_key_values=first.past_key_values, **arguments)]


def _padded(model: tiny.Model, arguments: Values) -> Any:
    ids = _ids(arguments)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return model(input_ids=ids, attention_mask=mask, **arguments)


def _generate(model: tiny.Model, arguments: Values) -> Any:
    ids = _ids(arguments)
    if arguments.pop("streamed", False):
        arguments["streamer"] = stream = _Collected()
        return [model.generate(ids, attention_mask=torch.ones_like(ids), **arguments), stream.pieces]
    if arguments.pop("as_object", False):
        return model.generate(ids, generation_config=GenerationConfig(**arguments))
    if "compile_config" in arguments:
        arguments["compile_config"] = CompileConfig()
    return model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)


def _ids(arguments: Values) -> torch.Tensor:
    return tiny.prompt(arguments.pop("batch", 1), arguments.pop("length", 7))


CALLS: dict[str, Callable[[tiny.Model, Values], Any]] = {
    "forward": _forward,
    "embeds": _embeds,
    "continued": _continued,
    "padded": _padded,
    "generate": _generate,
}

JUNK: st.SearchStrategy[Any] = st.sampled_from(
    ["x", "", -1, 0, 1e30, [], [[]], {}, None, True, "4", [1, "a"], {"a": 1}, 2**70]
)


def values_of(pool: Mapping[str, st.SearchStrategy[Any]], most: int, junk: int = 0) -> st.SearchStrategy[Values]:
    """A few values of a pool by name; one in `junk` is of a kind that has no meaning there."""

    @st.composite
    def draw(drawn: st.DrawFn) -> Values:
        names = drawn(st.lists(st.sampled_from(sorted(pool)), max_size=most, unique=True))
        return {name: drawn(JUNK) if junk and drawn(st.integers(1, junk)) == 1 else drawn(pool[name]) for name in names}

    return draw()


_FLAG = st.booleans()
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "num_beams": st.integers(1, 3),
    "num_return_sequences": st.integers(1, 3),
    "do_sample": _FLAG,
    "temperature": st.sampled_from([0.5, 1.0, 2.0, 0.0, 1]),
    "top_k": st.sampled_from([0, 1, 5, 1000]),
    "top_p": st.sampled_from([0.1, 0.9, 1.0]),
    "min_p": st.sampled_from([0.0, 0.05]),
    "top_h": st.sampled_from([0.4]),
    "typical_p": st.sampled_from([0.5, 1.0]),
    "epsilon_cutoff": st.sampled_from([0.0, 3e-4]),
    "eta_cutoff": st.sampled_from([0.0, 3e-4]),
    "repetition_penalty": st.sampled_from([1.0, 1.3]),
    "encoder_repetition_penalty": st.sampled_from([1.0, 1.2]),
    "length_penalty": st.sampled_from([0.5, 2.0, -1.0]),
    "no_repeat_ngram_size": st.integers(0, 3),
    "bad_words_ids": st.sampled_from([[[5], [6, 7]], [[200]]]),
    "suppress_tokens": st.sampled_from([[5, 6], []]),
    "begin_suppress_tokens": st.sampled_from([[5, 6]]),
    "forced_bos_token_id": st.sampled_from([4, None]),
    "forced_eos_token_id": st.sampled_from([2, None]),
    "exponential_decay_length_penalty": st.sampled_from([[2, 1.5]]),
    "sequence_bias": st.sampled_from([[[[5], 2.0]], [[[9, 10], -3.0]]]),
    "renormalize_logits": _FLAG,
    "remove_invalid_values": _FLAG,
    "guidance_scale": st.sampled_from([1.0, 1.5]),
    "use_cache": _FLAG,
    "cache_implementation": st.sampled_from(
        ["dynamic", "static", "offloaded", "offloaded_static", "quantized", "hybrid", "sliding_window", "nonsense"]
    ),
    "cache_config": st.sampled_from([{"nbits": 4}, None]),
    "max_cache_len": st.sampled_from([32, None]),
    "min_new_tokens": st.integers(0, 3),
    "min_length": st.integers(0, 12),
    "max_length": st.sampled_from([9, 12]),
    "max_time": st.sampled_from([100.0, 0.0]),
    "early_stopping": st.sampled_from([True, False, "never"]),
    "stop_strings": st.sampled_from([["a"], "b"]),
    "penalty_alpha": st.sampled_from([0.0, 0.6]),
    "dola_layers": st.sampled_from(["low", [1]]),
    "num_beam_groups": st.sampled_from([1, 2]),
    "diversity_penalty": st.sampled_from([0.0, 0.5]),
    "force_words_ids": st.sampled_from([[[5]]]),
    "constraints": st.sampled_from([[5], None]),
    "prompt_lookup_num_tokens": st.sampled_from([2, None]),
    "assistant_early_exit": st.sampled_from([1, None]),
    "low_memory": _FLAG,
    "return_dict_in_generate": _FLAG,
    "output_scores": _FLAG,
    "output_logits": _FLAG,
    "output_attentions": _FLAG,
    "output_hidden_states": _FLAG,
    "watermarking_config": st.sampled_from([{"bias": 2.5, "context_width": 1}, {"nonsense": 1}]),
    "compile_config": st.sampled_from([{"mode": "default"}]),
    "disable_compile": _FLAG,
    "prefill_chunk_size": st.sampled_from([2, 3, 100]),
    "token_healing": _FLAG,
    "eos_token_id": st.sampled_from([2, [2, 7], [], -1]),
    "pad_token_id": st.sampled_from([0, 3, -1, None]),
    "bos_token_id": st.sampled_from([1, None]),
    "use_mtp": _FLAG,
    "no_such_setting": st.sampled_from([1, "x"]),
}
CONFIG: dict[str, st.SearchStrategy[Any]] = {
    "num_experts_per_tok": st.integers(1, 4),
    "num_hidden_layers": st.integers(1, 4),
    "use_cache": _FLAG,
    "tie_word_embeddings": _FLAG,
    "sliding_window": st.sampled_from([4, 100, None]),
    "rms_norm_eps": st.sampled_from([1e-3, 1e-6]),
    "output_router_logits": _FLAG,
    "router_aux_loss_coef": st.sampled_from([0.5]),
    "output_attentions": _FLAG,
    "output_hidden_states": _FLAG,
    "max_position_embeddings": st.sampled_from([16, 4096]),
    "attention_dropout": st.sampled_from([0.5]),
    "attention_bias": _FLAG,
    "hidden_act": st.sampled_from(["silu", "gelu", "nonsense"]),
    "rope_parameters": st.sampled_from([{"rope_type": "default", "rope_theta": 500.0}, {"rope_type": "nonsense"}]),
    "rope_theta": st.sampled_from([500.0]),
    "norm_topk_prob": _FLAG,
    "eos_token_id": st.sampled_from([2, [2, 3], None]),
    "pad_token_id": st.sampled_from([3, None]),
    "vocab_size": st.sampled_from([97, 96, 98]),
    "num_local_experts": st.sampled_from([8, 4, 16]),
    "num_experts": st.sampled_from([8, 4]),
    "n_routed_experts": st.sampled_from([8, 4]),
    "hidden_size": st.sampled_from([32, 64]),
    "head_dim": st.sampled_from([8, 16]),
    "initializer_range": st.sampled_from([0.1]),
    "chunk_size_feed_forward": st.sampled_from([0, 2]),
    "problem_type": st.sampled_from([None]),
    "id2label": st.sampled_from([{"0": "a"}]),
    "is_encoder_decoder": _FLAG,
    "is_decoder": _FLAG,
    "return_dict": _FLAG,
    "architectures": st.sampled_from([["X"], None]),
    "auto_map": st.sampled_from([{"AutoModelForCausalLM": "own.Model"}]),
    "quantization_config": st.sampled_from([None]),
    "torch_dtype": st.sampled_from(["float32", "bfloat16"]),
    "dtype": st.sampled_from(["float32", "bfloat16", None]),
    "no_such_value": st.sampled_from([1, "x"]),
}
KEYWORDS: dict[str, st.SearchStrategy[Any]] = {
    **CONFIG,
    "attn_implementation": st.sampled_from(["eager", "sdpa", None, "nonsense", "flash_attention_2", "flex_attention"]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, "float32", "bfloat16", "auto", "half", "nonsense"]),
    "torch_dtype": st.sampled_from([torch.float32, "bfloat16", "auto"]),
    "config": st.sampled_from(["<object>", "<folder>", None, {"a": 1}]),
    "generation_config": st.sampled_from(["<generation>", None]),
    "subfolder": st.sampled_from(["", "nowhere"]),
    "revision": st.sampled_from(["main"]),
    "variant": st.sampled_from([None, "fp16"]),
    "trust_remote_code": _FLAG,
    "local_files_only": _FLAG,
    "force_download": _FLAG,
    "low_cpu_mem_usage": _FLAG,
    "use_safetensors": st.sampled_from([None, True, False]),
    "ignore_mismatched_sizes": _FLAG,
    "device_map": st.sampled_from([None, "auto", "cpu"]),
    "quantization_config": st.sampled_from([None]),
    "key_mapping": st.sampled_from([None, {"a": "b"}]),
    "max_memory": st.sampled_from([None]),
    "weights_only": _FLAG,
    "experts_implementation": st.sampled_from([None, "eager"]),
    "use_kernels": _FLAG,
    "name_or_path": st.sampled_from(["x"]),
    "name": st.sampled_from(["x"]),
    "folder": st.sampled_from(["x"]),
    "catalog": st.sampled_from([None]),
    "cls": st.sampled_from([None]),
    "trust": st.sampled_from([1]),
}
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "slots_per_layer": st.integers(1, 9),
    "eviction": st.sampled_from(["aged-lfu", "lru", "lru-2", "s3-fifo", "sieve"]),
    "scope": st.sampled_from(["layer", "model"]),
    "prefetch": st.sampled_from([0, 1, 3, "auto"]),
    "on_miss": st.sampled_from(["fetch", "auto"]),
    "exactness": st.sampled_from(["auto", "bitwise"]),
    "max_context": st.sampled_from([4, 64, 512]),
    "device_memory": st.sampled_from(["auto", "1GiB"]),
    "record": _FLAG,
}
PASSES: dict[str, st.SearchStrategy[Any]] = {
    "batch": st.integers(1, 3),
    "length": st.integers(3, 12),
    "use_cache": _FLAG,
    "output_hidden_states": _FLAG,
    "output_attentions": _FLAG,
    "output_router_logits": _FLAG,
    "return_dict": _FLAG,
    "logits_to_keep": st.integers(0, 2),
    "no_such_argument": st.just(1),
}
GENERATES: dict[str, st.SearchStrategy[Any]] = {
    **SETTINGS,
    "batch": st.integers(1, 2),
    "length": st.integers(3, 9),
    "max_new_tokens": st.integers(0, 5),
    "streamed": _FLAG,
    "as_object": _FLAG,
}


def _calls() -> st.SearchStrategy[tuple[str, Values]]:
    passes = st.sampled_from(sorted(CALLS.keys() - {"generate"}))
    return st.one_of(
        st.tuples(passes, values_of(PASSES, most=3)),
        st.tuples(st.just("generate"), values_of(GENERATES, most=4).map(lambda given: {"max_new_tokens": 3, **given})),
    )


def cases() -> st.SearchStrategy[Case]:
    """Any use of a model; most cases change a few things at once."""
    nothing: st.SearchStrategy[Values] = st.just({})
    return st.builds(
        Case,
        family=st.sampled_from(tiny.FAMILIES),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        config=st.one_of(nothing, values_of(CONFIG, most=2, junk=6)),
        generation=st.one_of(
            st.just({"eos_token_id": 2, "pad_token_id": 0}), st.none(), values_of(SETTINGS, most=3, junk=8)
        ),
        options=values_of(OPTIONS, most=4).map(lambda given: {"slots_per_layer": 3, **given}),
        keywords=st.one_of(nothing, values_of(KEYWORDS, most=2, junk=8)),
        calls=st.lists(_calls(), min_size=1, max_size=2).map(tuple),
    )
