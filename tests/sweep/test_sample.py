"""A sample of `make sweep`: families that differ in what they ask of `inject`."""

from __future__ import annotations

import pytest

from tests.sweep.compare import run
from tests.sweep.families import families

BY_TYPE = {family.model_type: family for family in families()}
SAMPLE = [
    "llama", "qwen3", "gemma2", "phi3", "gpt2", "gptj", "opt", "bloom", "falcon", "mixtral", "qwen3_moe", "qwen3_next",
    "jamba", "rwkv",  # decoders: norms, biases, Conv1D, one fused projection, experts, state spaces
    "t5", "switch_transformers", "bart", "led",
    "bert", "deberta-v2", "mobilebert", "longformer",
    "whisper", "wavlm", "vit",
]  # fmt: skip


@pytest.mark.parametrize("model_type", SAMPLE)
def test_equals_stock_peft_or_says_why_not(model_type: str) -> None:
    outcomes = run(BY_TYPE[model_type])
    verdicts = {name: (o.verdict, o.detail) for name, o in outcomes.items()}
    assert {verdict for verdict, _ in verdicts.values()} <= {"equal", "refused"}, verdicts
    adapted = outcomes["dense"].fused[1]
    assert adapted > 0 or outcomes["dense"].verdict == "refused"
