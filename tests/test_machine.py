"""What a slow CPU is told: why 16-bit products are slow there and what to do, once, and nothing where they are fast."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_ops
from lora_ops import cli
from lora_ops.quant import native_abi
from lora_ops.runtime import machine, native
from tests import models

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """A CPU whose oneDNN takes 16-bit dtypes, or does not, that has been told nothing yet."""

    def takes(answer: bool) -> None:
        monkeypatch.setattr(machine, "_onednn_takes", lambda dtype: answer)
        machine.slow_16bit_reason.cache_clear()

    monkeypatch.setattr(machine, "_told", set())
    yield takes
    machine.slow_16bit_reason.cache_clear()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_the_reason_is_by_features(onednn: Callable[[bool], None], dtype: torch.dtype) -> None:
    onednn(True)
    assert machine.slow_16bit_reason(dtype) is None
    onednn(False)
    reason = machine.slow_16bit_reason(dtype)
    assert reason is not None
    assert str(dtype).removeprefix("torch.") in reason
    assert torch.backends.cpu.get_cpu_capability() in reason


def test_the_answer_for_this_cpu() -> None:
    """oneDNN takes bfloat16 on x86 with AVX-512 (or with AVX-NE-CONVERT), by what the kernel lists of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if "avx2" not in flags or not torch.backends.mkldnn.is_available():
        pytest.skip("the answer is known for x86 with AVX2 or more, on Linux, with a torch that was built with oneDNN")
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":  # make test ISA=avx2
        flags = {"avx2"}
    fast = {"avx512bw", "avx512vl", "avx512dq"} <= flags or "avx_ne_convert" in flags
    assert (machine.slow_16bit_reason(torch.bfloat16) is None) == fast


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_inject_tells_once(
    onednn: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
) -> None:
    onednn(False)
    monkeypatch.setattr(native_abi, "takes_dense", lambda weight: False)
    with caplog.at_level(logging.WARNING, "lora_ops"):
        lora_ops.inject(models.llama(dtype=dtype), r=2)
        lora_ops.inject(models.gpt2(dtype=dtype), r=2)
    (message,) = [r.getMessage() for r in caplog.records if "120 times" in r.getMessage()]
    assert "15 frozen weights are dense" in message  # 7 of each layer and lm_head; not the embedding, not the adapters
    assert "q_proj.base_layer.weight, " in message
    assert "dtype=torch.float32" in message
    assert message.count("_proj") == 3, "a few names, not all"


class Scaled(nn.Linear):
    """A linear layer that lora_ops does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def with_a_class_of_its_own() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), Scaled(64, 64)).bfloat16()


def test_weights_that_lora_ops_multiplies_are_not_slow(
    onednn: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    onednn(False)
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native_abi, "takes_dense", lambda weight: True)
    with caplog.at_level(logging.WARNING, "lora_ops"):
        lora_ops.inject(models.llama(dtype=torch.bfloat16), r=2)
        lora_ops.inject(models.llama(dtype=torch.float16), r=2, target_modules=["q_proj", "v_proj"])
        assert not [r for r in caplog.records if "120 times" in r.getMessage()]
        lora_ops.inject(with_a_class_of_its_own(), r=2, target_modules=["0"])
    messages = [r.getMessage() for r in caplog.records if "120 times" in r.getMessage()]
    (message,) = messages
    assert "1 frozen weights are dense bfloat16" in message
    assert "1.weight" in message


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_nothing_is_told_where_nothing_is_slow(
    onednn: Callable[[bool], None], caplog: pytest.LogCaptureFixture, fast: bool, dtype: torch.dtype
) -> None:
    onednn(fast)
    with caplog.at_level(logging.WARNING, "lora_ops"):
        lora_ops.inject(models.llama(dtype=dtype), r=2)
    assert not caplog.records


def test_nf4_weights_are_not_slow(
    onednn: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    onednn(False)
    monkeypatch.setattr(native_abi, "takes_dense", lambda weight: False)
    with caplog.at_level(logging.WARNING, "lora_ops"):
        lora_ops.inject(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16(), r=2, quantize="nf4")
        assert not [r for r in caplog.records if "120 times" in r.getMessage()]
        lora_ops.inject(models.llama(dtype=torch.bfloat16), r=2, quantize="nf4")
    (message,) = [r.getMessage() for r in caplog.records if "120 times" in r.getMessage()]
    assert "1 frozen weights" in message
    assert "lm_head.weight" in message


def test_doctor(onednn: Callable[[bool], None]) -> None:
    onednn(True)
    assert "slow:" not in cli.doctor()
    onednn(False)
    out = cli.doctor()
    assert out.count("slow: ") == 2
    assert "products in bfloat16" in out
    assert "products in float16" in out
    assert "dtype=torch.float32" in out
