"""Checkpoints in the safetensors format, written and read extent by extent, complete or not there.

Tensors state.<i>.<name> and param.<i>, for parameter i in the order of the groups; `checksums` int64 [n, 3] holds
(offset, length, checksum) of the header and of every piece of the data, of at most 4 MiB each. The metadata holds
groups and steps as JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ops.optim.layout import BLOCK_SIZE, States, part_dtype, part_numel
from lora_ops.optim.statedict import packed_groups
from lora_ops.optim.states import StateStore
from lora_ops.paging.buffers import bytes_of, write_all
from lora_ops.paging.checksum import checksum
from lora_ops.paging.errors import PagingError

FORMAT = "lora_ops.optim.AdamW 2"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100 << 20
_PIECE = 4 << 20


def save(
    path: Path,
    store: StateStore,
    groups: Sequence[Mapping[str, Any]],
    steps: Mapping[int, int],
    params: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint beside `path`, sync it and rename it.

    Raises:
        PagingError: if the disk is full or the folder cannot be written; `path` is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w+b", buffering=0) as file:
            _Writer(file, store, groups, steps, params).write_all()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # whose reason is that of the first error
            partial.unlink()
        raise PagingError(f"{path}: cannot write the checkpoint: {error.strerror}; an earlier one is intact") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Writer:
    """Knows where every tensor of a checkpoint lies before the first byte is written; a `Sink`."""

    def __init__(
        self,
        file: Any,
        store: StateStore,
        groups: Sequence[Mapping[str, Any]],
        steps: Mapping[int, int],
        params: Mapping[str, Tensor],
    ) -> None:
        self._file, self._store, self._params = file, store, params
        self._checksums: list[tuple[int, int, int]] = []
        sizes: dict[str, tuple[torch.dtype, int]] = {}
        pieces = 1 + sum(_pieces(t.nbytes) for t in params.values())
        for index, _, n, bits in store.runs():
            for part in States.names(bits):
                pieces += _pieces(part_numel(part, n) * part_dtype(part, bits).itemsize)
                name = f"state.{index}.{part}"
                before = sizes[name][1] if name in sizes else 0
                sizes[name] = part_dtype(part, bits), before + part_numel(part, n)
        shapes = {name: (dtype, [n]) for name, (dtype, n) in sizes.items()}
        shapes |= {name: (t.dtype, list(t.shape)) for name, t in params.items()}
        shapes["checksums"] = torch.int64, [pieces, 3]

        header: dict[str, Any] = {"__metadata__": _metadata(groups, steps)}
        self._begin: dict[str, int] = {}
        end = 0
        # Widest first: each tensor is then aligned to its element, as the format asks.
        for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: -item[1][0].itemsize):
            self._begin[name] = end
            end += math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [self._begin[name], end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._total = len(self._header) + end

    def write_all(self) -> None:
        os.posix_fallocate(self._file.fileno(), 0, self._total)
        self._put_piece(0, memoryview(self._header))
        for name, t in self._params.items():
            self._put(self._at(name), bytes_of(t))
        self._store.drain(self)
        table = torch.tensor(self._checksums, dtype=torch.int64)
        self._file.seek(self._at("checksums"))
        write_all(self._file, bytes_of(table))

    def write(self, index: int, first: int, states: States) -> None:
        """Write a run of a parameter's states."""
        for part, t in states.tensors().items():
            place = first // BLOCK_SIZE if part.endswith("absmax") else first
            self._put(self._at(f"state.{index}.{part}") + place * t.element_size(), bytes_of(t))

    def _at(self, name: str) -> int:
        return len(self._header) + self._begin[name]

    def _put(self, offset: int, view: memoryview) -> None:
        for first in range(0, len(view), _PIECE):
            self._put_piece(offset + first, view[first : first + _PIECE])

    def _put_piece(self, offset: int, view: memoryview) -> None:
        self._checksums.append((offset, len(view), _signed(checksum(view))))
        self._file.seek(offset)
        write_all(self._file, view)


