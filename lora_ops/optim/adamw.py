"""AdamW with 32- or 8-bit states, whole or paged under a hard byte budget."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ops.optim import checkpoint, statedict
from lora_ops.optim.groups import check_group, with_32bit_groups
from lora_ops.optim.layout import effective_bits
from lora_ops.optim.paged import PagedStates
from lora_ops.optim.plan import Plan
from lora_ops.optim.resident import ResidentStates
from lora_ops.optim.states import StateShape, StateStore
from lora_ops.paging.budget import parse_bytes
from lora_ops.paging.errors import PagingError
from lora_ops.paging.open import open_pager
from lora_ops.paging.stats import PagingStats
from lora_ops.paging.tiers import CudaDevice, Device
from lora_ops.runtime.sharding import is_sharded, local

logger = logging.getLogger("lora_ops")


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
        self._plan: Plan | None = None  # of the last step
        self.page_budget = budget
        self._page_device: torch.device | None = None
        _import_dynamo()
        betas = tuple(betas) if isinstance(betas, list) else betas
        hyperparameters = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        params = with_32bit_groups(params, params_32bit)
        super().__init__(params, {**hyperparameters, "maximize": maximize, "state_bits": state_bits})
        self._store: StateStore = ResidentStates()
        if budget is not None:
            self._page_device = self._only_device()
            device = self._device_of_frames(self._page_device)
            pager = open_pager(device, budget, page_dir=page_dir, host_budget=pinned, extent_bytes=extent_bytes)
            self._store = PagedStates(pager)
        # Not __del__: this also runs at the interpreter's exit, and never on a half-made optimizer.
        self._finalizer = weakref.finalize(self, self._store.close)

    def _only_device(self) -> torch.device:
        devices = {p.device for p in self._params()}
        if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"page_budget: expected all parameters on the CPU or on one CUDA device, got {names}")
        return devices.pop()

    def _device_of_frames(self, device: torch.device) -> Device | None:
        """What pages ask of a device; None: they are in RAM."""
        return None if device.type == "cpu" else CudaDevice(device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, after checking its hyperparameters and dtypes."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
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
        plan = self._plan_step()
        if plan.indices:
            with self._failing("a step"):
                self._store.step(plan)
                plan.finish()
            self._plan = plan
        return loss

    def _plan_step(self) -> Plan:
        """The plan of the last step if it still holds, else a new one, with states for parameters that have none."""
        if self._plan is not None and self._plan.renew(self.param_groups, self.state):
            return self._plan
        self._plan = None
        self._follow()
        plan = Plan(self.param_groups, self.state, self._seed)
        if new := [index for index in plan.indices if index not in self._owners]:
            self._add_states(new)
        plan.lay_out(self._store.slices(plan.indices))
        return plan

    def _add_states(self, indices: Sequence[int]) -> None:
        params = self._params()
        bits = [group["state_bits"] for group in self.param_groups for _ in group["params"]]
        self._store.add([self._shape(i, params[i], bits[i]) for i in indices])
        self._owners.update((i, params[i]) for i in indices)
        if self._store.pager is not None:
            logger.info("%s", self._store.pager.report())

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Whatever ends the block before its end, even Ctrl-C, leaves states that are neither old nor new."""
        try:
            yield
        except BaseException as error:
            self._plan = None  # which holds gradients
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
            self._plan = None
            self._store.rename(moved)
            self._owners = {new: self._owners[number] for number, new in moved.items() if new is not None}

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
        if self._store.pager is None:
            raise ValueError("paging_stats: the optimizer has no page_budget")
        return self._store.pager.report()

    def close(self) -> None:
        """Give back memory and files now; otherwise that happens when the optimizer is deleted."""
        self._failed = self._failed or "it was closed"
        self._plan = None
        self._finalizer()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("AdamW cannot be pickled or copied: use state_dict or save_checkpoint")

    def _load(self, groups: list[dict[str, Any]], steps: dict[int, int], source: Any) -> None:
        self._check_open()
        params = self._params()
        bits = [group["state_bits"] for group in groups for _ in group["params"]]
        shapes = [self._shape(i, params[i], bits[i]) for i in steps]
        for group in groups:
            check_group(group)
        self._plan = None
        with self._failing("loading a state"):
            self._store.reset()
            self.state.clear()
            self._owners = {}
            self._store.add(shapes)
            self._store.fill(source)
            for i, step in steps.items():
                self.state[params[i]] = {"step": step}
            self._owners = {i: params[i] for i in steps}
            self.param_groups = groups
            self._failed = None

    def _shape(self, index: int, p: Tensor, bits: int) -> StateShape:
        if self._page_device is not None and p.device != self._page_device:
            raise ValueError(f"parameter {index}: expected on {self._page_device} like its pages, got {p.device}")
        # The bits go by the whole parameter, or ranks with a small part would save states of another kind.
        return StateShape(index, local(p).numel(), effective_bits(p.numel(), bits), p.device)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _folder(self) -> Path | None:
        """The folder that the pages are in, or None."""
        return None if self._store.pager is None else self._store.pager.tier.directory

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


def _import_dynamo() -> None:
    """Before torch does so in the first optimizer's first call: what an import leaves behind keeps frames alive.

    Some exception that is caught on the way has a traceback in a reference cycle, and so all frames up to the caller of
    `AdamW()`, with the optimizer and its pages in them, until the next garbage collection. A thread has its own frames.
    """
    if "torch._dynamo" not in sys.modules:
        thread = threading.Thread(target=importlib.import_module, args=("torch._dynamo",))
        thread.start()
        thread.join()
