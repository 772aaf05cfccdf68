"""Pages on a simulated CUDA device: the same bits in every order that its streams may run in, and no wait too few."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ops.optim import AdamW
from lora_ops.optim.tiers import PinnedTier, Tier
from tests.optim.conftest import assert_equal
from tests.optim.simulated import ACTORS, Adversary, SimulatedDevice

EXTENT = 4096
SIZES = (3000, 5000, 70, 1500, 4200)  # 8 to 28 extents, by bits

adversaries = st.builds(
    Adversary,
    seed=st.integers(0, 2**32),
    order=st.permutations(ACTORS),
    loyalty=st.sampled_from((0.0, 0.8, 1.0)),
    eagerness=st.sampled_from((0.0, 0.5, 0.9)),
)


class SimulatedAdamW(AdamW):
    """AdamW for parameters on a simulated device."""

    def __init__(self, params: Any, device: SimulatedDevice, **kwargs: Any) -> None:
        self.simulated = device
        super().__init__(params, extent_bytes=EXTENT, page_budget=device.budget, **kwargs)

    def _tier(self, page_dir: Any, extent_bytes: int) -> Tier:
        return PinnedTier(self.simulated, extent_bytes)


class Model:
    """Parameters, and gradients that depend on the step alone."""

    def __init__(self, device: SimulatedDevice | None) -> None:
        g = torch.Generator().manual_seed(0)
        self.device = device
        self.params = [torch.nn.Parameter(self.place(torch.randn(n, generator=g))) for n in SIZES]

    def place(self, t: torch.Tensor) -> torch.Tensor:
        return t if self.device is None else self.device.adopt(t)

    def backward(self, step: int) -> None:
        """Parameter 3 has a gradient in every second step."""
        g = torch.Generator().manual_seed(step + 1)
        for i, (p, n) in enumerate(zip(self.params, SIZES, strict=True)):
            grad = torch.randn(n, generator=g)
            p.grad = None if i == 3 and step % 2 else self.place(grad)


def train(model: Model, optimizer: AdamW, steps: range) -> None:
    for step in steps:
        model.backward(step)
        optimizer.step()


def outcome(model: Model, optimizer: AdamW) -> dict[str, torch.Tensor]:
    found = {f"param.{i}": p.detach().cpu().clone() for i, p in enumerate(model.params)}
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"{i}.{name}": t.clone() for name, t in state.items()}
    return found


def unpaged(bits: int, steps: int) -> dict[str, torch.Tensor]:
    model = Model(None)
    optimizer = AdamW(model.params, state_bits=bits)
    train(model, optimizer, range(steps))
    return outcome(model, optimizer)


@given(adversary=adversaries, bits=st.sampled_from((32, 8)), frames=st.integers(2, 9))
def test_same_bits_in_every_order(adversary: Adversary, bits: int, frames: int) -> None:
    device = SimulatedDevice(adversary, budget=frames * EXTENT)
    with device:
        model = Model(device)
        optimizer = SimulatedAdamW(model.params, device, state_bits=bits)
        train(model, optimizer, range(3))
        assert device.host_waits == 0
        found = outcome(model, optimizer)
        optimizer.close()
    assert_equal(found, unpaged(bits, 3))
