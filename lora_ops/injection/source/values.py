"""What expressions of a function stand for, and what becomes of it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

EACH, ALL = "*", "**"  # in a path: every item or child, and the module with everything below it


class Use(IntEnum):
    """How much of a weight is read."""

    FORM = 1  # dtype or shape
    VALUE = 2


class Value(NamedTuple):
    """What an expression may be: a module that is reached from an argument, or the weight of one.

    Attributes:
        kind: "module", "weight", or "first", the first parameter of a module.
        root: name of the argument.
        path: attributes that lead from there.
        depth: 0 for the thing itself, 1 for a sequence of such, 2 for a sequence of sequences.
    """

    kind: str
    root: str
    path: tuple[str, ...]
    depth: int = 0


Values = frozenset[Value]
NONE: Values = frozenset()


class Guard(NamedTuple):
    """A test before a read, on the module `name` that is reached from an argument, and its outcome there."""

    test: ast.expr
    holds: bool
    name: str
    root: str
    path: tuple[str, ...]


class Read(NamedTuple):
    """A weight that is read, by `reader`; not in a quantized model if only where transformers finds it is not one."""

    weight: Value
    use: Use
    reader: str
    even_quantized: bool
    guards: tuple[Guard, ...] = ()


class Call(NamedTuple):
    """A method that is called on a module, with what of its arguments are modules or weights."""

    module: Value
    method: str
    args: tuple[tuple[int | str, Values], ...]
    even_quantized: bool


@dataclass
class Summary:
    """What a function does with its arguments."""

    parameters: tuple[str, ...] = ()
    reads: set[Read] = field(default_factory=set)
    calls: set[Call] = field(default_factory=set)
    returns: set[Value] = field(default_factory=set)


_LONGEST, _DEEPEST = 12, 4  # of what functions that call themselves reach


def join(path: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    for part in more:
        if path[-1:] in ((EACH,), (ALL,)) and part in (EACH, ALL):
            path = (*path[:-1], ALL)
        elif len(path) < _LONGEST:
            path = (*path, part)
    return path


def iterate(values: Iterable[Value]) -> Values:
    items = set()
    for v in values:
        if v.depth:
            items.add(v._replace(depth=v.depth - 1))
        elif v.kind == "module":
            items.add(v._replace(path=join(v.path, (EACH,))))
    return frozenset(items)


def deepen(values: Iterable[Value], by: int = 1) -> Values:
    return frozenset(v._replace(depth=min(v.depth + by, _DEEPEST)) for v in values)


def substitute(value: Value, given: dict[str, Values]) -> Values:
    """A callee's value as its caller has it."""
    return frozenset(
        value._replace(root=v.root, path=join(v.path, value.path), depth=min(v.depth + value.depth, _DEEPEST))
        for v in given.get(value.root, NONE)
        if v.kind == "module" and (not v.depth or not value.path)
    )
