"""GGUF models compute what a dense model of the decoded values computes, and only the file's bytes move."""

from __future__ import annotations

import copy
import json
import logging
import random
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import offmoe
from offmoe.api import load
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.errors import CheckpointError, ConfigError, MissingTensorError, OffmoeError, UnsupportedModelError
from offmoe.hf.gguf.architectures import ARCHITECTURES
from offmoe.hf.gguf.metadata import ComputesOtherwiseError
from offmoe.pack.pack import pack
from offmoe.quant.kernel_words import GGUF_FORMATS
from offmoe.quant.packed_weight import int4
from offmoe.simulate.replay import replay
from offmoe.storage.gguf import read_gguf
from offmoe.storage.gguf_types import BLOCK_TYPES
from offmoe.trace.trace import read_trace
from tests import gguf_models, native, tiny
from tests.gguf_models import Q, all_of, q4_k_m, q8_0
from tests.gguf_statements import GLM4_LITE, STATEMENTS, WHOLE_LATENT
from tests.native import installed

PROMPT = {"input_ids": tiny.prompt()}
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
KINDS = {"Q4_K_M": q4_k_m, "Q8_0": q8_0, "MXFP4": all_of(Q.MXFP4), "BF16": all_of(Q.BF16)}


def run(model: tiny.Model) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(**PROMPT).logits, model.generate(**PROMPT, **GREEDY)


def stock(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return run(tiny.comparable(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)))


def check_parity(written: gguf_models.Written, dtype: torch.dtype, trace: Path, **options: Any) -> None:
    wanted = stock(written.dense, dtype)
    ours = offmoe.from_pretrained(
        written.file, device="cpu", slots_per_layer=3, dtype=dtype, trace=trace, exactness="bitwise", **options
    )
    with ours.offload:
        logits, tokens = run(ours)
        stats = ours.offload.stats()
    assert torch.isfinite(wanted[0]).all()
    assert torch.equal(logits, wanted[0])
    assert torch.equal(tokens, wanted[1])
    assert stats.misses > 0
    recorded = read_trace(trace)
    assert recorded.options is not None
    assert replay(recorded, recorded.options).stats == stats


CASES = [
    pytest.param(family, kind, marks=() if kind == "Q8_0" or family in ("mixtral", "gpt_oss") else pytest.mark.slow)
    for family in STATEMENTS
    for kind in KINDS
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_and_tokens_are_those_of_a_dense_model_of_the_decoded_values(
    tmp_path: Path, family: str, kind: str
) -> None:
    written = gguf_models.save(tmp_path, family, KINDS[kind], wide=kind == "Q4_K_M")
    check_parity(written, torch.bfloat16, tmp_path / "run.npz")


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_keys_and_values_in_one_tensor_as_older_files_have_them(tmp_path: Path, family: str) -> None:
    written = gguf_models.save(tmp_path, family, how=WHOLE_LATENT)
    check_parity(written, torch.bfloat16, tmp_path / "run.npz")


def test_queries_without_a_latent_form_as_deepseek_v2_lite_has_them(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "deepseek_v2", q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1)
    check_parity(written, torch.bfloat16, tmp_path / "run.npz")


@pytest.mark.parametrize("beside", [False, True])
def test_glm_4_7_flash_is_one_of_deepseeks_architecture(tmp_path: Path, beside: bool) -> None:
    written = gguf_models.save(tmp_path, "glm4_moe_lite", how=GLM4_LITE)
    if beside:
        shutil.copy(written.dense / "config.json", written.file.parent)
    config = inspect(written.file, OffloadConfig(device="cpu")).hf_config
    assert config.model_type == ("glm4_moe_lite" if beside else "deepseek_v3")
    check_parity(written, torch.bfloat16, tmp_path / "run.npz")


def test_layers_that_predict_further_tokens_are_dropped(tmp_path: Path) -> None:
    """The file counts them as blocks behind the decoder's; transformers has no such layers."""

    def metadata(writer: gguf.GGUFWriter, config: Any) -> None:
        longer = copy.deepcopy(config)
        longer.num_hidden_layers += 1
        STATEMENTS["glm4_moe"].metadata(writer, longer)
        writer.add_nextn_predict_layers(1)

    def more(writer: gguf.GGUFWriter) -> None:
        for name in ("nextn.eh_proj.weight", "attn_q.weight", "ffn_down_exps.weight"):
            writer.add_tensor(f"blk.3.{name}", np.ones((2, 4, 8), np.float32))

    written = gguf_models.save(tmp_path, "glm4_moe", how=replace(STATEMENTS["glm4_moe"], metadata=metadata), more=more)
    check_parity(written, torch.bfloat16, tmp_path / "run.npz")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_parity_in_float32(tmp_path: Path, family: str) -> None:
    written = gguf_models.save(tmp_path, family)
    check_parity(written, torch.float32, tmp_path / "run.npz")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=Q(kind).name, marks=() if kind in (Q.Q5_K, Q.IQ4_XS) else pytest.mark.slow)
        for kind in gguf_models.HALVES
        if kind not in (Q.Q8_0, Q.MXFP4)
    ],
)
def test_every_type_runs(tmp_path: Path, kind: int) -> None:
    wide = gguf.GGML_QUANT_SIZES[Q(kind)][0] == 256
    written = gguf_models.save(tmp_path, "mixtral", all_of(Q(kind)), wide=wide)
    check_parity(written, torch.bfloat16, tmp_path / "run.npz")


