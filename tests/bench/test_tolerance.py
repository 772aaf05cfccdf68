"""The tolerance rule accepts honest results and refuses wrong ones."""

from __future__ import annotations

import pytest
import torch

from tests.cases import LinearCase, assert_right, codec_weight, errors, run_ours, run_torch, truth, wrong_quantization
from tests.tolerance import Truth, compare, unit_roundoff

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASE = LinearCase(33, 64, 96, 8, torch.bfloat16, bias=True, dropout_p=0.25)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("m", "n", "k", "r"), [(1, 1, 1, 1), (1, 7, 33, 2), (64, 128, 256, 16), (0, 8, 8, 2)])
def test_torch_keeps_its_own_rule(dtype: torch.dtype, m: int, n: int, k: int, r: int) -> None:
    inputs = LinearCase(m, n, k, r, dtype, bias=True, dropout_p=0.1).inputs()
    assert_right(inputs, run_torch(inputs))
    assert_right(inputs, run_ours(inputs))


def test_exact_result_is_accepted_where_torch_is_exact_too() -> None:
    value = torch.arange(6.0)
    assert compare(value, value, Truth.of(value)).wrong is None


@pytest.mark.parametrize("name", ["y", "dx", "dlora_a", "dlora_b", "dbias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_per_cent_off_is_refused(name: str, dtype: torch.dtype) -> None:
    inputs = LinearCase(64, 64, 96, 8, dtype, bias=True, dropout_p=0.25).inputs()
    got = run_ours(inputs)
    got[name] = got[name] * 1.015
    assert [n for n, e in errors(inputs, got).items() if e.wrong] == [name]


def test_one_wrong_element_of_many_is_refused() -> None:
    """An RMS alone would not show it: it is 0.3 of torch's own error."""
    inputs = LinearCase(256, 1024, 64, dtype=torch.bfloat16).inputs()
    got = run_ours(inputs)
    y = got["y"].clone()
    y[200, 1000] += y.float().square().mean().sqrt() * 0.5
    error = errors(inputs, {"y": y})["y"]
    assert error.rms < error.limit_rms
    assert error.wrong is not None
    assert "(200, 1000)" in error.wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(value: float) -> None:
    inputs = CASE.inputs()
    got = run_ours(inputs)
    got["dx"][3, 5] = value
    wrong = errors(inputs, got)["dx"].wrong
    assert wrong is not None
    assert "(3, 5)" in wrong


def test_missing_gradient_and_wrong_shape_are_refused() -> None:
    inputs = CASE.inputs()
    got = run_ours(inputs)
    with pytest.raises(AssertionError, match="results"):
        assert_right(inputs, {"y": got["y"]})
    with pytest.raises(AssertionError, match="shape"):
        assert_right(inputs, {**got, "y": got["y"].T})


def test_small_rows_are_held_to_their_own_scale() -> None:
    """An error that is nothing beside the largest row is refused in the smallest."""
    inputs = LinearCase(64, 64, 96, dtype=torch.float32, ill_scaled=True).inputs()
    got, exact = run_ours(inputs), truth(inputs)["y"]
    row = int(exact.magnitude.mean(1).argmin())
    y = got["y"].clone()
    y[row] += exact.value.abs().max() * unit_roundoff(torch.float32)
    assert errors(inputs, {"y": y})["y"].wrong


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_wrong_code_is_refused(double_quant: bool) -> None:
    from lora_ops.functional import quantize_nf4

    w = codec_weight(33, 96, dtype=torch.bfloat16, ill_scaled=True)
    q = quantize_nf4(w, double_quant=double_quant)
    assert wrong_quantization(w, q) is None
    q.packed[100] ^= 0x10
    wrong = wrong_quantization(w, q)
    assert wrong is not None
    assert wrong.startswith("1 of")
