"""Python functions behind attributes and names, and their source."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
import types
from typing import Any

from torch import nn


def function_of(attribute: Any) -> types.FunctionType | None:
    """The Python function behind a method, a property or decorators, if there is one."""
    while True:
        if isinstance(attribute, (staticmethod, classmethod, types.MethodType)):
            attribute = attribute.__func__
        elif isinstance(attribute, property):
            attribute = attribute.fget
        elif isinstance(attribute, (functools.cached_property, functools.partial)):
            attribute = attribute.func
        elif hasattr(attribute, "__wrapped__"):
            attribute = attribute.__wrapped__
        else:
            return attribute if isinstance(attribute, types.FunctionType) else None


def method_of(cls: type, name: str, after: type | None = None) -> tuple[types.FunctionType, type, bool] | None:
    """A method of a class or, as `super()` finds it, of the classes after one; where it stands; whether a property."""
    mro = cls.__mro__
    for owner in mro[mro.index(after) + 1 if after in mro else 0 :]:
        if name in owner.__dict__:
            attribute = owner.__dict__[name]
            function = function_of(attribute)
            if function is None or owner is nn.Module:
                return None
            return function, owner, isinstance(attribute, (property, functools.cached_property))
    return None


def tree_of(function: types.FunctionType) -> ast.FunctionDef | None:
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)[code.co_firstlineno - 1 :]
    try:
        statement = ast.parse(textwrap.dedent("".join(inspect.getblock(lines)))).body[0]
    except (SyntaxError, IndexError, ValueError):
        return None
    return statement if isinstance(statement, ast.FunctionDef) and statement.name == code.co_name else None


def resolve(node: ast.expr, function: types.FunctionType) -> Any:
    """The object that a dotted name stands for in a function's globals and closure, or None."""
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, function)
        return inspect.getattr_static(owner, node.attr, None) if isinstance(owner, (types.ModuleType, type)) else None
    if not isinstance(node, ast.Name):
        return None
    code = function.__code__
    if node.id in code.co_freevars and function.__closure__ is not None:
        try:
            return function.__closure__[code.co_freevars.index(node.id)].cell_contents
        except ValueError:  # not yet bound
            return None
    return function.__globals__.get(node.id)
