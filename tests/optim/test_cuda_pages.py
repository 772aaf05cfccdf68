"""AdamW with pages on a simulated CUDA device: in every order of its streams the bits of AdamW without pages."""

from __future__ import annotations

import functools
import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_ops.optim import AdamW, PagingError
from tests.optim.conftest import assert_equal
from tests.paging.simulated import Adversary, SimulatedDevice, SimulatedWorker, adversaries

EXTENT = 4096
SIZES = (3000, 5000, 70, 1500, 4200)
STATES = {32: 28, 8: 12}  # extents that these sizes take at least


class SimulatedAdamW(AdamW):
    """AdamW for parameters on a simulated device."""

    def __init__(self, params: Any, device: SimulatedDevice, **kwargs: Any) -> None:
        self.simulated = device
        super().__init__(params, extent_bytes=EXTENT, page_budget=device.budget, **kwargs)
        file = self._store.pager.tier.file  # type: ignore[union-attr]
        if file is not None:
            file._worker = SimulatedWorker(device)

    def _device_of_frames(self, device: torch.device) -> SimulatedDevice:
        return self.simulated


class Model:
    """Parameters, and gradients that depend on the step alone; parameter 3 rests in every second step, or not."""

    def __init__(
        self, device: SimulatedDevice | None, dtype: torch.dtype = torch.float32, *, rests: bool = True
    ) -> None:
        g = torch.Generator().manual_seed(0)
        self.device, self.rests = device, rests
        self.params = [nn.Parameter(self.place(torch.randn(n, generator=g).to(dtype))) for n in SIZES]

    def place(self, t: Tensor) -> Tensor:
        return t if self.device is None else self.device.adopt(t)

    def backward(self, step: int) -> None:
        g = torch.Generator().manual_seed(step + 1)
        for i, (p, n) in enumerate(zip(self.params, SIZES, strict=True)):
            grad = torch.randn(n, generator=g).to(p.dtype)
            p.grad = None if self.rests and i == 3 and step % 2 else self.place(grad)

    def train(self, optimizer: AdamW, steps: range) -> None:
        for step in steps:
            self.backward(step)
            optimizer.step()

    def outcome(self, optimizer: AdamW) -> dict[str, Tensor]:
        """Copies of parameters and states."""
        found = {f"param.{i}": p.detach().cpu().clone() for i, p in enumerate(self.params)}
        for i, state in optimizer.state_dict()["state"].items():
            found |= {f"{i}.{name}": t.clone() for name, t in state.items()}
        return found


@functools.cache
def unpaged(
    bits: int, steps: int, dtype: torch.dtype = torch.float32, *, rests: bool = True, **kwargs: Any
) -> dict[str, Tensor]:
    model = Model(None, dtype, rests=rests)
    optimizer = AdamW(model.params, state_bits=bits, **kwargs)
    model.train(optimizer, range(steps))
    return model.outcome(optimizer)


def behind(file: bool, host_extents: int) -> dict[str, Any]:
    return {"host_budget": host_extents * EXTENT} if file else {}


@contextmanager
def on_device(chosen: Adversary, frames: int, file: bool, host_extents: int) -> Iterator[SimulatedDevice]:
    """A device that ends in order."""
    budget = host_extents * EXTENT if file else None
    device = SimulatedDevice(chosen, budget=frames * EXTENT, host_budget=budget)
    with device:
        yield device
    assert not device.unordered


frames = st.integers(2, 9)
host_extents = st.integers(2, 20)


@given(
    chosen=adversaries(), bits=st.sampled_from((32, 8)), frames=frames, file=st.booleans(), host=host_extents,
    rests=st.booleans(),
)  # fmt: skip
def test_same_bits_in_every_order(
    chosen: Adversary, bits: int, frames: int, file: bool, host: int, rests: bool
) -> None:
    """With plans that serve again and without; and with pinned memory alone the host waits for nothing in a step."""
    with on_device(chosen, frames, file, host) as device:
        model = Model(device, rests=rests)
        optimizer = SimulatedAdamW(model.params, device, state_bits=bits, **behind(file, host))
        model.train(optimizer, range(4))
        assert optimizer._plan is not None
        assert optimizer._plan._repeated != rests
        assert file or device.host_waits == 0
        stats = optimizer.paging_stats()
        found = model.outcome(optimizer)
        optimizer.close()
    assert_equal(found, unpaged(bits, 4, rests=rests))
    assert stats.bytes_by_tier["cuda"] == stats.peak <= frames * EXTENT
    assert stats.misses > 0
    assert stats.extents >= STATES[bits]
    assert ("file" in stats.bytes_by_tier) == file


