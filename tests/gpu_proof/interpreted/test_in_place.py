"""Outputs of the Triton kernels may be changed in place: what tests/test_in_place.py asks of every backend."""

from __future__ import annotations

import pytest

from tests import test_in_place as every_backend
from tests.test_in_place import LINEARS


@pytest.mark.parametrize("shape", [(32,), (2, 3, 32)], ids=every_backend.shape_id)
@pytest.mark.parametrize("kind", LINEARS)
def test_in_place_is_out_of_place(kind: str, shape: tuple[int, ...]) -> None:
    every_backend.test_in_place_is_out_of_place("triton", kind, shape)


@pytest.mark.parametrize("kind", LINEARS)
def test_gradients_may_be_changed(kind: str) -> None:
    every_backend.test_gradients_may_be_changed("triton", kind, (2, 3, 32))


def test_no_op_returns_a_view() -> None:
    every_backend.test_no_op_returns_a_view("triton")
