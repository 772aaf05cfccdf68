"""`lora-ops doctor` tells what is missing and what it costs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lora_ops import cli
from lora_ops.runtime import native


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "reference" in out
    assert ("ok       native" in out) == native.available()


def test_doctor_names_what_is_missing_and_the_cost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    monkeypatch.setattr(
        native, "_load", lambda: native.NativeError(f"the native library was not built: {native.BUILD_HINT}")
    )
    native.unavailable_reason.cache_clear()
    try:
        cli.main(["doctor"])
    finally:
        native.unavailable_reason.cache_clear()
    out = capsys.readouterr().out
    assert "missing  native     the native library was not built" in out
    assert "costs: CPU ops fall back to plain PyTorch" in out
    assert "to do: apt-get install g++" in out
    assert "--no-cache-dir" in out
    assert "without peft: pip install 'lora_ops[train]'" in out


def test_doctor_tells_where_the_routes_of_a_gpu_come_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a chip of tomorrow")
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert "routes by defaults that were not measured on this chip" in out
    assert "bench.gpu --tune" in out


def test_usage() -> None:
    with pytest.raises(SystemExit):
        cli.main([])