@given(chosen=adversaries(), frames=frames, file=st.booleans(), host=host_extents)
def test_bf16_with_stochastic_rounding(chosen: Adversary, frames: int, file: bool, host: int) -> None:
    options = {"stochastic_rounding": True, "seed": 3}
    with on_device(chosen, frames, file, host) as device:
        model = Model(device, torch.bfloat16)
        optimizer = SimulatedAdamW(model.params, device, state_bits=8, **behind(file, host), **options)
        model.train(optimizer, range(3))
        found = model.outcome(optimizer)
        optimizer.close()
    assert_equal(found, unpaged(8, 3, torch.bfloat16, **options))


@given(
    chosen=adversaries(), bits=st.sampled_from((32, 8)), frames=frames, file=st.booleans(), host=host_extents,
    way=st.sampled_from(("checkpoint", "state_dict", "unpaged")),
)  # fmt: skip
def test_resume_is_bit_identical(chosen: Adversary, bits: int, frames: int, file: bool, host: int, way: str) -> None:
    """Saved with work under way, loaded over states with work under way; to and from an optimizer without pages too."""
    with tempfile.TemporaryDirectory() as folder, on_device(chosen, frames, file, host) as device:
        first = Model(device if way != "unpaged" else None)
        if way == "unpaged":
            before: AdamW = AdamW(first.params, state_bits=bits)
        else:
            before = SimulatedAdamW(first.params, device, state_bits=bits, **behind(file, host))
        first.train(before, range(2))
        path = Path(folder) / "x"
        saved = before.state_dict() if way == "state_dict" else before.save_checkpoint(path, params=True)
        values = [p.detach().cpu() for p in first.params]
        before.close()
        second = SimulatedDevice(chosen, budget=frames * EXTENT, host_budget=host * EXTENT if file else None)
        with second:
            model = Model(second)
            after = SimulatedAdamW(model.params, second, state_bits=bits, **behind(file, host))
            model.train(after, range(7, 9))  # to be forgotten
            if saved is None:
                after.load_checkpoint(path)
            else:
                after.load_state_dict(saved)
                with torch.no_grad():
                    for p, value in zip(model.params, values, strict=True):
                        p.copy_(value)
            model.train(after, range(2, 4))
            found = model.outcome(after)
            after.close()
        assert not second.unordered
    assert_equal(found, unpaged(bits, 4))


@given(chosen=adversaries(), frames=frames, file=st.booleans(), host=host_extents, waits=st.booleans())
def test_gradients_of_another_stream(chosen: Adversary, frames: int, file: bool, host: int, waits: bool) -> None:
    """They are late; the current stream has been told to wait, as PyTorch asks for, and the step needs no more."""
    device = SimulatedDevice(chosen, budget=frames * EXTENT, host_budget=host * EXTENT if file else None)
    with device:
        model = Model(device)
        optimizer = SimulatedAdamW(model.params, device, **behind(file, host))
        side = device.new_stream("backward")
        for step in range(3):
            model.backward(step)
            device.wait(side, device.record(device.current_stream()))
            for p in model.params:
                if p.grad is not None:
                    late, p.grad = p.grad, device.adopt(torch.full(p.shape, float("nan")))
                    with device.on(side):
                        device.compute(functools.partial(p.grad.copy_, late), [p.grad, late])
            if waits:
                device.wait(device.current_stream(), device.record(side))
            optimizer.step()
        found = model.outcome(optimizer)
        optimizer.close()
    if waits:
        assert not device.unordered
        assert_equal(found, unpaged(32, 3))
    else:
        assert device.unordered  # what the caller owes is seen here, too


def plain(budget: int = 4 * EXTENT) -> SimulatedDevice:
    return SimulatedDevice(Adversary(), budget=budget)


def test_everything_resident_moves_nothing() -> None:
    with plain(64 * EXTENT) as device:
        model = Model(device)
        optimizer = SimulatedAdamW(model.params, device)
        model.train(optimizer, range(3))
        stats = optimizer.paging_stats()
        optimizer.close()
    assert (stats.read, stats.written, stats.bytes_by_tier["pinned"]) == (0, 0, 0)
    assert not device.unordered


