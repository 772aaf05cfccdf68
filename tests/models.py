"""Tiny Hugging Face models with seeded random weights, built from their configurations: nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 64
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **config: object) -> PreTrainedModel:
    """RMSNorm, grouped-query attention, no biases."""
    return _build(LlamaForCausalLM, LlamaConfig(**_SIZES, **config), seed, dtype)


def qwen2(seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Biases on q, k and v; tied embeddings."""
    return _build(Qwen2ForCausalLM, Qwen2Config(**_SIZES, tie_word_embeddings=True), seed, dtype)


def gpt2(seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Conv1D layers, whose weights are stored as (K, N), with biases; tied embeddings."""
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _build(GPT2LMHeadModel, config, seed, dtype)


def t5(seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """An encoder and a decoder; keeps `wo` in float32 and casts activations to its weight's dtype."""
    config = T5Config(
        vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, dropout_rate=0.0, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return _build(T5ForConditionalGeneration, config, seed, dtype)


DECODERS = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2}


def _build(cls: type, config: object, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config)
        # Biases start at zero, which would hide that one is lost.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def token_ids(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random tokens [batch, length], none of them a special one."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
