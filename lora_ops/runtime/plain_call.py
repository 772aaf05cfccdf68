"""Whether torch's dispatcher has nothing to do for a call, so that its cost can be saved."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import _profiler_enabled, forward_ad


def _dispatcher_state() -> tuple[int, int]:
    """What this thread asks of torch's dispatcher beyond a tensor's own keys: autocast, modes, transforms, tracing."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return included.raw_repr(), excluded.raw_repr()


def _plain_calls() -> tuple[frozenset[tuple[int, int]], frozenset[int]]:
    """States of the dispatcher and keys of a CPU tensor where nothing stands between an op and its kernel."""
    states, keys = set(), set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            states.add(_dispatcher_state())
            keys.add(torch._C._dispatch_keys(torch.empty(0)).raw_repr())
    return frozenset(states), frozenset(keys)


# In a thread of its own, whose state nothing has touched yet.
with ThreadPoolExecutor(1) as _thread:
    _PLAIN_STATES, _PLAIN_KEYS = _thread.submit(_plain_calls).result()
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _refuse_forward_mode(operands: tuple[Tensor | None, ...]) -> None:
    """Raise where a tangent is asked for: the dispatcher takes it for zero in ops that have no rule for it."""
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None and transform.key() is TransformType.Jvp:
        asked = any(t is not None and torch._C._functorch.is_gradtrackingtensor(t) for t in operands)
    else:
        asked = forward_ad._current_level >= 0 and any(
            t is not None and forward_ad.unpack_dual(t).tangent is not None for t in operands
        )
    if asked:
        raise NotImplementedError(
            "lora_ops' ops have no forward-mode gradient (torch.func.jvp, torch.autograd.forward_ad); take reverse "
            "mode: torch.func.vjp, torch.autograd.grad"
        )


def is_plain_call(*operands: Tensor | None) -> bool:
    """Whether torch's dispatcher would do nothing but call the kernel, so that a public function may do so itself.

    That is, a call on CPU tensors that needs no gradient, outside of autocast, torch.compile, tracing, vmap, any other
    mode and the profiler. The way through the dispatcher costs 8 µs, and in a model whose weights do not fit the cache
    several times as much: a token's nf4_linear of 4096 x 4096 takes 150.
    """
    if torch.compiler.is_compiling():
        return False
    _refuse_forward_mode(operands)
    if _dispatcher_state() not in _PLAIN_STATES or _profiler_enabled():
        return False
    wants_grad, keys = torch.is_grad_enabled(), torch._C._dispatch_keys
    for t in operands:
        if t is None:
            continue
        if type(t) not in _PLAIN_TYPES or (wants_grad and t.requires_grad):
            return False
        if keys(t).raw_repr() not in _PLAIN_KEYS:
            return False
    return True
