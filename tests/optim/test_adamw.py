"""AdamW without pages: the semantics of torch.optim.AdamW, 8-bit states, rounding, errors, state dicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_ops.optim import AdamW, AdamW8bit
from tests.optim.conftest import Run, assert_equal


def torch_adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def test_follows_torch(adamw: Callable, backend: str) -> None:
    """20 steps of a real run differ by rounding alone, which a training amplifies."""
    ours = Run(adamw()).train(20, join_at=7, freeze_at=13).tensors()
    torchs = Run(torch_adamw).train(20, join_at=7, freeze_at=13).tensors()
    assert ours.keys() == torchs.keys()
    for name, t in torchs.items():
        torch.testing.assert_close(ours[name], t, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
@pytest.mark.parametrize("maximize", [False, True])
def test_one_step_is_within_rounding_of_float64(betas: tuple[float, float], maximize: bool, backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    start, grads = torch.randn(5000, generator=g), [torch.randn(5000, generator=g) for _ in range(3)]
    results = []
    for make, dtype in ((AdamW, torch.float32), (torch.optim.AdamW, torch.float64)):
        p = nn.Parameter(start.to(dtype, copy=True))
        optimizer = make([p], lr=0.1, betas=betas, eps=1e-6, weight_decay=0.3, maximize=maximize)
        for grad in grads:
            p.grad = grad.to(dtype)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-6, atol=1e-6)


def test_8bit_states_are_close_to_32bit(adamw: Callable) -> None:
    losses = []
    for bits in (32, 8):
        run = Run(adamw(state_bits=bits)).train(100)
        tokens = torch.arange(100)
        losses.append(nn.functional.cross_entropy(run.model(tokens, False), (tokens * 7 + 1) % 100).item())
    assert losses[1] < losses[0] * 1.1 + 0.02


def test_8bit_keeps_small_tensors_in_32_bits() -> None:
    small, large = nn.Parameter(torch.randn(4095)), nn.Parameter(torch.randn(4096))
    optimizer = AdamW8bit([small, large])
    (small.sum() + large.sum()).backward()
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert state[0]["exp_avg"].dtype == torch.float32
    assert state[1]["exp_avg"].dtype == state[1]["exp_avg_sq"].dtype == torch.uint8
    assert state[1]["exp_avg_absmax"].shape == (16,)


def test_groups_choose_their_bits() -> None:
    a, b = nn.Parameter(torch.randn(5000)), nn.Parameter(torch.randn(5000))
    optimizer = AdamW([{"params": [a], "state_bits": 8}, {"params": [b]}])
    (a.sum() + b.sum()).backward()
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert (state[0]["exp_avg"].dtype, state[1]["exp_avg"].dtype) == (torch.uint8, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16bit_parameters_round_once(dtype: torch.dtype, backend: str) -> None:
    """One step equals the step in float32, rounded."""
    g = torch.Generator().manual_seed(0)
    start, grad = torch.randn(3000, generator=g).to(dtype), torch.randn(3000, generator=g).to(dtype)
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    low.grad, high.grad = grad, grad.float()
    for p in (low, high):
        AdamW([p], lr=0.1).step()
    assert torch.equal(low.detach(), high.detach().to(dtype))


def test_stochastic_rounding_has_the_right_mean(backend: str) -> None:
    """100,000 draws of four values: results are the two neighbours, their mean is the value, seeds repeat."""
    start, n = torch.tensor([1.0, -3.0, 100.5, 1e-3]).to(torch.bfloat16), 100_000

    def step(values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        p = nn.Parameter(values)
        p.grad = torch.ones_like(p)
        AdamW([p], lr=1e-3, weight_decay=0.01, **kwargs).step()
        return p.detach().float()

    target = step(start.float())
    drawn = step(start.repeat_interleave(n), stochastic_rounding=True, seed=1).view(4, n)
    gap = drawn.amax(1) - drawn.amin(1)
    assert all(len(row.unique()) <= 2 for row in drawn)
    assert bool((gap <= target.abs() / 64).all())
    assert bool(((drawn.double().mean(1) - target).abs() <= 3 * gap / n**0.5 + gap / 2**16).all())
    again, other = (step(start.repeat_interleave(n), stochastic_rounding=True, seed=s).view(4, n) for s in (1, 2))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)


def test_strided_parameters_and_gradients() -> None:
    """Of which reshape(-1) is a strided view."""
    start, g = torch.randn(30, 40), torch.randn(30, 40)
    p, q = nn.Parameter(start.clone()[:, ::2]), nn.Parameter(start[:, ::2].contiguous())
    wide, narrow = AdamW([p]), torch.optim.AdamW([q])
    for _ in range(4):
        p.grad, q.grad = g[:, ::2], g[:, ::2].contiguous()
        wide.step()
        narrow.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_non_contiguous_and_empty_parameters(adamw: Callable) -> None:
    start = torch.randn(70, 90)
    results = []
    for value, grad in ((start, start.sin()), (start.t(), start.sin().t())):
        p = nn.Parameter(value)
        p.grad = grad
        empty = nn.Parameter(torch.empty(0, 3))
        empty.grad = torch.empty(0, 3)
        AdamW([p, empty], lr=0.1).step()
        results.append(p.detach())
    assert torch.equal(results[0], results[1].t())


def test_backward_sees_the_parameter_change() -> None:
    p = nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure_returns_its_loss() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert bool((p < 1).all())


@pytest.mark.parametrize("bits", [32, 8])
def test_state_dict_round_trip(adamw: Callable, bits: int) -> None:
    whole = Run(adamw(state_bits=bits)).train(20)
    first = Run(adamw(state_bits=bits)).train(10)
    second = Run(adamw(state_bits=bits))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.schedule.load_state_dict(first.schedule.state_dict())
    second.steps = 10
    assert_equal(second.train(20).tensors(), whole.tensors())


def test_torch_imports_and_exports(adamw: Callable) -> None:
    """torch → ours → torch: the same tensors."""
    torchs = Run(torch_adamw).train(10)
    ours, back = Run(adamw()), Run(torch_adamw)
    ours.optimizer.load_state_dict(torchs.optimizer.state_dict())
    back.optimizer.load_state_dict(ours.optimizer.state_dict())
    expected, got = (run.optimizer.state_dict() for run in (torchs, back))
    for i, state in expected["state"].items():
        assert_equal(got["state"][i], state)
    assert [g["lr"] for g in got["param_groups"]] == [g["lr"] for g in expected["param_groups"]]


def test_loading_keeps_what_is_the_optimizers_own() -> None:
    """Parameters, their names and the bits; hyperparameters are the state's."""
    made = [nn.Parameter(torch.randn(5000)) for _ in range(2)]
    for p in made:
        p.grad = torch.ones_like(p)
    saved, ours = AdamW([("theirs", made[0])], lr=0.5), AdamW8bit([("mine", made[1])], lr=0.1)
    saved.step()
    ours.load_state_dict(saved.state_dict())
    (group,) = ours.param_groups
    assert (group["lr"], group["state_bits"], group["param_names"]) == (0.5, 8, ["mine"])
    assert group["params"][0] is made[1]


