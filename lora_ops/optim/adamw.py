"""AdamW with 32- or 8-bit states, whole or paged under a hard byte budget."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lora_ops.kernels.adamw import Again, Table, constants
from lora_ops.optim import checkpoint, statedict
from lora_ops.optim.errors import PagingError
from lora_ops.optim.groups import with_32bit_groups
from lora_ops.optim.layout import effective_bits
from lora_ops.optim.memory import check_extents, choose_extent_bytes, parse_bytes
from lora_ops.optim.pages import Pager
from lora_ops.optim.states import Job, PagedStates, ResidentStates, Spec
from lora_ops.optim.stats import PagingStats, paging_stats
from lora_ops.optim.tiers import CudaDevice, Device, FileTier, PinnedTier, Tier
from lora_ops.runtime.sharding import is_sharded, local, shard_number, sharded_as

logger = logging.getLogger("lora_ops")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AdamW(torch.optim.Optimizer):
    """AdamW: the semantics of torch.optim.AdamW, with states in 32 or 8 bits, and optionally in pages.

    m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;
    p ← p (1 − lr · λ) − lr · m̂ / (√v̂ + ε),  m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ).

    Results do not depend on the budget: the same kernel runs on the same elements, paged or not, bit for bit.
    `state[p]` holds the step alone; `state_dict()` has exp_avg and exp_avg_sq, in torch's layout.

    Args:
        params: parameters or groups, as torch takes them; a group may have its own lr, betas, eps, weight_decay,
            maximize and state_bits. Dtypes float32, bfloat16 and float16; states are always float32 or 8-bit codes.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        params_32bit: parameters whose states keep 32 bits, whatever `state_bits` says; those of a group that has others
            as well become a group of their own, after the given ones.
        state_bits: 32, or 8: codes of `quantize_blockwise8` in blocks of 256, exactly nearest, the signed map for m
            and the unsigned one for v; tensors under 4096 elements keep 32 bits.
        page_budget: bytes, or a string such as "2GiB", that the states may take in the fast tier: RAM for parameters
            on the CPU, device memory for those on a CUDA device (one device for all parameters). The others are in a
            file, or in pinned host memory. None: no paging.
        page_dir: folder for the page file, on a disk of its own right, held by one optimizer; None: a temporary file
            without a name, of which nothing stays even if the process is killed.
        host_budget: on CUDA, bytes of pinned host memory; what exceeds them is in a page file. None: as many as
            page_budget if page_dir is given; else all states are in pinned memory, and there is no page file.
        extent_bytes: size of a page; None: an eighth of the budget, from 64 KiB to 512 KiB, on CUDA to 16 MiB.
        stochastic_rounding: round bfloat16 parameters stochastically instead of to nearest even.
        seed: of stochastic rounding. The bits depend on seed, parameter, step and element, and on nothing else.

    Raises:
        ValueError: if an argument is out of range.
        PagingError: if page_dir cannot be used.

    Source: Decoupled Weight Decay Regularization (Loshchilov and Hutter 2019), algorithm 2; 8-bit Optimizers via
    Block-wise Quantization (Dettmers et al. 2022).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        params_32bit: Iterable[Tensor] = (),
        page_budget: int | str | None = None,
        page_dir: str | os.PathLike[str] | None = None,
        host_budget: int | str | None = None,
        extent_bytes: int | None = None,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        budget = None if page_budget is None else parse_bytes("page_budget", page_budget)
        for name, given in (("page_dir", page_dir), ("host_budget", host_budget)):
            if budget is None and given is not None:
                raise ValueError(f"{name}: expected together with page_budget, got {name} alone")
        pinned = None if host_budget is None else parse_bytes("host_budget", host_budget)
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected an integer of 64 bits, got {seed!r}")
        self._seed = seed if stochastic_rounding else None
        self._failed: str | None = None
        self._owners: dict[int, Tensor] = {}  # by number: the parameter whose states the store holds under it
        self._pattern: list[int] = []  # the parameters that had a gradient in the last step
        self._routine: _Routine | None = None
        self.page_budget = budget
        self._page_device: torch.device | None = None
        _import_dynamo()
        betas = tuple(betas) if isinstance(betas, list) else betas
        hyperparameters = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        params = with_32bit_groups(params, params_32bit)
        super().__init__(params, {**hyperparameters, "maximize": maximize, "state_bits": state_bits})
        self._store: ResidentStates | PagedStates = ResidentStates()
        if budget is not None:
            self._page_device = self._only_device()
            extent = choose_extent_bytes(budget, self._page_device.type) if extent_bytes is None else extent_bytes
            check_extents(budget, extent)
            if pinned is not None and pinned < 2 * extent:
                raise ValueError(f"host_budget: expected at least {2 * extent}, two extents of {extent}, got {pinned}")
            pager = Pager(self._tier(self._page_device, page_dir, pinned, extent), budget // extent)
            self._store = PagedStates(pager, extent)
        # Not __del__: this also runs at the interpreter's exit, and never on a half-made optimizer.
        self._finalizer = weakref.finalize(self, self._store.close)

    def _only_device(self) -> torch.device:
        devices = {p.device for p in self._params()}
        if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"page_budget: expected all parameters on the CPU or on one CUDA device, got {names}")
        return devices.pop()

    def _tier(
        self, device: torch.device, page_dir: str | os.PathLike[str] | None, host_budget: int | None, extent_bytes: int
    ) -> Tier:
        if device.type == "cpu":
            if host_budget is not None:
                raise ValueError(
                    "host_budget: expected parameters on a CUDA device; on the CPU page_budget is all of it"
                )
            return FileTier(page_dir, extent_bytes)
        return self._cuda_tier(CudaDevice(device), page_dir, host_budget, extent_bytes)

    def _cuda_tier(
        self, device: Device, page_dir: str | os.PathLike[str] | None, host_budget: int | None, extent_bytes: int
    ) -> PinnedTier:
        if host_budget is None and page_dir is not None:
            host_budget = self.page_budget
        if host_budget is None:
            return PinnedTier(device, extent_bytes)
        file = FileTier(page_dir, extent_bytes)
        return PinnedTier(device, extent_bytes, file=file, host_extents=host_budget // extent_bytes)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, after checking its hyperparameters and dtypes."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        On CUDA the work is enqueued on the current stream, as that of any op: gradients that another stream computes
        must be waited for by it (`backward` sees to that), and so must steps that are made on different streams. Pages
        move on two streams of their own, which are ordered with it here.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            PagingError: if the states could not be moved; the step is then incomplete, and the optimizer refuses
                further steps until a state is loaded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_usable()
        if self._routine and Table.serves() and self._step_again(self._routine):
            return loss
        self._routine = None
        self._follow()
        params, jobs, rows = self._plan()
        if not jobs:
            return loss
        with self._failing("a step"):
            self._store.step(jobs, rows, self._seed)
            for p, job in zip(params, jobs, strict=True):
                own = local(p)
                if job.param.data_ptr() != own.data_ptr():  # a contiguous copy
                    own.copy_(job.param.view(own.shape))
                self.state[p]["step"] = job.step
            increment_version(params)
        self._note_routine(params, jobs)
        return loss

    def _note_routine(self, params: list[Tensor], jobs: list[Job]) -> None:
        """After two steps with gradients for the same parameters, lay out the next one."""
        pattern, self._pattern = self._pattern, [job.index for job in jobs]
        if pattern != self._pattern or any(map(is_sharded, self._params())):  # addresses are a plain tensor's
            return
        for p, job in zip(params, jobs, strict=True):
            in_place = p.grad is not None and job.grad.data_ptr() == p.grad.data_ptr()
            if p.device.type != "cpu" or not in_place or job.param.data_ptr() != p.data_ptr():
                return
        with_grad = set(self._pattern)
        members: list[_Member] = []
        for i, p in enumerate(self._params()):
            dtype = None if p.grad is None else p.grad.dtype
            members.append((p, p.data_ptr(), p.numel(), dtype, self.state[p] if i in with_grad else None))
        self._routine = _Routine(self._store.lay_out(jobs), members)

    def _step_again(self, routine: _Routine) -> bool:
        """Do a step for which only values, addresses of gradients and hyperparameters have changed; else do nothing."""
        members = iter(routine.members)
        params, states, grads, index, steps, rows = [], [], [], [], [], []
        for group in self.param_groups:
            first = 0
            for p in group["params"]:
                known, address, numel, dtype, state = next(members, _NOBODY)
                grad = p.grad
                if p is not known or (grad is None) != (state is None) or self.state.get(p) is not state:
                    return False
                if grad is None or state is None:
                    continue
                if p.data_ptr() != address or grad.dtype is not dtype or grad.layout is not torch.strided:
                    return False
                if not p.is_contiguous():
                    return False
                step = state["step"] + 1
                if not grad.is_contiguous() or grad.numel() != numel or step != (first or step):
                    return False
                if not first:
                    first = step
                    rows.append(_constants(step, group))
                params.append(p)
                states.append(state)
                grads.append(grad.data_ptr())
                index.append(len(rows) - 1)
                steps.append(step)
        if next(members, None) is not None:
            return False
        with self._failing("a step"):
            routine.run(Again(grads, index, steps, rows, self._seed))
            for state, step in zip(states, steps, strict=True):
                state["step"] = step
            increment_version(params)
        return True

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Whatever ends the block before its end, even Ctrl-C, leaves states that are neither old nor new."""
        try:
            yield
        except BaseException as error:
            self._failed = f"{what} was cut short ({type(error).__name__}: {error})"
            raise

    def _follow(self) -> None:
        """Keep states with their parameters when `param_groups` or `state` were changed by hand.

        Parameters that were moved take their states along, those that were taken out lose them, and one whose entry in
        `state` was deleted begins anew.
        """
        now = {p: i for i, p in enumerate(self._params())}
        moved = {number: now.get(p) if "step" in self.state.get(p, {}) else None for number, p in self._owners.items()}
        if all(number == new for number, new in moved.items()):
            return
        with self._failing("moving states"):
            self._store.rename(moved)
            self._owners = {new: self._owners[number] for number, new in moved.items() if new is not None}

    def _plan(self) -> tuple[list[Tensor], list[Job], list[tuple[float, ...]]]:
        """The parameters with a gradient, a job for each, and the constants of each (group, step) once."""
        params: list[Tensor] = []
        jobs: list[Job] = []
        rows: list[tuple[float, ...]] = []
        specs: list[Spec] = []
        index = -1
        for group in self.param_groups:
            row_of: dict[int, int] = {}
            for p in group["params"]:
                index += 1
                if p.grad is None:
                    continue
                grad = _local_grad(index, p)
                if index not in self._owners:
                    specs.append(self._spec(index, p, group["state_bits"]))
                step = self.state[p].get("step", 0) + 1
                if step not in row_of:
                    row_of[step] = len(rows)
                    rows.append(_constants(step, group))
                params.append(p)
                stream = index + (shard_number(p) << 20 if is_sharded(p) else 0)
                jobs.append(Job(index, _flat(local(p)), _flat(grad), row_of[step], step, stream))
        if specs:
            self._store.add(specs)
            members = self._params()
            self._owners.update((spec.index, members[spec.index]) for spec in specs)
            if isinstance(self._store, PagedStates):
                logger.info("%s", paging_stats(self._store))
        return params, jobs, rows

    def state_dict(self) -> dict[str, Any]:
        """The state as torch.optim.AdamW gives it; with 32-bit states that optimizer loads it.

        With 8-bit states exp_avg and exp_avg_sq are uint8 codes, and there are exp_avg_absmax and exp_avg_sq_absmax;
        `AdamW(state_bits=32)` loads these and gives a state for torch.optim.AdamW, which would take codes for values.
        With pages the tensors are copies on the CPU that live in files (deleted already; the space returns with the
        tensors): in the folder of the pages, or where there is none, in the one for temporary files.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._check_usable()
        self._follow()
        sink = statedict.FileBackedSink(self._folder()) if self.page_budget is not None else statedict.TensorSink()
        self._store.drain(sink)
        state = {
            index: statedict.entry(self.state[p]["step"], sink.tensors(index), p)
            for index, p in sorted(self._owners.items())
        }
        packed = {"state": state, "param_groups": statedict.packed_groups(self.param_groups)}
        for after in self._optimizer_state_dict_post_hooks.values():
            packed = after(self, packed) or packed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, whatever its bits and paging, or of torch.optim.AdamW.

        The number of bits, the budget and the folder stay those of this optimizer; values are converted.

        Raises:
            ValueError: if groups or shapes do not fit; nothing is changed then.
        """
        state_dict = state_dict.copy()  # a hook may change it
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        statedict.check_keys(state_dict)
        groups = statedict.matched_groups(self.param_groups, state_dict["param_groups"])
        source = statedict.TensorSource(state_dict, self._params())
        self._load(groups, source.steps, source)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def save_checkpoint(self, path: str | os.PathLike[str], *, params: bool = False) -> None:
        """Write the state to a safetensors file, extent by extent, within the budget.

        The file is complete or not there: it is written beside `path`, synced and renamed, so that whatever kills the
        process, `path` holds the last complete checkpoint.

        Args:
            path: the file.
            params: save the parameters in it as well.

        Raises:
            PagingError: if it cannot be written; an earlier file at `path` is untouched.
        """
        self._check_usable()
        self._check_whole("save_checkpoint")
        self._follow()
        steps = {i: self.state[p]["step"] for i, p in sorted(self._owners.items())}
        extra = {f"param.{i}": p.detach() for i, p in enumerate(self._params())} if params else {}
        checkpoint.save(Path(path), self._store, self.param_groups, steps, extra)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Load what `save_checkpoint` wrote, within the budget; parameters too, if they were saved.

        Raises:
            PagingError: if the file is missing, truncated or corrupted; nothing is changed then.
            ValueError: if groups or shapes do not fit; nothing is changed then.
        """
        self._check_whole("load_checkpoint")
        with checkpoint.CheckpointFile(Path(path)) as file:
            groups = statedict.matched_groups(self.param_groups, file.param_groups)
            file.check(self._params())
            self._load(groups, file.steps, file)
            with torch.no_grad():
                for i, p in enumerate(self._params()):
                    if (saved := file.param(i, p)) is not None:
                        p.copy_(saved)

    def paging_stats(self) -> PagingStats:
        """How the pages fared so far. Raises ValueError if the optimizer has none."""
        if not isinstance(self._store, PagedStates):
            raise ValueError("paging_stats: the optimizer has no page_budget")
        return paging_stats(self._store)

    def close(self) -> None:
        """Give back memory and files now; otherwise that happens when the optimizer is deleted."""
        self._failed = self._failed or "it was closed"
        self._routine = None
        self._finalizer()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("AdamW cannot be pickled or copied: use state_dict or save_checkpoint")

    def _load(self, groups: list[dict[str, Any]], steps: dict[int, int], source: Any) -> None:
        self._check_open()
        params = self._params()
        bits = [group["state_bits"] for group in groups for _ in group["params"]]
        specs = [self._spec(i, params[i], bits[i]) for i in steps]
        for group in groups:
            _check_group(group)
        self._routine = None
        with self._failing("loading a state"):
            self._store.reset()
            self.state.clear()
            self._owners = {}
            self._store.add(specs)
            self._store.fill(source)
            for i, step in steps.items():
                self.state[params[i]] = {"step": step}
            self._owners = {i: params[i] for i in steps}
            self.param_groups = groups
            self._failed = None

    def _spec(self, index: int, p: Tensor, bits: int) -> Spec:
        if self._page_device is not None and p.device != self._page_device:
            raise ValueError(f"parameter {index}: expected on {self._page_device} like its pages, got {p.device}")
        # The bits go by the whole parameter, or ranks with a small part would save states of another kind.
        return Spec(index, local(p).numel(), effective_bits(p.numel(), bits), p.device)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _folder(self) -> Path | None:
        """The folder that the pages are in, or None."""
        return self._store.pager.tier.directory if isinstance(self._store, PagedStates) else None

    def _check_whole(self, what: str) -> None:
        if any(map(is_sharded, self._params())):
            raise ValueError(
                f"{what}: expected plain parameters, got sharded ones (DTensor), of which each rank has a part: use "
                "torch.distributed.checkpoint with get_optimizer_state_dict and set_optimizer_state_dict"
            )

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise PagingError("AdamW: the optimizer was closed")

    def _check_usable(self) -> None:
        self._check_open()
        if self._failed:
            raise PagingError(f"AdamW: {self._failed}; load a checkpoint before going on")


# Parameter, address, elements, and if it has a gradient that one's dtype and the state.
_Member: TypeAlias = tuple[Tensor, int, int, torch.dtype | None, dict[str, Any] | None]


@dataclass(frozen=True)
class _Routine:
    """A step laid out."""

    run: Callable[[Again], None]
    members: list[_Member]


_NOBODY: tuple[Any, int, int, None, None] = (None, 0, 0, None, None)


def _import_dynamo() -> None:
    """Before torch does so in the first optimizer's first call: what an import leaves behind keeps frames alive.

    Some exception that is caught on the way has a traceback in a reference cycle, and so all frames up to the caller of
    `AdamW()`, with the optimizer and its pages in them, until the next garbage collection. A thread has its own frames.
    """
    if "torch._dynamo" not in sys.modules:
        thread = threading.Thread(target=importlib.import_module, args=("torch._dynamo",))
        thread.start()
        thread.join()


def _constants(step: int, group: dict[str, Any]) -> tuple[float, ...]:
    return constants(
        step, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
        weight_decay=group["weight_decay"], maximize=group["maximize"],
    )  # fmt: skip


def _flat(t: Tensor) -> Tensor:
    """The elements in a row: a view, or a copy if they are strided (of which reshape may still make a view)."""
    return t.detach().reshape(-1).contiguous()


def _local_grad(index: int, p: Tensor) -> Tensor:
    """The checked gradient; of a sharded parameter this rank's part of it."""
    grad = p.grad
    if grad is None or grad.is_sparse or grad.dtype not in _DTYPES:
        kind = "none" if grad is None else "a sparse one" if grad.is_sparse else str(grad.dtype)
        raise ValueError(f"parameter {index}: expected a dense gradient of {_names(_DTYPES)}, got {kind}")
    if is_sharded(grad) != is_sharded(p):
        expected, got = ("a DTensor", "a plain tensor") if is_sharded(p) else ("a plain tensor", "a DTensor")
        raise ValueError(f"parameter {index}: expected {expected} as gradient, as the parameter is one, got {got}")
    return local(sharded_as(grad, p)) if is_sharded(p) else grad


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not _number(name, group[name]) >= 0:
            raise ValueError(f"{name}: expected at least 0, got {_number(name, group[name])}")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0 <= _number("betas", b) < 1 for b in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    for name in ("amsgrad", "differentiable"):
        if group.get(name):
            raise ValueError(f"{name}: expected False, which is all that this optimizer does, got {group[name]!r}")
    if group["state_bits"] not in (8, 32):
        raise ValueError(f"state_bits: expected 32 or 8, got {group['state_bits']}")
    if len(set(group["params"])) < len(group["params"]):
        raise ValueError("params: expected each parameter once, got one twice in a group")
    for p in group["params"]:
        if p.dtype not in _DTYPES:
            raise ValueError(f"params: expected dtype {_names(_DTYPES)}, got {_names([p.dtype])}")
        if p.layout is not torch.strided:
            raise ValueError(f"params: expected dense tensors, got layout {p.layout}")
        if is_sharded(p) and any(placement.is_partial() for placement in p.placements):
            raise ValueError(f"params: expected DTensors that are sharded or replicated, got {p.placements}")


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str):  # "1e-5" is one to PyYAML
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None