def _pieces(nbytes: int) -> int:
    return -(-nbytes // _PIECE)


def _signed(number: int) -> int:
    """An unsigned number of 64 bits as the int64 of the same bits."""
    return number - (number >> 63 << 64)


def _metadata(groups: Sequence[Mapping[str, Any]], steps: Mapping[int, int]) -> dict[str, str]:
    saved = [{k: float(v) if isinstance(v, Tensor) else v for k, v in group.items()} for group in packed_groups(groups)]
    try:
        text = json.dumps(saved)
    except TypeError as error:
        raise ValueError(f"param_groups: expected numbers, strings and lists, to be saved as JSON: {error}") from error
    return {"format": FORMAT, "param_groups": text, "steps": json.dumps(steps)}


class CheckpointFile:
    """A checkpoint opened for reading, its checksums compared; a `Source`.

    Raises:
        PagingError: if it is missing, truncated, corrupted or something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PagingError(f"{path}: cannot read the checkpoint: {error.strerror}") from error
        try:
            self._read_header()
            self._verify()
        except OSError as error:
            os.close(self._fd)
            raise PagingError(f"{path}: cannot read the checkpoint: {error.strerror}") from error
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def states(self, index: int, first: int, n: int) -> States | None:
        """States of elements [first, first + n)."""
        prefix = f"state.{index}."
        if prefix + "exp_avg" not in self._tensors:
            return None
        bits = 8 if prefix + "exp_avg_absmax" in self._tensors else 32
        parts = []
        for part in States.names(bits):
            place = first // BLOCK_SIZE if part.endswith("absmax") else first
            parts.append(self._tensor(prefix + part, place, part_numel(part, n)))
        return States(*parts)

    def param(self, index: int, p: Tensor) -> Tensor | None:
        """The saved parameter, or None."""
        name = f"param.{index}"
        return self._tensor(name, 0, p.numel()).view(p.shape) if name in self._tensors else None

    def check(self, params: Sequence[Tensor]) -> None:
        """Raise ValueError unless states and parameters in the file have the sizes of `params`."""
        for i, p in enumerate(params):
            for name, expected in ((f"state.{i}.exp_avg", (p.numel(),)), (f"param.{i}", tuple(p.shape))):
                if name in self._tensors and (shape := tuple(self._tensors[name]["shape"])) != expected:
                    raise ValueError(f"{self.path}: {name}: expected shape {expected}, got {shape}")

    def _read_header(self) -> None:
        size = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if not 0 < size <= _MAX_HEADER:
            raise self._broken("it does not begin like a safetensors file")
        with self._decoding():
            header = json.loads(os.pread(self._fd, size, 8))
            metadata = header.pop("__metadata__")
            if metadata.get("format") != FORMAT:
                raise self._broken(f"expected format {FORMAT!r}, got {metadata.get('format')!r}")
            self.param_groups = json.loads(metadata["param_groups"])
            self.steps = {int(i): step for i, step in json.loads(metadata["steps"]).items()}
            self._tensors: dict[str, Any] = header
            self._data = 8 + size
            end = max(info["data_offsets"][1] for info in header.values())
        actual = os.fstat(self._fd).st_size
        if actual != self._data + end:
            raise self._broken(f"expected {self._data + end} bytes, got {actual}: truncated?")

    @contextlib.contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._broken(f"its header cannot be read ({type(error).__name__}: {error})") from error

    def _verify(self) -> None:
        with self._decoding():
            table = self._tensor("checksums", 0, math.prod(self._tensors["checksums"]["shape"])).view(-1, 3).tolist()
        covered = 0
        for offset, length, expected in table:
            covered += length
            if not 0 <= length <= max(_PIECE, self._data):
                raise self._broken("its table of checksums holds an impossible length")
            piece = memoryview(bytearray(length))
            done = 0
            while done < length and (n := os.preadv(self._fd, [piece[done:]], offset + done)):
                done += n
            if done < length or _signed(checksum(piece)) != expected:
                raise self._broken(f"bytes {offset} to {offset + length} are not what was written: checksum mismatch")
        if covered + 24 * len(table) != os.fstat(self._fd).st_size:
            raise self._broken("its table of checksums does not cover it")

    def _tensor(self, name: str, first: int, n: int) -> Tensor:
        info = self._tensors[name]
        dtype = _DTYPES[info["dtype"]]
        buffer = torch.empty(n, dtype=dtype)
        view, done = bytes_of(buffer), 0
        offset = self._data + info["data_offsets"][0] + first * dtype.itemsize
        while done < len(view):
            got = os.preadv(self._fd, [view[done:]], offset + done)
            if got == 0:
                raise self._broken(f"{name} is cut short")
            done += got
        return buffer

    def _broken(self, why: str) -> PagingError:
        return PagingError(f"{self.path}: not a complete checkpoint of this optimizer: {why}")