@pytest.mark.parametrize(("kind", "dtype"), [(Q.F16, torch.float16), (Q.F32, torch.float32)])
def test_weights_that_are_not_quantized_say_what_to_compute_in(tmp_path: Path, kind: Q, dtype: torch.dtype) -> None:
    written = gguf_models.save(tmp_path, "qwen3_moe", all_of(kind))
    assert inspect(written.file, OffloadConfig(device="cpu")).dtype == dtype
    check_parity(written, dtype, tmp_path / "run.npz")


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_layers_of_several_types_share_what_fits(tmp_path: Path, scope: str) -> None:
    def mixed(name: str) -> Q:
        kinds = (Q.Q8_0, Q.MXFP4, Q.Q4_0, Q.BF16)
        return kinds[(len(name) + int(name.split(".")[1])) % 4] if name.startswith("blk.") else Q.Q5_1

    written = gguf_models.save(tmp_path, "qwen3_moe", mixed)
    check_parity(written, torch.bfloat16, tmp_path / "run.npz", scope=scope)


def test_gate_and_up_may_stand_in_one_tensor(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "qwen3_moe", fused=True)
    check_parity(written, torch.bfloat16, tmp_path / "run.npz")


def test_a_split_model_runs_by_any_of_its_parts(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "qwen3_moe", parts=7)
    parts = sorted(written.file.parent.iterdir())
    assert len(parts) > 3
    for part in (parts[0], parts[-1]):
        check_parity(gguf_models.Written(part, written.dense), torch.bfloat16, tmp_path / "run.npz")
    parts[2].unlink()
    with pytest.raises(MissingTensorError, match=f"{parts[2].name}.*complete the download"):
        offmoe.from_pretrained(written.file, device="cpu")


def test_a_folder_with_one_model_is_that_model(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "mixtral")
    folder = written.file.parent
    (folder / "mmproj-model-f16.gguf").write_bytes(b"")
    check_parity(gguf_models.Written(folder, written.dense), torch.bfloat16, tmp_path / "run.npz")
    (folder / "other.gguf").write_bytes(written.file.read_bytes())
    with pytest.raises(ConfigError, match=r"holds 2 GGUF models \(model.gguf, other.gguf\); give the file of one"):
        offmoe.from_pretrained(folder, device="cpu")