def test_hooks_of_saving() -> None:
    """They see the whole state, and may give another."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = AdamW([p])
    optimizer.step()
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(sorted(state["state"][0])))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    assert optimizer.state_dict()["more"] == 1
    assert seen == ["before", ["exp_avg", "exp_avg_sq", "step"]]


def test_a_compiled_step() -> None:
    p, q = (nn.Parameter(torch.ones(5)) for _ in range(2))
    one, two = AdamW([p]), AdamW([q])
    step = torch.compile(one.step, backend="eager")
    for i in range(4):
        p.grad, q.grad = (torch.full((5,), i - 1.5) for _ in range(2))
        step()
        two.step()
    assert torch.equal(p, q)


def test_hooks_of_loading() -> None:
    """As in torch: the one before may give another state, the one after is called once it is loaded."""
    p = nn.Parameter(torch.ones(3))
    optimizer, seen = AdamW([p], lr=0.1), []
    state = optimizer.state_dict()
    other = {**state, "param_groups": [{**state["param_groups"][0], "lr": 0.7}]}
    optimizer.register_load_state_dict_pre_hook(lambda _, loaded: other)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(state)
    assert seen == [0.7]


def test_a_learning_rate_in_a_tensor(tmp_path: Path) -> None:
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    a.grad = b.grad = torch.ones(3)
    one, other = AdamW([a], lr=torch.tensor(0.5)), AdamW([b], lr=0.5)
    for optimizer in (one, other):
        optimizer.step()
    assert torch.equal(a, b)
    one.save_checkpoint(tmp_path / "x")
    one.load_checkpoint(tmp_path / "x")
    assert one.param_groups[0]["lr"] == 0.5


def test_loading_converts_bits(adamw: Callable) -> None:
    wide, narrow, wide_again = Run(adamw()).train(10), Run(adamw(state_bits=8)), Run(adamw())
    narrow.optimizer.load_state_dict(wide.optimizer.state_dict())
    assert narrow.optimizer.state_dict()["state"][0]["exp_avg"].dtype == torch.uint8
    wide_again.optimizer.load_state_dict(narrow.optimizer.state_dict())
    a, b = (run.optimizer.state_dict()["state"][0] for run in (wide, wide_again))
    torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=0.1, atol=float(a["exp_avg"].abs().max()) / 50)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, "lr: expected at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": -1.0}, "eps: expected at least 0"),
        ({"weight_decay": -1.0}, "weight_decay: expected at least 0"),
        ({"state_bits": 16}, "state_bits: expected 32 or 8, got 16"),
        ({"page_dir": "x"}, "page_dir: expected together with page_budget"),
        ({"page_budget": "much"}, "page_budget: expected bytes or a string such as '2GiB'"),
        ({"page_budget": 0}, "page_budget: expected a positive number"),
        ({"page_budget": 100_000}, "page_budget: expected at least 131072 bytes, two extents of 65536, got 100000"),
        ({"page_budget": "1MiB", "extent_bytes": 5000}, "extent_bytes: expected a multiple of 4096, got 5000"),
        ({"page_budget": "1MiB", "extent_bytes": "64KiB"}, "extent_bytes: expected a multiple of 4096, got '64KiB'"),
        ({"page_budget": float("nan")}, "page_budget: expected bytes or a string such as '2GiB' or '500MB', got nan"),
        ({"page_budget": "1MiB", "page_dir": 3}, "page_dir: expected the path of a folder, got 3"),
        ({"lr": "1e-5"}, "lr: expected a number, got '1e-5'"),
        ({"eps": None}, "eps: expected a number, got None"),
        ({"betas": 0.9}, r"betas: expected two numbers in \[0, 1\), got 0.9"),
        ({"stochastic_rounding": True, "seed": None}, "seed: expected an integer of 64 bits, got None"),
        ({"seed": 2**63}, "seed: expected an integer of 64 bits, got 9223372036854775808"),
    ],
)
def test_errors_name_the_argument(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.ones(3))], **kwargs)


def test_errors_of_parameters_and_gradients() -> None:
    with pytest.raises(ValueError, match="params: expected dtype float32, bfloat16, float16, got float64"):
        AdamW([nn.Parameter(torch.ones(3).double())])
    with pytest.raises(ValueError, match=r"params: expected dense tensors, got layout torch\.sparse_coo"):
        AdamW([nn.Parameter(torch.eye(3).to_sparse())])
    p = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="got one twice in a group"):
        AdamW([p, p])
    with pytest.raises(ValueError, match=r"amsgrad: expected False, .* got True"):
        AdamW([{"params": [p], "amsgrad": True}])
    table = nn.Embedding(10, 3, sparse=True)
    optimizer = AdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"parameter 0: expected a dense gradient of .*, got a sparse one"):
        optimizer.step()


def test_errors_of_state_dicts(adamw: Callable) -> None:
    run = Run(adamw()).train(2)
    state = run.optimizer.state_dict()
    other = AdamW([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"expected groups of \[1\] parameters, got \[5, 4\]"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"parameter 0: exp_avg: expected shape \(3,\), got \(100, 65\)"):
        other.load_state_dict({"state": {0: state["state"][0]}, "param_groups": other.state_dict()["param_groups"]})
    for cls, decay in ((torch.optim.Adam, 0.1), (torch.optim.AdamW, 0.1), (torch.optim.Adam, 0.0)):
        foreign = cls([nn.Parameter(torch.ones(3))], weight_decay=decay).state_dict()
        if cls is torch.optim.Adam and decay:
            with pytest.raises(ValueError, match="expected AdamW's weight decay, got Adam's"):
                other.load_state_dict(foreign)
        else:
            other.load_state_dict(foreign)
    with pytest.raises(ValueError, match="parameter 0 has no exp_avg, exp_avg_sq; is it AdamW's"):
        other.load_state_dict({"state": {0: {"step": 1}}, "param_groups": other.state_dict()["param_groups"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg": torch.zeros(4, 3)}, r"exp_avg: expected shape \(3, 4\), got \(4, 3\)"),
        ({"exp_avg_sq": torch.zeros(3, 4, dtype=torch.int32)}, "exp_avg_sq: expected floating values, got torch.int32"),
        ({"exp_avg": torch.zeros(3, 4, device="meta")}, "exp_avg: expected a tensor with values, got 'one on meta'"),
        ({"exp_avg": None}, "exp_avg: expected a tensor with values, got None"),
        ({"step": torch.tensor(-1.0)}, r"step: expected a number of at least 0, got tensor\(-1.\)"),
        ({"step": torch.tensor(float("nan"))}, r"step: expected a number of at least 0, got tensor\(nan\)"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    optimizer = AdamW([p])
    optimizer.step()
    state = optimizer.state_dict()
    before = {name: t.clone() for name, t in state["state"][0].items()}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({**state, "state": {0: {**state["state"][0], **change}}})
    with pytest.raises(ValueError, match=r"lr: expected at least 0, got -1\.0"):
        optimizer.load_state_dict({**state, "param_groups": [{**state["param_groups"][0], "lr": -1.0}]})
    with pytest.raises(ValueError, match="state_dict: expected 'state' and 'param_groups', got no state"):
        optimizer.load_state_dict({"param_groups": state["param_groups"]})
    assert all(torch.equal(t, before[name]) for name, t in optimizer.state_dict()["state"][0].items())
    optimizer.step()


def test_states_that_would_be_lost_or_swapped_are_refused() -> None:
    """States of parameters that no group has, and those of named parameters in another order."""
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    a.grad, b.grad = torch.ones(3), -torch.ones(3)
    optimizer = AdamW([("a", a), ("b", b)])
    optimizer.step()
    state = optimizer.state_dict()
    with pytest.raises(
        ValueError, match=r"group 0: expected the parameters \['b', 'a'\], got \['a', 'b'\]: states go by"
    ):
        AdamW([("b", b), ("a", a)]).load_state_dict(state)
    AdamW([("x", b), ("y", a)]).load_state_dict(state)  # others' names: a state of another model's
    state["state"][7] = state["state"][0]
    with pytest.raises(ValueError, match=r"expected states of parameters in param_groups, got some of \[7\] as well"):
        optimizer.load_state_dict(state)
