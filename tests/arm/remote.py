"""The native library on another machine: its functions as ctypes would have them, called through driver.cpp.

Tests of the library then run as they are, `pytest -p tests.arm.remote`: tensors stay here, and a call takes their bytes
there and back. Arguments are plain addresses. What lies there is known because whoever asks a tensor for its address is
noted; a ctypes structure knows its size, and `SIZES` says how long the few others are.
"""

from __future__ import annotations

import bisect
import ctypes
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from lora_ops.runtime import native
from tests.arm.build import DRIVER, LIBRARY, RUN

# Bytes at an argument that is the address of neither a tensor nor a ctypes object, by function and argument.
SIZES: dict[tuple[str, int], Callable[[Sequence[Any]], int]] = {
    ("lora_ops_adamw", 0): lambda arguments: 13 * 8 * arguments[1],
    ("lora_ops_checksum", 0): lambda arguments: arguments[1],
}


class Memory:
    """Storages of tensors by their address. Where two overlap, the older one is gone."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._lock = threading.Lock()

    def note(self, begin: int, size: int) -> None:
        with self._lock:
            first = bisect.bisect_right(self._ends, begin)
            last = bisect.bisect_left(self._begins, begin + size)
            self._begins[first:last] = [begin] if size else []
            self._ends[first:last] = [begin + size] if size else []

    def find(self, address: int) -> tuple[int, int] | None:
        """Begin and size of the storage that holds an address, or ends there (as an empty tensor at its end does)."""
        with self._lock:
            i = bisect.bisect_right(self._begins, address) - 1
            return (self._begins[i], self._ends[i] - self._begins[i]) if i >= 0 and address <= self._ends[i] else None


class Call:
    """What a call sends: buffers, pointers in them, arguments."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.buffers: dict[int, tuple[int, int]] = {}  # by address: number and size
        self.pointers: list[int] = []
        self.arguments: list[int] = []

    def _buffer(self, address: int, size: int) -> int:
        return self.buffers.setdefault(address, (len(self.buffers), size))[0]

    def number(self, value: int) -> None:
        self.arguments += [-1, (value + 2**63) % 2**64 - 2**63]

    def pointer(self, address: int, size: int | None) -> None:
        """An address of a tensor, or of `size` bytes; those may hold more addresses of tensors."""
        if size is not None:
            number, offset = self._buffer(address, size), 0
            words = struct.unpack(f"{size // 8}Q", ctypes.string_at(address, size // 8 * 8))
            for i, word in enumerate(words):
                if word and (found := self.memory.find(word)):
                    self.pointers += [number, 8 * i, self._buffer(*found), word - found[0]]
        elif found := self.memory.find(address):
            number, offset = self._buffer(*found), address - found[0]
        else:
            # No tensor's data: of an empty one, which is not read.
            number, offset = self._buffer(address, 0), 0
        self.arguments += [number, offset]

    def message(self, name: str) -> list[bytes]:
        parts = [struct.pack("q", len(name)), name.encode(), struct.pack("q", len(self.buffers))]
        for address, (_, size) in self.buffers.items():
            parts += [struct.pack("q", size), ctypes.string_at(address, size)]
        for values, width in ((self.pointers, 4), (self.arguments, 2)):
            parts.append(struct.pack(f"{1 + len(values)}q", len(values) // width, *values))
        return parts


class Library:
    """Stands in for `ctypes.CDLL`."""

    def __init__(self, command: Sequence[str], memory: Memory, **pipes: Any) -> None:
        self._memory, self._lock = memory, threading.Lock()
        self.isas: tuple[str, ...] = ()  # for who connects
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **pipes)

    def close(self) -> str:
        """Ends the process; what it said, if there is a pipe for that."""
        said = self._process.communicate()[1]
        return said.decode() if said else ""

    def __getattr__(self, name: str) -> Function:
        if not name.startswith("lora_ops_"):
            raise AttributeError(name)
        setattr(self, name, function := Function(self, name))  # as ctypes does: its signature is set once
        return function

    def call(self, name: str, argtypes: Sequence[type], arguments: Sequence[Any]) -> int:
        call = Call(self._memory)
        for i, (kind, value) in enumerate(zip(argtypes, arguments, strict=True)):
            is_pointer = kind is ctypes.c_void_p or issubclass(kind, ctypes._Pointer)
            target = getattr(value, "_obj", value)  # byref's
            if not is_pointer or value is None:
                call.number(int(value or 0))
            elif isinstance(target, int):
                call.pointer(target, SIZES[name, i](arguments) if (name, i) in SIZES else None)
            else:
                call.pointer(ctypes.addressof(target), ctypes.sizeof(target))
        with self._lock:
            return self._exchange(name, call)

    def _exchange(self, name: str, call: Call) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        sent = call.message(name)
        self._process.stdin.writelines(sent)
        self._process.stdin.flush()
        answer = self._process.stdout.read(8)
        if len(answer) < 8:
            raise RuntimeError(f"{name}: the process that serves the library ended with {self._process.wait()}")
        only_read = set(call.pointers[::4])  # what holds pointers is an argument
        for address, (number, size) in call.buffers.items():
            after, before = self._process.stdout.read(size), sent[4 + 2 * number]
            if after != before and number not in only_read:
                ctypes.memmove(address, after, size)
        return struct.unpack("q", answer)[0]


class Function:
    """Stands in for a function of `ctypes.CDLL`."""

    def __init__(self, library: Library, name: str) -> None:
        self._library, self._name = library, name
        self.argtypes: Sequence[type] = ()
        self.restype: Any = ctypes.c_int

    def __call__(self, *arguments: Any) -> Any:
        result = self._library.call(self._name, self.argtypes, arguments)
        if self.restype is ctypes.c_int:
            return ctypes.c_int(result).value
        copy = self.restype._type_()  # what a pointer to the other memory points to
        signature = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
        self._library.call("memcpy", signature, (ctypes.byref(copy), result, ctypes.sizeof(copy)))
        return ctypes.pointer(copy)


def noting(memory: Memory) -> Any:
    """A patch: every storage is noted whose address is asked for."""
    data_ptr = torch.Tensor.data_ptr

    def noted(tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        memory.note(storage.data_ptr(), storage.nbytes())
        return data_ptr(tensor)

    return mock.patch.object(torch.Tensor, "data_ptr", noted)


def connect(memory: Memory, *, times: int = 1, options: Sequence[str] = (), **pipes: Any) -> Library:
    """The library that tests.arm built, under the emulator with some options, as `native` opens one."""
    library = Library([*RUN, *options, str(DRIVER), str(LIBRARY), str(times)], memory, **pipes)
    with mock.patch.object(ctypes, "CDLL", return_value=library):
        native._open(LIBRARY)
    return library


@contextmanager
def using(library: Any, isa: str) -> Iterator[None]:
    """Calls go to a library, this or `native.library()`, and one of its instruction sets."""

    def ask(function: native.Function, *arguments: Any) -> int:
        called = getattr(library, f"lora_ops_{function.name}")
        called.argtypes = function.argtypes
        return called(*arguments)

    def call(function: native.Function, *arguments: Any) -> None:
        function.check(ask(function, *arguments))

    before = library.lora_ops_get_isa()
    if library.lora_ops_force_isa(native.ISAS[isa]):
        raise ValueError(f"isa: the library has no {isa}")
    try:
        with mock.patch.multiple(native.Function, ask=ask, __call__=call):
            yield
    finally:
        library.lora_ops_force_isa(before)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """As a plugin: `native` has that library and no other, before any test module asks what it has."""
    memory = Memory()
    noting(memory).start()
    library = connect(memory)
    native._load = lambda: library  # type: ignore[assignment]