def test_tied_embeddings_and_a_bare_head(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    check_parity(written, torch.bfloat16, tmp_path / "run.npz")


def test_decoder_layers_that_do_not_fit_are_decoded_once_and_streamed(tmp_path: Path) -> None:
    """The rebuilt weights of offloaded layers are written in the dtype to compute in, and read from there."""
    written = gguf_models.save(tmp_path, "mixtral", q4_k_m, wide=True)
    roomy = inspect(written.file, OffloadConfig(device="cpu", max_context=64, exactness="bitwise"))
    config = OffloadConfig(device="cpu", device_memory=roomy.plan.smallest, max_context=64, exactness="bitwise")
    small = inspect(written.file, config)
    assert small.plan.offloaded_layers
    wanted = stock(written.dense, torch.bfloat16)
    ours = load(small)
    with ours.offload:
        got = run(ours)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("family", STATEMENTS)
def test_the_metadata_give_the_configuration_that_was_converted(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    written = gguf_models.save(tmp_path, family)
    with caplog.at_level(logging.WARNING, "offmoe"):
        ours = inspect(written.file, OffloadConfig(device="cpu")).hf_config
    assert "changes nothing here" not in caplog.text
    theirs = AutoConfig.from_pretrained(written.dense)
    assert type(ours) is type(theirs)
    values = theirs.to_dict()
    if values.get("head_dim", 0) is None:
        values["head_dim"] = theirs.hidden_size // theirs.num_attention_heads  # what the model makes of it
    found = ours.to_dict()
    differ = {n: (found.get(n), v) for n, v in values.items() if found.get(n) != v and n not in IRRELEVANT}
    assert not differ


IRRELEVANT = frozenset({"architectures", "dtype", "transformers_version", "_name_or_path", "router_aux_loss_coef"})
"""Values that change nothing in what a model computes."""


def test_a_configuration_beside_the_file_wins_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = gguf_models.save(tmp_path, "mixtral")
    values = json.loads((written.dense / "config.json").read_text())
    beside = written.file.with_name("config.json")
    with caplog.at_level(logging.INFO, "offmoe"):
        assert inspect(written.file, OffloadConfig(device="cpu")).hf_config.max_position_embeddings == 512
    assert [r.message for r in caplog.records if "the file's metadata" in r.message]
    caplog.clear()
    beside.write_text(json.dumps({**values, "max_position_embeddings": 1024, "rms_norm_eps": 1e-3}))
    with caplog.at_level(logging.INFO, "offmoe"):
        config = inspect(written.file, OffloadConfig(device="cpu")).hf_config
    assert (config.max_position_embeddings, config.rms_norm_eps) == (1024, 1e-3)
    assert [r.message for r in caplog.records if f"is that of {beside}" in r.message]
    assert "says rms_norm_eps=0.001, the metadata of model.gguf give rms_norm_eps=1e-05" in caplog.text


@pytest.mark.parametrize("family", STATEMENTS)
def test_the_own_configuration_beside_a_file_says_nothing_else(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    written = gguf_models.save(tmp_path, family)
    shutil.copy(written.dense / "config.json", written.file.parent)
    with caplog.at_level(logging.WARNING, "offmoe"):
        inspect(written.file, OffloadConfig(device="cpu"))
    assert "config.json counts" not in caplog.text


def test_a_configuration_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "mixtral")
    values = json.loads((written.dense / "config.json").read_text())
    written.file.with_name("config.json").write_text(json.dumps({**values, "num_key_value_heads": 4}))
    with pytest.raises(CheckpointError, match=r"num_key_value_heads=4, the metadata of model\.gguf say 2; remove"):
        inspect(written.file, OffloadConfig(device="cpu"))


def test_a_configuration_of_another_model_beside_the_file_is_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = gguf_models.save(tmp_path, "mixtral")
    tiny.build("olmoe").config.save_pretrained(written.file.parent)
    with caplog.at_level(logging.WARNING, "offmoe"):
        check_parity(written, torch.bfloat16, tmp_path / "run.npz")
    assert "is of 'olmoe' and not of 'mixtral'" in caplog.text


def test_the_generation_config_beside_the_file_counts_only_with_a_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = gguf_models.save(tmp_path, "mixtral", more=lambda writer: writer.add_eot_token_id(7))
    written.file.with_name("generation_config.json").write_text('{"eos_token_id": 5}')
    ours = offmoe.from_pretrained(written.file, device="cpu")
    assert ours.generation_config.eos_token_id == [2, 7]
    assert "generation_config.json: counts only with the model's config.json beside it" in caplog.text
    assert ours.config.name_or_path == ours.name_or_path == str(written.file)
    ours.offload.close()
    for name in ("config.json", "generation_config.json"):
        text = (written.dense / name).read_text()
        written.file.with_name(name).write_text(text.replace('"eos_token_id": 2', '"eos_token_id": 5'))
    ours = offmoe.from_pretrained(written.file, device="cpu")
    assert ours.generation_config.eos_token_id == 5
    ours.offload.close()


def rope(kind: Any, factor: float) -> Callable[[gguf.GGUFWriter], None]:
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        if kind == gguf.RopeScalingType.YARN:
            writer.add_rope_scaling_orig_ctx_len(128)
            writer.add_rope_scaling_yarn_beta_fast(16.0)

    return write


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        ("linear", {"rope_type": "linear", "factor": 2.0}),
        ("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0}),
    ],
)
def test_rope_scaling_that_transformers_knows_is_carried_over(
    tmp_path: Path, kind: str, scaling: dict[str, Any]
) -> None:
    written = gguf_models.save(
        tmp_path,
        "qwen3_moe",
        more=rope(gguf.RopeScalingType(kind), scaling["factor"]),
        rope_parameters={"rope_theta": 10000.0, **scaling},
    )
    check_parity(written, torch.bfloat16, tmp_path / "run.npz")


def test_rope_scaling_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "qwen3_moe", more=rope(gguf.RopeScalingType.LONGROPE, 2.0))
    with pytest.raises(UnsupportedModelError, match=r"rope scaling 'longrope' is not known.*config\.json beside"):
        inspect(written.file, OffloadConfig(device="cpu"))
    written = gguf_models.save(
        tmp_path, "qwen3_moe", more=lambda w: w.add_float32("qwen3moe.rope.scaling.novel", 1.0), name="novel"
    )
    with pytest.raises(UnsupportedModelError, match=r"rope\.scaling\.novel is not known"):
        inspect(written.file, OffloadConfig(device="cpu"))


