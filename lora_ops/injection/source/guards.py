"""Outcomes of the tests before a read, where they depend on constants of a module and its configuration alone."""

from __future__ import annotations

import ast
import operator
from typing import Any

from torch import nn


class _Unknown(Exception):
    """The outcome of a test depends on more than constants."""


_COMPARISONS: dict[type, Any] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


def outcome(test: ast.expr, name: str, module: nn.Module) -> bool | None:
    """What a test on the constants of a module and its configuration gives, where `name` is the module; or None."""
    try:
        return bool(_constant(test, name, module))
    except _Unknown:
        return None


def _constant(node: ast.expr, name: str, module: Any) -> Any:
    value = _evaluate(node, name, module)
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise _Unknown
    return value


def _evaluate(node: ast.expr, name: str, module: Any) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id == name:
        return module
    if isinstance(node, ast.Attribute) and node.attr != "training":
        owner = _evaluate(node.value, name, module)
        attributes = getattr(owner, "__dict__", {})
        if node.attr in attributes:
            return attributes[node.attr]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _constant(node.operand, name, module)
    elif isinstance(node, ast.BoolOp):
        decisive = isinstance(node.op, ast.Or)
        outcomes = [outcome(value, name, module) for value in node.values]
        if decisive in outcomes or None not in outcomes:
            return decisive in outcomes if decisive else False not in outcomes
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        left, right = (_constant(operand, name, module) for operand in (node.left, node.comparators[0]))
        try:
            return _COMPARISONS[type(node.ops[0])](left, right)
        except TypeError:
            raise _Unknown from None
    raise _Unknown


def asks_quantized(test: ast.expr) -> bool:
    """Whether this is transformers' question for a quantized model, `hasattr(self.config, "_is_quantized")`."""
    return (
        isinstance(test, ast.Call)
        and isinstance(test.func, ast.Name)
        and test.func.id == "hasattr"
        and isinstance(test.args[-1], ast.Constant)
        and test.args[-1].value == "_is_quantized"
    )
