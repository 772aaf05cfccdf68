"""Tensors of more than 2^31 elements: every address of every op's first, middle and last programs."""

from __future__ import annotations

import pytest

from tests.gpu_proof import registry
from tests.gpu_proof.interpreter import run_virtually

HUGE = [s for module in registry.ops() for s in registry.shipped_by(module) if s.case.huge]


@pytest.mark.parametrize("shipped", HUGE, ids=lambda s: s.id)
def test_addresses_of_huge_tensors(shipped: registry.Shipped) -> None:
    run_virtually(shipped.launch)


def test_some_op_is_checked() -> None:
    assert {s.op for s in HUGE} >= {"nf4_codec", "blockwise8"}