@pytest.mark.parametrize(
    ("family", "more", "what"),
    [
        (
            "qwen3_moe",
            lambda w: w.add_float32("qwen3moe.rope.scale_linear", 4.0),
            r"qwen3moe\.rope\.scale_linear is not",
        ),
        ("deepseek_v3", lambda w: w.add_attn_temperature_scale(0.1), r"attention\.temperature_scale is not known"),
        (
            "mixtral",
            lambda w: w.add_sliding_window(4096),
            r"llama\.attention\.sliding_window is not known.*config\.json",
        ),
        ("olmoe", lambda w: w.add_logit_scale(0.5), r"olmoe\.logit_scale is not known"),
        ("qwen3_moe", lambda w: w.add_final_logit_softcapping(30.0), r"final_logit_softcapping is not known"),
        ("deepseek_v2", lambda w: w.add_expert_weights_norm(True), "divides the scores of a token's experts"),
        (
            "deepseek_v3",
            lambda w: w.add_uint32("deepseek2.expert_gating_func", 3),
            "by function 3, which deepseek2",
        ),
        (
            "glm4_moe",
            lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX),
            "a softmax over all experts",
        ),
        ("minimax_m2", lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX), "a softmax over all"),
        ("granitemoe", lambda w: w.add_rope_scaling_finetuned(False), "has no positions"),
        ("mixtral", lambda w: w.add_causal_attention(False), r"attention\.causal is not known"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(
    tmp_path: Path, family: str, more: Callable[[gguf.GGUFWriter], None], what: str
) -> None:
    written = gguf_models.save(tmp_path, family, more=more)
    with pytest.raises(UnsupportedModelError, match=what):
        inspect(written.file, OffloadConfig(device="cpu"))


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("deepseek_v2", lambda w: w.add_expert_weights_norm(True)),
        ("glm4_moe", lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)),
        ("granitemoe", lambda w: w.add_rope_scaling_finetuned(False)),
    ],
)
def test_no_configuration_makes_up_for_what_no_model_computes(
    tmp_path: Path, family: str, more: Callable[[gguf.GGUFWriter], None]
) -> None:
    written = gguf_models.save(tmp_path, family, more=more)
    shutil.copy(written.dense / "config.json", written.file.parent)
    with pytest.raises(ComputesOtherwiseError):
        inspect(written.file, OffloadConfig(device="cpu"))


def test_positions_of_images_change_nothing_in_text(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "glm4_moe", more=lambda w: w.add_rope_dimension_sections([4, 2, 2, 0]))
    check_parity(written, torch.bfloat16, tmp_path / "run.npz")