def test_page_dir_alone_pins_as_much_as_the_device_holds(tmp_path: Path) -> None:
    with plain() as device:
        model = Model(device)
        optimizer = SimulatedAdamW(model.params, device, page_dir=tmp_path)
        model.train(optimizer, range(2))
        tiers = optimizer.paging_stats().bytes_by_tier
        found = model.outcome(optimizer)
        assert sorted(os.listdir(tmp_path)) == ["lora_ops.lock", "lora_ops.pages"]
        optimizer.close()
    assert tiers["pinned"] <= tiers["cuda"] == 4 * EXTENT
    assert os.listdir(tmp_path) == []
    assert_equal(found, unpaged(32, 2))


def test_memory_returns_with_the_optimizer() -> None:
    with plain() as device:
        model = Model(device)
        optimizer = SimulatedAdamW(model.params, device)
        model.train(optimizer, range(2))
        assert device.pinned
        del optimizer
        gc.collect()
        assert not device.pinned
        for frame in device.frames:
            device.check_unused(frame)
    assert not device.unordered


def test_a_closed_optimizer_says_so() -> None:
    with plain() as device:
        model = Model(device)
        optimizer = SimulatedAdamW(model.params, device)
        model.train(optimizer, range(1))
        tier = optimizer._store.pager.tier  # type: ignore[union-attr]
        frame = device.frames[0]
        optimizer.close()
        with pytest.raises(PagingError, match="the optimizer was closed"):
            model.train(optimizer, range(1))
        with pytest.raises(PagingError, match="pinned memory: the optimizer that owned these pages was closed"):
            tier.read(0, frame)


@pytest.mark.parametrize("damage", ["corrupted", "truncated"])
def test_damaged_page_file(damage: str, tmp_path: Path) -> None:
    """An error that names the file, in whatever order; the optimizer goes on after a load."""
    for seed in range(8):
        with plain() as device:
            device.adversary = Adversary(seed, eagerness=0.7)
            model = Model(device)
            optimizer = SimulatedAdamW(model.params, device, page_dir=tmp_path / "pages")
            model.train(optimizer, range(2))
            optimizer.save_checkpoint(tmp_path / "good", params=True)
            device.synchronize()
            file = tmp_path / "pages" / "lora_ops.pages"
            if damage == "corrupted":
                file.write_bytes(bytes(b ^ 4 for b in file.read_bytes()))
            else:
                os.truncate(file, EXTENT // 2)
            with pytest.raises(PagingError, match=rf"{file}: (extent \d+ .* checksum mismatch|truncated: extent \d+)"):
                model.train(optimizer, range(2, 4))
            with pytest.raises(PagingError, match=r"a step was cut short .* load a checkpoint before going on"):
                model.train(optimizer, range(2, 3))
            optimizer.load_checkpoint(tmp_path / "good")
            if damage == "corrupted":
                model.train(optimizer, range(2, 4))
                assert_equal(model.outcome(optimizer), unpaged(32, 4))
            optimizer.close()
        assert not device.unordered


def test_what_is_asked_for_must_fit() -> None:
    p = nn.Parameter(torch.ones(5000))
    with pytest.raises(ValueError, match="host_budget: expected together with page_budget"):
        AdamW([p], host_budget="1MiB")
    with pytest.raises(ValueError, match="host_budget: expected parameters on a CUDA device"):
        AdamW([p], page_budget="1MiB", host_budget="1MiB")
    with pytest.raises(ValueError, match="host_budget: expected at least 131072, two extents of 65536, got 100000"):
        AdamW([p], page_budget="128KiB", host_budget=100_000)
    there = nn.Parameter(torch.ones(5000, device="meta"))
    with pytest.raises(ValueError, match="on the CPU or on one CUDA device, got cpu, meta"):
        AdamW([p, there], page_budget="1MiB")
    optimizer = AdamW([p], page_budget="1MiB")
    optimizer.add_param_group({"params": [there]})
    p.grad = torch.ones_like(p)
    there.grad = torch.ones_like(there)
    with pytest.raises(ValueError, match="parameter 1: expected on cpu like its pages, got meta"):
        optimizer.step()
    optimizer.close()
