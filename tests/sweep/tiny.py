"""Tiny models: a configuration class with its sizes made small, by the names that transformers gives to sizes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tests.sweep.families import Family

VOCAB = 64
LENGTH = 8  # tokens of an input
IMAGE = 32  # pixels of a side
_MAX_NUMEL = 20_000_000  # of a model that counts as tiny
_SIZES: dict[tuple[str, ...], Any] = {
    ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "encoder_hidden_size", "decoder_hidden_size", "emb_dim",
     "embedding_size", "hidden_dim", "projection_dim", "word_embed_proj_dim", "projector_hidden_size"): 64,
    ("intermediate_size", "d_ff", "ffn_dim", "ffn_hidden_size", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
     "moe_intermediate_size", "shared_expert_intermediate_size", "feed_forward_proj_size", "dff", "mlp_dim",
     "decoder_intermediate_size", "encoder_intermediate_size"): 96,
    ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
     "num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers", "depth", "num_block_repeats"): 2,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
     "encoder_num_attention_heads", "decoder_num_attention_heads", "num_key_value_heads", "encoder_num_key_value_heads",
     "decoder_num_key_value_heads", "num_kv_heads", "attention_heads"): 4,
    ("head_dim", "kv_channels", "d_kv", "d_head", "attention_head_size", "qk_nope_head_dim", "v_head_dim",
     "global_head_dim"): 16,
    ("qk_rope_head_dim",): 8,
    ("q_lora_rank", "kv_lora_rank"): 32,
    ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"): VOCAB,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "max_source_positions",
     "max_target_positions"): 64,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "experts_per_token"): 2,
    ("n_group", "topk_group"): 1,
    ("first_k_dense_replace",): 1,
    ("image_size",): IMAGE,
    ("patch_size",): 8,
    ("num_mel_bins", "num_mel_features"): 16,
    ("bos_token_id", "decoder_start_token_id"): 1,
    ("eos_token_id", "sep_token_id"): 2,
    ("pad_token_id",): 0,
    ("num_labels",): 3,
}  # fmt: skip
_BY_NAME = {name: value for names, value in _SIZES.items() for name in names}


# What a family asks for that its sizes' names do not tell.
_FIXED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
    "codegen": {"rotary_dim": 16},
    "deepseek_v2": {"topk_method": "greedy"},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32]},
    "swin": {"embed_dim": 48, "depths": [1, 1], "num_heads": [3, 6], "window_size": 4, "patch_size": 4},
    "swinv2": {"embed_dim": 48, "depths": [1, 1], "num_heads": [3, 6], "window_size": 4, "patch_size": 4},
    "wav2vec2-bert": {"vocab_size": VOCAB},
    "wav2vec2-conformer": {"vocab_size": VOCAB},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2, "mamba_d_state": 8},
}


def tiny_config(config_class: type[PretrainedConfig], **fixed: Any) -> PretrainedConfig:
    """The class's default configuration with small sizes, its parts likewise.

    Args:
        config_class: of transformers.
        fixed: values that are taken as they are.
    """
    default = config_class()
    defaults = default.to_dict()
    known = {*inspect.signature(config_class).parameters, *defaults, *config_class.attribute_map}
    values: dict[str, Any] = {}
    for name, value in _BY_NAME.items():
        current = defaults.get(config_class.attribute_map.get(name, name))
        if name in known and (isinstance(current, int) or name.endswith("token_id")) and not isinstance(current, bool):
            values[name] = value
    if "qk_rope_head_dim" in known:
        values.pop("head_dim", None)  # there it is the rotary part's, and follows
    for name, value in defaults.items():
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig):
            values[name] = tiny_config(type(part)).to_dict()
        elif name == "layer_types" and value:
            kinds = list(dict.fromkeys(value))  # one layer of each kind
            values[name] = kinds if len(kinds) > 1 else kinds * 2
            values["num_hidden_layers"] = len(values[name])
        elif isinstance(value, dict) and "mrope_section" in value:
            values[name] = {**value, "mrope_section": [2, 3, 3]}  # half of a head's 16
    values.update(_FIXED.get(config_class.model_type, {}))
    values.update(fixed)
    for alias, name in config_class.attribute_map.items():  # the same value under two names is given once
        if alias in values and name in values:
            del values[alias]
    return config_class(**values)


def build(family: Family, seed: int = 0) -> PreTrainedModel:
    """The family's model with seeded random weights, float32, in eval mode."""
    config = tiny_config(family.model_class.config_class)
    with torch.device("meta"):
        numel = sum(p.numel() for p in family.model_class._from_config(config).parameters())
    if numel > _MAX_NUMEL:
        raise NotImplementedError(
            f"{numel / 1e6:.0f} million parameters: a size with a name of its own is not made small"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = family.model_class._from_config(config)
        for name, parameter in model.named_parameters():  # biases that start at zero would hide that one is lost
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