def test_a_configuration_that_transformers_does_not_know_is_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = gguf_models.save(tmp_path, "mixtral")
    written.file.with_name("config.json").write_text('{"model_type": "unheard_of"}')
    with caplog.at_level(logging.WARNING, "offmoe"):
        assert inspect(written.file, OffloadConfig(device="cpu")).hf_config.model_type == "mixtral"
    assert "the configuration is taken from the metadata of model.gguf" in caplog.text


def test_keys_that_change_nothing_are_named_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_string("qwen3moe.novel", "new")
        writer.add_logit_scale(1.0)

    written = gguf_models.save(tmp_path, "qwen3_moe", more=more)
    with caplog.at_level(logging.WARNING, "offmoe"):
        inspect(written.file, OffloadConfig(device="cpu"))
    assert "qwen3moe.logit_scale, qwen3moe.novel changes nothing here" in caplog.text


def test_a_file_that_does_not_say_how_experts_are_grouped_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def metadata(writer: gguf.GGUFWriter, config: Any) -> None:
        STATEMENTS["deepseek_v3"].metadata(writer, config)
        for keys in writer.kv_data:
            keys.pop("deepseek2.expert_group_count")

    how = replace(STATEMENTS["deepseek_v3"], metadata=metadata)
    written = gguf_models.save(tmp_path, "deepseek_v3", how=how, n_group=1, topk_group=1)
    with caplog.at_level(logging.WARNING, "offmoe"):
        check_parity(written, torch.bfloat16, tmp_path / "run.npz")
    assert "does not say whether experts are chosen by groups" in caplog.text


def extra(name: str, shape: tuple[int, ...] = (4,)) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.add_tensor(name, np.ones(shape, np.float32))


@pytest.mark.parametrize(
    "name", ["blk.0.attn_novel.weight", "novel.weight", "blk.3.attn_norm.weight", "blk.00.attn_norm.weight"]
)
def test_a_tensor_that_nobody_knows_is_refused(tmp_path: Path, name: str) -> None:
    written = gguf_models.save(tmp_path, "mixtral", more=extra(name))
    with pytest.raises(UnsupportedModelError, match=f"tensor {name!r} is .*safetensors checkpoint"):
        inspect(written.file, OffloadConfig(device="cpu"))


def test_a_tensor_without_a_place_in_the_model_is_refused(tmp_path: Path) -> None:
    """qwen3moe knows biases, but this configuration has none in its attention."""
    written = gguf_models.save(tmp_path, "qwen3_moe", more=extra("blk.1.attn_q.bias", (64,)))
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.bias' has no place in Qwen3MoeForCausalLM"):
        inspect(written.file, OffloadConfig(device="cpu"))


@pytest.mark.parametrize("count", [0, 10_001, 2**31])
def test_a_number_of_layers_that_no_model_has_is_refused_at_once(tmp_path: Path, count: int) -> None:
    written = gguf_models.save(tmp_path, "qwen3_5_moe_text")
    key = b"qwen35moe.block_count" + struct.pack("<I", 4)
    raw = written.file.read_bytes()
    assert key + struct.pack("<I", 3) in raw
    written.file.write_bytes(raw.replace(key + struct.pack("<I", 3), key + struct.pack("<I", count)))
    with pytest.raises(CheckpointError, match=f"say {count} layers"):
        inspect(written.file, OffloadConfig(device="cpu"))


def test_factors_of_the_rotary_embedding_need_a_configuration(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "mixtral", more=extra("rope_freqs.weight"))
    with pytest.raises(UnsupportedModelError, match=r"'rope_freqs.weight'.*config.json beside"):
        inspect(written.file, OffloadConfig(device="cpu"))
    written.file.with_name("config.json").write_text((written.dense / "config.json").read_text())
    check_parity(written, torch.bfloat16, tmp_path / "run.npz")


