"""Tiny configs of every MoE family of transformers, as published checkpoints have them except for the sizes.

Eight experts; two per token and one dense layer before the MoE layers if the family can. Every optional part is
switched on (shared experts, groups, correction biases, sliding windows, indexers), because a part that is absent is not
tested.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from tests import tiny

VOCABULARY = tiny.VOCABULARY + 7
"""Vocabulary of multimodal models. The last ids are placeholders, which no prompt of `tiny.prompt` contains."""
IMAGE, VIDEO, VISION_START, VISION_END, AUDIO, AUDIO_START, AUDIO_END = range(tiny.VOCABULARY, VOCABULARY)

Config = dict[str, Any]


def _text(*parts: Config, without: tuple[str, ...] = (), **values: Any) -> Config:
    """tiny.COMMON and what a family adds to it."""
    out: Config = {}
    for part in (tiny.COMMON, *parts, values):
        out |= part
    return {name: value for name, value in out.items() if name not in without}


MLA: Config = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
INDEXER: Config = {"index_topk": 6, "index_head_dim": 16, "index_n_heads": 2}
FFN: Config = {"intermediate_size": 48, "moe_intermediate_size": 24}
EXPERTS: Config = {"num_experts": tiny.NUM_EXPERTS}
ROUTED: Config = {"n_routed_experts": tiny.NUM_EXPERTS, "n_shared_experts": 1}
LOCAL: Config = {"num_local_experts": tiny.NUM_EXPERTS}
GROUPS: Config = {"n_group": 2, "topk_group": 1}
DENSE_FIRST: Config = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
SLIDING: Config = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 8}
DELTA_NET: Config = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
}
VISION: Config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
PATCHED: Config = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
MROPE: Config = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 1.0,
    }
}
VISION_IDS: Config = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_SAM: Config = dict(VISION, output_channels=16, image_size=64, patch_size=16, window_size=2, global_attn_indexes=[0])

_GEMMA4 = _text(
    FFN,
    EXPERTS,
    SLIDING,
    without=("num_experts_per_tok",),
    top_k_experts=2,
    enable_moe_block=True,
    head_dim=8,
    global_head_dim=8,
    hidden_size_per_layer_input=0,
)
_LLAMA4 = _text(
    LOCAL,
    intermediate_size=24,
    intermediate_size_mlp=48,
    num_experts_per_tok=1,
    interleave_moe_layer_step=1,
    head_dim=8,
    attention_chunk_size=64,
)
_QWEN3_5 = _text(EXPERTS, DELTA_NET, moe_intermediate_size=24, shared_expert_intermediate_size=40, head_dim=8)
_ARIA = _text(
    without=("num_experts_per_tok",),
    intermediate_size=24,
    moe_num_experts=tiny.NUM_EXPERTS,
    moe_topk=2,
    moe_num_shared_experts=1,
    head_dim=8,
)
_NEMOTRON_H = _text(
    FFN,
    ROUTED,
    without=("num_hidden_layers",),
    moe_shared_expert_intermediate_size=40,
    layers_block_type=["attention", "moe", "mamba", "moe"],
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    n_groups=2,
    ssm_state_size=8,
)
_INKLING = _text(
    ROUTED,
    FFN,
    n_shared_experts=2,
    head_dim=8,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=8,
    sliding_window_size=8,
    d_rel=4,
    rel_extent=64,
)
_INKLING2 = _text(
    n_routed_experts=tiny.NUM_EXPERTS,
    moe_intermediate_size=24,
    head_dim=8,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=8,
    sliding_window_size=8,
    d_rel=4,
    rel_extent=64,
    n_layers_per_attn_res_block=2,
    unpadded_vocab_size=tiny.VOCABULARY,
    layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
)
_DOTS3 = _text(
    MLA,
    FFN,
    ROUTED,
    GROUPS,
    INDEXER,
    head_dim=8,
    layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
    sliding_window=8,
    shared_experts_intermediate_size=40,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=4,
    swa_q_lora_rank=16,
    swa_kv_lora_rank=16,
    swa_head_dim=16,
    swa_qk_nope_head_dim=8,
    swa_v_head_dim=8,
)
_QWEN4 = _text(
    EXPERTS,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "indexed_attention", "indexed_attention"],
    moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
    head_dim=8,
    hc_count=2,
    hc_lowrank=8,
    ple_layer_ids=[1],
    ple_embed_dim=16,
    heads_per_ngram=2,
    ngram_vocab_size_base=50,
    make_ngram_vocab_size_divisible_by=8,
    split_ngram_parts=2,
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=8,
    indexer_budget=8,
    indexer_compress_ratio=4,
)
_OCR_TEXT = _text(
    FFN,
    ROUTED,
    DENSE_FIRST,
    num_key_value_heads=4,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    vocab_size=VOCABULARY,
)

CONFIGS: dict[str, Config] = {
    **{family: _text(values) for family, values in tiny.CONFIGS.items()},
    "afmoe": _text(FFN, EXPERTS, SLIDING, num_shared_experts=1, num_dense_layers=1, head_dim=8),
    "aria": {
        "text_config": _ARIA | {"vocab_size": VOCABULARY},
        "vision_config": dict(VISION, model_type="idefics3_vision", image_size=56, patch_size=14),
        "projector_patch_to_query_dict": {16: 4},
        "image_token_index": IMAGE,
    },
    "aria_text": _ARIA,
    "axk1": _text(MLA, FFN, ROUTED, GROUPS, DENSE_FIRST),
    "axk2": _text(MLA, FFN, ROUTED, GROUPS, INDEXER, DENSE_FIRST, gated_norm_rank=4),
    "bailing_hybrid": _text(
        MLA,
        FFN,
        LOCAL,
        GROUPS,
        DENSE_FIRST,
        n_shared_experts=1,
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "full_attention"],
    ),
    "beam": _text(FFN, EXPERTS, GROUPS, SLIDING, DENSE_FIRST, head_dim=8),
    "cohere2_moe": _text(
        EXPERTS,
        SLIDING,
        DENSE_FIRST,
        intermediate_size=24,
        head_dim=8,
        num_shared_experts=1,
        prefix_dense_intermediate_size=48,
    ),
    "dbrx": {
        "vocab_size": tiny.VOCABULARY,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_ocr2": {
        "text_config": _OCR_TEXT,
        "vision_config": {
            "sam_config": dict(_SAM, downsample_channels=[16, 32], mlp_dim=48),
            "encoder_config": dict(VISION, num_key_value_heads=4, max_position_embeddings=64),
        },
        "image_token_id": IMAGE,
    },
    "deepseek_v32": _text(MLA, FFN, ROUTED, GROUPS, INDEXER, first_k_dense_replace=1),
    "deepseek_v4": _text(
        ROUTED,
        INDEXER,
        moe_intermediate_size=24,
        num_key_value_heads=1,
        head_dim=16,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        sliding_window=8,
        mlp_layer_types=["hash_moe", "moe", "moe"],
        layer_types=["sliding_attention"] * 3,
    ),
    "diffusion_gemma": {
        "text_config": _text(
            FFN,
            EXPERTS,
            SLIDING,
            without=("num_experts_per_tok",),
            top_k_experts=2,
            head_dim=8,
            vocab_size=VOCABULARY,
        ),
        "vision_config": dict(VISION, num_key_value_heads=4, head_dim=8, model_type="gemma4_vision"),
        "image_token_id": IMAGE,
        "boi_token_id": VISION_START,
        "eoi_token_id": VISION_END,
        "canvas_length": 8,
    },
    "dots1": _text(FFN, ROUTED, GROUPS, first_k_dense_replace=1, head_dim=8),
    "dots3_note": {
        "text_config": _DOTS3 | {"vocab_size": VOCABULARY},
        "vision_config": dict(
            VISION,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            mlp_layer_types=["dense", "sparse"],
            num_local_experts=4,
            num_experts_per_tok=2,
            adapter_in_dim=32,
            adapter_out_dim=32,
        ),
        "audio_config": dict(
            VISION, feature_size=16, downsample_hidden_size=8, adapter_input_size=32, adapter_out_dim=32
        ),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "audio_token_id": AUDIO,
    },
    "dots3_note_text": _DOTS3,
    "ernie4_5_moe": _text(
        FFN,
        without=("num_experts_per_tok",),
        moe_num_experts=tiny.NUM_EXPERTS,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        head_dim=8,
    ),
    "ernie4_5_vl_moe": {
        "text_config": _text(
            DENSE_FIRST,
            MROPE,
            without=("num_experts_per_tok",),
            vocab_size=VOCABULARY,
            intermediate_size=48,
            moe_intermediate_size=[24, 16],
            moe_num_experts=tiny.NUM_EXPERTS,
            moe_k=2,
            moe_num_shared_experts=1,
            head_dim=8,
        ),
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": VISION_START,
        "image_end_token_id": VISION_END,
    },
    "exaone_moe": _text(FFN, EXPERTS, SLIDING, DENSE_FIRST, num_shared_experts=1),
    "flex_olmo": _text(EXPERTS, intermediate_size=24),
    "flint": _text(FFN, EXPERTS, SLIDING, shared_expert_intermediate_size=40, mlp_only_layers=[0], head_dim=8),
    "gemma4": {
        "text_config": _GEMMA4 | {"vocab_size": VOCABULARY},
        "vision_config": dict(VISION, num_key_value_heads=4, head_dim=8, position_embedding_size=16),
        "audio_config": None,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "boi_token_id": VISION_START,
        "eoi_token_id": VISION_END,
    },
    "gemma4_text": _GEMMA4,
    "glm4_moe": _text(FFN, ROUTED, GROUPS, first_k_dense_replace=1, head_dim=8),
    "glm4_moe_lite": _text(MLA, FFN, ROUTED, GROUPS, DENSE_FIRST),
    "glm4v_moe": {
        "text_config": _text(FFN, ROUTED, GROUPS, MROPE, first_k_dense_replace=1, head_dim=8, vocab_size=VOCABULARY),
        "vision_config": dict(PATCHED, image_size=28, patch_size=14),
        **VISION_IDS,
        "image_start_token_id": VISION_START,
        "image_end_token_id": VISION_END,
    },
    "glm5_next": {
        "text_config": _text(
            MLA,
            FFN,
            ROUTED,
            GROUPS,
            DENSE_FIRST,
            INDEXER,
            qk_rope_head_dim=0,
            index_topk=8,
            index_kpool=4,
            linear_head_dim=8,
            linear_num_heads=4,
            hc_mult=2,
            hc_sinkhorn_iters=4,
            layer_types=["linear_attention", "indexed_attention", "indexed_attention"],
            vocab_size=VOCABULARY,
        ),
        "vision_config": dict(PATCHED, image_size=28, patch_size=14, projection_intermediate_size=40),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": VISION_START,
        "image_end_token_id": VISION_END,
    },
    "glm_moe_dsa": _text(MLA, FFN, ROUTED, GROUPS, DENSE_FIRST, INDEXER),
    "granitemoe_swa": _text(
        LOCAL, SLIDING, intermediate_size=24, shared_intermediate_size=40, layer_rope_theta=[10000.0, 0, 5000.0]
    ),
    "granitemoehybrid": _text(
        LOCAL,
        intermediate_size=24,
        shared_intermediate_size=40,
        layer_types=["mamba", "attention", "attention"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
    ),
    "granitemoeshared": _text(LOCAL, intermediate_size=24, shared_intermediate_size=40),
    "hunyuan_v1_moe": _text(
        EXPERTS, without=("num_experts_per_tok",), intermediate_size=24, moe_topk=2, num_shared_expert=1, head_dim=8
    ),
    "hy_v3": _text(FFN, EXPERTS, DENSE_FIRST, num_shared_experts=1, head_dim=8),
    "hy_v4": _text(MLA, FFN, ROUTED, GROUPS, DENSE_FIRST, INDEXER, hc_mult=2),
    "inkling2": {
        "text_config": _INKLING2 | {"vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY},
        "vision_config": dict(VISION, patch_size=4, posemb_grid_size=4, projection_hidden_dim=32, text_hidden_size=32),
        "image_token_id": IMAGE,
    },
    "inkling2_text": _INKLING2,
    "inkling_mm_model": {
        "text_config": _INKLING | {"vocab_size": VOCABULARY},
        "vision_config": dict(VISION, text_hidden_size=32, patch_size=4, num_hidden_layers=5),
        "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8, "text_hidden_size": 32},
        "image_token_id": IMAGE,
        "audio_token_id": AUDIO,
        "image_bos_token_id": VISION_START,
        "audio_bos_token_id": AUDIO_START,
    },
    "inkling_text": _INKLING,
    "jamba": _text(
        EXPERTS,
        num_hidden_layers=4,
        intermediate_size=24,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "jetmoe": _text(LOCAL, intermediate_size=24, kv_channels=8),
    "kimi_k25": {
        "text_config": _text(tiny.CONFIGS["deepseek_v3"], model_type="deepseek_v3", vocab_size=VOCABULARY),
        "vision_config": dict(VISION, pos_emb_height=4, pos_emb_width=4),
        "projection_hidden_size": 32,
        "tie_word_embeddings": False,
        **VISION_IDS,
    },
    "kimi_linear": _text(
        MLA,
        FFN,
        LOCAL,
        DENSE_FIRST,
        n_shared_experts=1,
        q_lora_rank=None,
        linear_head_dim=8,
        linear_num_heads=4,
        layer_types=["linear_attention", "full_attention", "full_attention"],
    ),
    "kolibri1": _text(EXPERTS, SLIDING, moe_intermediate_size=24, shared_expert_intermediate_size=40, head_dim=8),
    "laguna": _text(FFN, EXPERTS, SLIDING, DENSE_FIRST, shared_expert_intermediate_size=40, head_dim=8),
    "lfm2_moe": _text(FFN, EXPERTS, num_dense_layers=1, layer_types=["conv", "full_attention", "full_attention"]),
    "llama4": {
        "text_config": _LLAMA4 | {"vocab_size": VOCABULARY},
        "vision_config": dict(
            VISION,
            intermediate_size=128,
            vision_output_dim=32,
            image_size=56,
            projector_input_dim=32,
            projector_output_dim=32,
        ),
        "image_token_index": IMAGE,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
    },
    "llama4_text": _LLAMA4,
    "longcat_flash": _text(
        MLA,
        without=("num_hidden_layers", "num_experts_per_tok"),
        num_layers=2,
        head_dim=8,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=24,
        n_routed_experts=tiny.NUM_EXPERTS,
        moe_topk=3,
        zero_expert_num=4,
    ),
    "mellum": _text(FFN, EXPERTS, SLIDING, mlp_layer_types=["sparse"] * 3, head_dim=8),
    "mimo_v2_flash": _text(
        FFN, SLIDING, DENSE_FIRST, GROUPS, n_routed_experts=tiny.NUM_EXPERTS, head_dim=8, v_head_dim=8
    ),
    "minimax": _text(
        LOCAL,
        intermediate_size=24,
        head_dim=8,
        block_size=16,
        layer_types=["full_attention", "linear_attention", "full_attention"],
    ),
    "minimax_m2": _text(LOCAL, intermediate_size=24, head_dim=8),
    "minimax_m3_vl": {
        "text_config": _text(
            LOCAL,
            DENSE_FIRST,
            intermediate_size=24,
            dense_intermediate_size=48,
            shared_intermediate_size=40,
            head_dim=8,
            rotary_dim=4,
            index_n_heads=2,
            index_head_dim=8,
            index_block_size=4,
            index_topk_blocks=2,
            vocab_size=VOCABULARY,
        ),
        "vision_config": dict(VISION, image_size=28),
        "projector_hidden_size": 32,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    },
    "mistral4": _text(MLA, FFN, ROUTED, GROUPS, first_k_dense_replace=1),
    "mistral_large4": {
        "text_config": _text(
            MLA, FFN, ROUTED, GROUPS, INDEXER, vocab_size=VOCABULARY, model_type="mistral_large4_text"
        ),
        "vision_config": dict(VISION, model_type="pixtral", image_size=56, patch_size=14),
        "image_token_index": IMAGE,
    },
    "muse_spark": {
        "text_config": _text(FFN, LOCAL, SLIDING, DENSE_FIRST, head_dim=8, moe_hidden_size=16, vocab_size=VOCABULARY),
        "vision_config": dict(VISION, pos_emb_height=4, pos_emb_width=4, max_position_embeddings=16),
        "out_hidden_size": 128,
        "projector_hidden_size": 32,
        "audio_config": {
            "patch_sizes": [16, 6],
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": 32,
        },
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "audio_token_id": AUDIO,
    },
    "nemotron_h": _NEMOTRON_H,
    "nllb-moe": {
        "vocab_size": tiny.VOCABULARY,
        "d_model": 32,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_experts": tiny.NUM_EXPERTS,
        "expert_capacity": 32,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    },
    "phimoe": _text(LOCAL, intermediate_size=24),
    "qwen3_5_moe": {
        "text_config": _QWEN3_5 | {"vocab_size": VOCABULARY},
        "vision_config": dict(PATCHED, num_position_embeddings=16),
        **VISION_IDS,
    },
    "qwen3_5_moe_text": _QWEN3_5,
    "qwen3_next": _text(FFN, EXPERTS, DELTA_NET, shared_expert_intermediate_size=40, head_dim=8, mlp_only_layers=[0]),
    "qwen3_omni_moe_thinker": {
        "text_config": _text(FFN, EXPERTS, MROPE, head_dim=8, vocab_size=VOCABULARY, mlp_only_layers=[0]),
        "vision_config": dict(PATCHED, num_position_embeddings=16, deepstack_visual_indexes=[0]),
        "audio_config": {
            "num_mel_bins": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "output_dim": 32,
            "downsample_hidden_size": 8,
            "n_window": 8,
            "n_window_infer": 16,
        },
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "audio_token_id": AUDIO,
        "audio_start_token_id": AUDIO_START,
        "vision_start_token_id": VISION_START,
    },
    "qwen3_vl_moe": {
        "text_config": _text(FFN, EXPERTS, head_dim=8, vocab_size=VOCABULARY),
        "vision_config": dict(PATCHED, num_position_embeddings=16, deepstack_visual_indexes=[0]),
        **VISION_IDS,
    },
    "qwen4_exp": {
        "text_config": _QWEN4 | {"vocab_size": VOCABULARY},
        "vision_config": dict(PATCHED, num_position_embeddings=16),
        **VISION_IDS,
    },
    "qwen4_exp_text": _QWEN4,
    "solar_open": _text(FFN, ROUTED, GROUPS, head_dim=8),
    "step3p7": {
        "text_config": _text(
            FFN,
            DENSE_FIRST,
            n_routed_experts=tiny.NUM_EXPERTS,
            head_dim=8,
            share_expert_dim=40,
            swiglu_limits=[0.0, 0.0, 0.5],
            layer_types=["full_attention"] * 3,
            num_sliding_attention_heads=4,
            sliding_window=64,
            vocab_size=VOCABULARY,
        ),
        "vision_config": dict(VISION, image_size=56, max_position_embeddings=16),
        "image_token_id": IMAGE,
    },
    "switch_transformers": {
        "vocab_size": tiny.VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_heads": 4,
        "num_experts": tiny.NUM_EXPERTS,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "expert_capacity": 16,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    },
    "unlimited_ocr": {
        "text_config": _OCR_TEXT | {"layer_types": ["reference_sliding_attention"] * 3, "sliding_window": 8},
        "vision_config": {
            "sam_config": dict(_SAM, downsample_channels=[16, 32], mlp_dim=48),
            "encoder_config": dict(VISION, image_size=64, patch_size=16),
        },
        "image_token_id": IMAGE,
    },
    "zaya": _text(
        EXPERTS,
        without=("intermediate_size",),
        moe_intermediate_size=24,
        num_experts_per_tok=1,
        head_dim=8,
        router_hidden_size=16,
    ),
}
FAMILIES = tuple(sorted(family for family in CONFIGS if family in CONFIG_MAPPING))
"""The families that the installed transformers knows."""

REFUSED: dict[str, str] = {
    "openai_privacy_filter": "it labels tokens, and transformers has no class of it that generates text",
    "qwen3_omni_moe": "it speaks and listens with a generate() of its own around two models; its thinker, which writes "
    "text, runs as `qwen3_omni_moe_thinker`",
}
REFUSED_CLASSES = ("OpenAIPrivacyFilterExperts", "Qwen3OmniMoeTalkerTextExperts")
"""Experts classes that only refused families use."""


def config(family: str) -> PreTrainedConfig:
    """The tiny config of a family."""
    return AutoConfig.for_model(family, **CONFIGS[family])


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tiny.Model:
    """A stock model of a family in eval mode, every parameter random."""
    return tiny.random_model(config(family), dtype, seed)


def inputs(family: str, batch: int = 2, length: int = 11, seed: int = 3) -> dict[str, torch.Tensor]:
    """Text to run a family on."""
    out = {"input_ids": tiny.prompt(batch, length, seed)}
    if family in ("switch_transformers", "nllb-moe"):
        out["decoder_input_ids"] = tiny.prompt(batch, 5, seed + 100)
    if family == "diffusion_gemma":
        out["decoder_input_ids"] = tiny.prompt(batch, 8, seed + 100)
    return out


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def _patches(patch_size: int, temporal: int = 2) -> dict[str, torch.Tensor]:
    """An image of 4 x 4 patches, as processors flatten it; merged 2 x 2 it takes the place of 4 tokens."""
    pixels = _noise(16, 3 * temporal * patch_size**2)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _square(size: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": _noise(1, 3, size, size)}


def _positioned(patches: int) -> dict[str, torch.Tensor]:
    grid = torch.meshgrid(torch.arange(patches), torch.arange(patches), indexing="ij")
    positions = torch.stack(grid, -1).reshape(1, patches**2, 2)
    return {"pixel_values": _noise(1, patches**2, 3 * 16**2), "image_position_ids": positions}


IMAGES: dict[str, tuple[int, dict[str, torch.Tensor]]] = {
    "aria": (4, _square(56)),
    "diffusion_gemma": (4, _positioned(6)),
    "dots3_note": (4, _patches(14, temporal=1)),
    "ernie4_5_vl_moe": (4, _patches(14, temporal=1)),
    "gemma4": (4, _positioned(6)),
    "glm4v_moe": (4, _patches(14)),
    "glm5_next": (4, _patches(14)),
    "kimi_k25": (4, {"pixel_values": _noise(16, 3, 14, 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}),
    "llama4": (4, _square(56)),
    "minimax_m3_vl": (4, _patches(14)),
    "mistral_large4": (4, _square(56) | {"image_sizes": torch.tensor([[56, 56]])}),
    "muse_spark": (4, _patches(14)),
    "qwen3_5_moe": (4, _patches(16)),
    "qwen3_omni_moe_thinker": (4, _patches(16)),
    "qwen3_vl_moe": (4, _patches(16)),
    "qwen4_exp": (4, _patches(16)),
    "step3p7": (1, _square(56)),
    "unlimited_ocr": (3, _square(64)),
}
"""Family -> number of tokens that an image replaces, and the image as the model takes it."""
TYPED = frozenset({"ernie4_5_vl_moe", "glm4v_moe", "qwen3_5_moe", "qwen3_vl_moe", "qwen4_exp"})
"""Families whose model needs an argument that says which tokens are the image's."""


def image_inputs(family: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Some text, an image, more text."""
    number, image = IMAGES[family]
    placeholders = torch.tensor([[VISION_START, *[IMAGE] * number, VISION_END]])
    out = inputs(family, batch=1) | {name: t.to(dtype) if t.is_floating_point() else t for name, t in image.items()}
    out["input_ids"] = torch.cat([tiny.prompt(1, 3), placeholders, tiny.prompt(1, 4)], dim=1)
    if family in TYPED:
        out["mm_token_type_ids"] = (out["input_ids"] == IMAGE).long()
    if family == "ernie4_5_vl_moe":  # which tokens go to the images' experts
        out["moe_mm_token_type_ids"] = out["mm_token_type_ids"]
    return out