def test_a_missing_tensor_is_never_left_at_random(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "mixtral")
    raw = written.file.read_bytes()
    for name in (b"blk.1.attn_v.weight", b"blk.1.ffn_up_exps.weight", b"blk.2.ffn_gate_inp.weight"):
        assert raw.count(name) == 1
        written.file.write_bytes(raw.replace(name, name.replace(b"blk.", b"blk.")[:-6] + b"weighx"))
        with pytest.raises(UnsupportedModelError, match="not known to offmoe"):
            offmoe.from_pretrained(written.file, device="cpu")
    config = json.loads((written.dense / "config.json").read_text())
    without = gguf_models.save(tmp_path, "mixtral", skip=lambda name: name == "blk.1.attn_v.weight", name="without")
    with pytest.raises(MissingTensorError, match=r"no tensor for 'model\.layers\.1\.self_attn\.v_proj\.weight'"):
        offmoe.from_pretrained(without.file, device="cpu")
    assert config["model_type"] == "mixtral"


@pytest.mark.parametrize(
    ("arch", "tensor", "what"),
    [
        ("arctic", "blk.0.ffn_up_exps.weight", "the architecture 'arctic' is not one .* llama, .*qwen3moe"),
        ("llama", "blk.0.ffn_up.weight", "a 'llama' model without experts"),
        ("llama", "blk.0.ffn_up.3.weight", "stores every expert by itself"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path: Path, arch: str, tensor: str, what: str) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), arch)
    writer.add_tensor(tensor, np.ones((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=what):
        inspect(tmp_path / "x.gguf", OffloadConfig(device="cpu"))


def test_what_writes_another_checkpoint_is_refused_with_the_reason(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "mixtral")
    with pytest.raises(
        ConfigError, match=r"model.gguf is a GGUF file, whose experts are gguf Q8_0 and run as they are"
    ):
        offmoe.from_pretrained(written.file, device="cpu", experts="int4")
    with pytest.raises(ConfigError, match="packed already"):
        pack(written.file, tmp_path / "out", int4())
    ours = offmoe.from_pretrained(written.file, device="cpu")
    with (
        ours.offload,
        pytest.raises(ConfigError, match=r"loaded from the GGUF file .*model.gguf.*copy the file itself"),
    ):
        ours.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_names_are_those_of_the_gguf_package(arch: str) -> None:
    """Every tensor that the package knows for an architecture has a rule, and no rule names another one."""
    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[gguf_models.arch_of(arch)]}
    how = ARCHITECTURES[arch]
    rules = [*how.rules(CONFIGS[arch]), *how.model()]
    ours = {source.removesuffix(".weight").removesuffix(".bias") for rule in rules for source in rule.sources}
    theirs = {name.replace("blk.{bid}.", "") for name in known}
    assert ours - theirs <= FUSED | MORE.get(arch, set())
    assert theirs - ours <= UNUSED | UNREAD.get(arch, set())


FUSED = {"ffn_gate_up_exps"}
UNUSED = {"rope_freqs", "attn_rot_embd"}
MORE: dict[str, set[str]] = {"qwen3next": {"ssm_in"}}
"""By architecture, names that older files have."""
UNREAD: dict[str, set[str]] = {
    "llama": {"ffn_gate", "ffn_up", "ffn_down"},
    "deepseek2": {"attn_k", "attn_v"},
    "glm4moe": {name.replace("blk.{bid}.", "") for name in gguf.TENSOR_NAMES.values() if ".nextn." in name},
}
"""By architecture, names that no such model with experts has, or only the layers that are dropped."""
CONFIGS = {how.arch: gguf_models.config(family) for family, how in STATEMENTS.items()}


def test_the_documentation_lists_what_runs() -> None:
    text = (Path(offmoe.__file__).parents[1] / "docs" / "quantized.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| [^|]* \| ([^|]*) \|$", text, re.MULTILINE))
    assert {arch: re.findall(r"`(\w+)`", types) for arch, types in rows.items() if arch in ARCHITECTURES} == {
        arch: list(how.model_types) for arch, how in ARCHITECTURES.items()
    }
    of_kernels = re.search(r"^\* of GGUF, (.*)\.$", text, re.MULTILINE)
    assert of_kernels is not None
    assert re.findall(r"[A-Z]+\w+", of_kernels[1]) == [BLOCK_TYPES[kind].name for kind in GGUF_FORMATS]
    listed = re.search(r"^\| \[GGUF\].*", text, re.MULTILINE)
    assert listed is not None
    assert all(block.name in listed[0] for block in BLOCK_TYPES.values())


@pytest.mark.parametrize(
    ("family", "times"),
    [
        ("mixtral", 12),
        pytest.param("mixtral", 100, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", 40, marks=pytest.mark.slow),
    ],
)
def test_damaged_metadata_give_a_model_or_an_error(tmp_path: Path, family: str, times: int) -> None:
    """One bit is changed, many times: from headers to the catalog nothing but an `OffmoeError` is raised."""
    written = gguf_models.save(tmp_path, family)
    raw, rng, end = written.file.read_bytes(), random.Random(0), read_gguf(written.file).header_bytes
    refused = 0
    for _ in range(times):
        damaged = bytearray(raw)
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
        (tmp_path / "damaged.gguf").write_bytes(bytes(damaged))
        try:
            inspect(tmp_path / "damaged.gguf", OffloadConfig(device="cpu"))
        except OffmoeError:
            refused += 1
    assert refused > times * 3 // 8


KERNEL_CASES = [
    *(("Q4_0", family, fused) for family, fused in (("qwen3_moe", False), ("qwen3_moe", True), ("gpt_oss", False))),
    *(("MXFP4", "gpt_oss", False), ("BF16", "qwen3_moe", True), ("BF16", "gpt_oss", False)),
    *(("Q8_0", "qwen3_moe", True), ("Q8_0", "gpt_oss", False), ("Q4_K_M", "qwen3_moe", False)),
    pytest.param("Q5_0", "qwen3_moe", False, marks=pytest.mark.slow),
    pytest.param("Q5_K", "mixtral", True, marks=pytest.mark.slow),
    pytest.param("IQ4_XS", "mixtral", False, marks=pytest.mark.slow),
    pytest.param("Q2_K", "mixtral", False, marks=pytest.mark.slow),
    pytest.param("Q3_K", "mixtral", True, marks=pytest.mark.slow),
]


@installed
@pytest.mark.parametrize(("kind", "family", "fused"), KERNEL_CASES)
def test_kernels_compute_what_they_read_without_decoding(tmp_path: Path, kind: str, family: str, fused: bool) -> None:
    native.library()
    of_matrices = q4_k_m if kind == "Q4_K_M" else all_of(getattr(Q, kind))
    wide = kind not in ("Q4_0", "Q5_0", "Q8_0", "MXFP4", "BF16")
    written = gguf_models.save(tmp_path, family, of_matrices, fused=fused, wide=wide)
    wanted = stock(written.dense, torch.float32)
    options = OffloadConfig(device="cpu", slots_per_layer=3, exactness="numeric")
    inspected = inspect(written.file, options, dtype=torch.float32)
    assert all(layer.cpu_slot is not None for layer in inspected.catalog.layers)
    ours = load(inspected)
    with ours.offload:
        logits, tokens = run(ours)
    assert not torch.equal(logits, wanted[0])  # the kernels add in another order
    torch.testing.assert_close(logits, wanted[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, wanted[1])


@installed
def test_a_layer_whose_gate_and_up_have_different_types_is_decoded(tmp_path: Path) -> None:
    def kinds(name: str) -> Q:
        return Q.Q4_0 if "blk.1.ffn_up_exps" in name else Q.Q8_0

    written = gguf_models.save(tmp_path, "mixtral", kinds)
    config = OffloadConfig(device="cpu", slots_per_layer=3, exactness="numeric")
    reasons = [layer.without_kernel for layer in inspect(written.file, config).catalog.layers]
    assert reasons == [None, "gate and up are quantized differently", None]
    check_parity(written, torch.bfloat16, tmp_path / "run.npz")


def test_a_state_of_a_gguf_model_is_used_with_that_model_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = gguf_models.save(tmp_path / "model", "mixtral")
    with offmoe.from_pretrained(written.file, device="cpu", slots_per_layer=4).offload as offload:
        offload.save_state(tmp_path / "empty.json")
    model = offmoe.from_pretrained(written.file, device="cpu", slots_per_layer=4, state=tmp_path / "empty.json")
    with model.offload as offload:
        run(model)
        offload.save_state(tmp_path / "state.json")
        assert offload.fill_progress().total_experts > 0
    with offmoe.from_pretrained(
        written.file, device="cpu", slots_per_layer=4, state=tmp_path / "state.json"
    ).offload as offload:
        assert offload.config.warm_counts is not None
    assert not [record for record in caplog.records if "state" in record.message]
