"""What one function does with the modules and weights that it is given, from its source and without running it.

`summarize` follows names, attributes, loops, comprehensions and calls of other functions. It takes no branch for
granted, so a read on any of them counts.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import operator
import textwrap
import types
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from torch import nn

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


# Attributes and methods of a weight, by what their reader needs. The rest needs its values.
_NOTHING = {
    "device",
    "requires_grad",
    "requires_grad_",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "grad",
    "get_device",
    "is_leaf",
}
_FORM = {"dtype", "shape", "ndim", "size", "dim", "numel", "nelement", "element_size", "itemsize", "nbytes", "stride",
         "is_floating_point", "is_complex", "layout", "new_zeros", "new_ones", "new_empty", "new_full",
         "new_tensor"}  # fmt: skip
_CASTS = {"to", "type_as", "zeros_like", "ones_like", "empty_like", "full_like"}  # take dtype and device of a weight
_ASK = {"isinstance", "hasattr", "id", "len", "type", "callable", "issubclass", "print", "repr", "str"}
_SAME = {"list", "tuple", "reversed", "sorted", "iter", "set", "frozenset"}
_ITEMS = {"children": 1, "values": 1, "named_children": 2, "items": 2}  # of a module, by depth of what they give
_DESCENDANTS = {"modules": 1, "named_modules": 2}
_PARAMETERS = {"parameters": 1, "named_parameters": 2, "state_dict": 2, "buffers": 0, "named_buffers": 0}


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


_summaries: dict[tuple[types.CodeType, type | None, type | None], Summary] = {}


def summarize(function: types.FunctionType, cls: type | None = None, owner: type | None = None) -> Summary:
    """What a function does with its arguments.

    Args:
        function: to read.
        cls: class of its first argument, if it is a method.
        owner: class in which the method stands.

    Returns:
        The Summary, kept for the next time. Without source every attribute whose name the code mentions counts as
        read, if it mentions `weight` at all.
    """
    key = (function.__code__, cls, owner)
    if key not in _summaries:
        _summaries[key] = summary = Summary()  # a function that calls itself finds what is known so far
        code = function.__code__
        n = code.co_argcount + code.co_kwonlyargcount
        n += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
        summary.parameters = code.co_varnames[:n]
        tree = _tree(function)
        if tree is None:
            _guess(function, summary)
        else:
            _Reader(function, cls, owner, summary).function(tree)
    return _summaries[key]


def _tree(function: types.FunctionType) -> ast.FunctionDef | None:
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)[code.co_firstlineno - 1 :]
    try:
        statement = ast.parse(textwrap.dedent("".join(inspect.getblock(lines)))).body[0]
    except (SyntaxError, IndexError, ValueError):
        return None
    return statement if isinstance(statement, ast.FunctionDef) and statement.name == code.co_name else None


def _guess(function: types.FunctionType, summary: Summary) -> None:
    names: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    if "weight" in names and summary.parameters:
        for name in names - {"weight"}:
            weight = Value("weight", summary.parameters[0], (name,))
            summary.reads.add(Read(weight, Use.VALUE, function.__qualname__, True))


_LONGEST, _DEEPEST = 12, 4  # of what functions that call themselves reach


def _join(path: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    for part in more:
        if path[-1:] in ((EACH,), (ALL,)) and part in (EACH, ALL):
            path = (*path[:-1], ALL)
        elif len(path) < _LONGEST:
            path = (*path, part)
    return path


def _iterate(values: Iterable[Value]) -> Values:
    items = set()
    for v in values:
        if v.depth:
            items.add(v._replace(depth=v.depth - 1))
        elif v.kind == "module":
            items.add(v._replace(path=_join(v.path, (EACH,))))
    return frozenset(items)


def _deepen(values: Iterable[Value], by: int = 1) -> Values:
    return frozenset(v._replace(depth=min(v.depth + by, _DEEPEST)) for v in values)


class _Reader(ast.NodeVisitor):
    """Evaluates the source of one function into a Summary: visiting an expression gives its Values."""

    def __init__(self, function: types.FunctionType, cls: type | None, owner: type | None, summary: Summary) -> None:
        self.python, self.cls, self.owner, self.summary = function, cls, owner, summary
        self.env: dict[str, set[Value]] = defaultdict(set)
        self.locals: dict[str, ast.FunctionDef | ast.Lambda] = {}
        self.local_returns: dict[str, set[Value]] = defaultdict(set)
        self.returns = summary.returns
        self.even_quantized = True
        self.guards: list[Guard] = []
        self.self_name = summary.parameters[0] if cls is not None and summary.parameters else None

    def function(self, tree: ast.FunctionDef) -> None:
        for name in self.summary.parameters:
            self.env[name].add(Value("module", name, ()))
        for statement in tree.body:
            self.visit(statement)

    # What is done with a weight

    def read(self, values: Iterable[Value], use: Use = Use.VALUE) -> None:
        for v in values:
            # Who looks through all parameters for a dtype does not mean that of one layer.
            if v.kind == "first" or (v.kind == "weight" and not (use is Use.FORM and v.path[-1:] == (ALL,))):
                reader = self.python.__qualname__
                self.summary.reads.add(Read(v, use, reader, self.even_quantized, tuple(self.guards)))

    def generic_visit(self, node: ast.AST) -> Values:
        for child in ast.iter_child_nodes(node):
            self.read(self.visit(child) or NONE)
        return NONE

    def visit_Name(self, node: ast.Name) -> Values:
        return frozenset(self.env.get(node.id, ()))

    def visit_Attribute(self, node: ast.Attribute) -> Values:
        return self.attribute(self.visit(node.value), node.attr)

    def attribute(self, values: Values, attr: str) -> Values:
        result: set[Value] = set()
        for v in values:
            if v.depth:
                continue
            if v.kind != "module":
                if attr == "data":
                    result.add(v)
                elif attr not in _NOTHING:
                    self.read([v], Use.FORM if attr in _FORM else Use.VALUE)
            elif attr == "weight":
                result.add(v._replace(kind="weight"))
            elif (method := self.own(v, attr)) is not None:
                found = self.call_python(method[0], [frozenset([v])], {}, self.cls, method[1])
                result |= found if method[2] else NONE
            else:
                result.add(v._replace(path=_join(v.path, (attr,))))
        return frozenset(result)

    def own(self, v: Value, name: str) -> tuple[types.FunctionType, type, bool] | None:
        """The method, if v is the module whose class is read."""
        if self.cls is None or v.path or v.depth or v.root != self.self_name:
            return None
        return method_of(self.cls, name)

    def visit_Subscript(self, node: ast.Subscript) -> Values:
        values = self.visit(node.value)
        self.read(v for v in values if not v.depth)
        self.visit(node.slice)
        if isinstance(node.slice, ast.Slice):
            return values
        key = node.slice.value if isinstance(node.slice, ast.Constant) else None
        if isinstance(key, (int, str)) and not isinstance(key, bool):
            direct = {v._replace(path=_join(v.path, (str(key),))) for v in values if v.kind == "module" and not v.depth}
            return frozenset(direct) | _iterate(v for v in values if v.depth)
        return _iterate(values)

    def visit_Compare(self, node: ast.Compare) -> Values:
        operands = [self.visit(x) for x in (node.left, *node.comparators)]
        if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            for values in operands:
                self.read(values)
        return NONE

    # What passes values on

    def union(self, *nodes: ast.AST) -> Values:
        return frozenset().union(*(self.visit(node) for node in nodes))

    def visit_BoolOp(self, node: ast.BoolOp) -> Values:
        return self.union(*node.values)

    def visit_IfExp(self, node: ast.IfExp) -> Values:
        self.visit(node.test)
        values = self.visit(node.body)
        before, self.even_quantized = self.even_quantized, self.even_quantized and not _asks_quantized(node.test)
        values |= self.visit(node.orelse)
        self.even_quantized = before
        return values

    def visit_Starred(self, node: ast.Starred) -> Values:
        return _iterate(self.visit(node.value))

    def visit_Tuple(self, node: ast.Tuple | ast.List | ast.Set) -> Values:
        return _deepen(self.union(*node.elts)) if node.elts else NONE

    visit_List = visit_Set = visit_Tuple

    def visit_Dict(self, node: ast.Dict) -> Values:
        return _deepen(self.union(*node.values)) if node.values else NONE

    def visit_Await(self, node: ast.Await) -> Values:
        return self.visit(node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Values:
        values = self.visit(node.value)
        self.bind(node.target, values)
        return values

    def visit_GeneratorExp(self, node: ast.GeneratorExp | ast.ListComp | ast.SetComp) -> Values:
        self.generators(node.generators)
        return _deepen(self.visit(node.elt))

    visit_ListComp = visit_SetComp = visit_GeneratorExp

    def visit_DictComp(self, node: ast.DictComp) -> Values:
        self.generators(node.generators)
        return _deepen(self.visit(node.value))

    def generators(self, generators: list[ast.comprehension]) -> None:
        for generator in generators:
            self.bind(generator.target, _iterate(self.visit(generator.iter)))
            for test in generator.ifs:
                self.visit(test)

    # Statements

    def bind(self, target: ast.AST, values: Values) -> None:
        if isinstance(target, ast.Name):
            self.env[target.id] |= values
        elif isinstance(target, ast.Starred):
            self.bind(target.value, _deepen(values))
        elif isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self.bind(element, _iterate(values))
        else:  # an attribute or an item
            self.read(self.visit(target))

    def visit_Assign(self, node: ast.Assign) -> Values:
        values = self.visit(node.value)
        for target in node.targets:
            self.bind(target, values)
        return NONE

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Values:
        if node.value is not None:
            self.bind(node.target, self.visit(node.value))
        return NONE

    def visit_For(self, node: ast.For) -> Values:
        self.bind(node.target, _iterate(self.visit(node.iter)))
        for statement in (*node.body, *node.orelse):
            self.visit(statement)
        return NONE

    def visit_withitem(self, node: ast.withitem) -> Values:
        values = self.visit(node.context_expr)
        if node.optional_vars is not None:
            self.bind(node.optional_vars, values)
        return NONE

    def visit_If(self, node: ast.If) -> Values:
        before = self.even_quantized
        # A cast that spares uint8 spares NF4.
        spared = any(isinstance(part, ast.Attribute) and part.attr == "uint8" for part in ast.walk(node.test))
        self.even_quantized = before and not spared
        self.visit(node.test)
        self.branch(node.body, node.test, True)
        self.even_quantized = before and not _asks_quantized(node.test)
        self.branch(node.orelse, node.test, False)
        self.even_quantized = before
        return NONE

    def branch(self, statements: list[ast.stmt], test: ast.expr, holds: bool) -> None:
        if self.self_name is not None:
            self.guards.append(Guard(test, holds, self.self_name, self.self_name, ()))
        for statement in statements:
            self.visit(statement)
        if self.self_name is not None:
            self.guards.pop()

    def visit_Return(self, node: ast.Return | ast.Yield) -> Values:
        if node.value is not None:
            self.returns |= self.visit(node.value)
        return NONE

    visit_Yield = visit_Return

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Values:
        self.locals[node.name] = node
        self.local_body(node)
        return NONE

    def local_body(self, function: ast.FunctionDef) -> set[Value]:
        """What a function that is defined in this one returns, with the arguments known so far."""
        outer, self.returns = self.returns, self.local_returns[function.name]
        for statement in function.body:
            self.visit(statement)
        returned, self.returns = self.returns, outer
        self.local_returns[function.name] |= returned
        return returned

    def visit_Lambda(self, node: ast.Lambda) -> Values:
        self.read(self.visit(node.body))
        return NONE

    # Calls

    def visit_Call(self, node: ast.Call) -> Values:
        args: list[Values] = [self.visit(a) for a in node.args]
        kwargs = {k.arg or "**": self.visit(k.value) for k in node.keywords}
        if isinstance(node.func, ast.Name) and (special := self.builtin(node.func.id, node, args)) is not None:
            return special
        if isinstance(node.func, ast.Attribute):
            return self.call_attribute(node.func, args, kwargs)
        if isinstance(node.func, ast.Name) and node.func.id in self.locals:
            return self.call_local(self.locals[node.func.id], args, kwargs)
        called = self.visit(node.func)
        self.call_modules(called, "__call__", args, kwargs)
        return self.call_static(node.func, args, kwargs)

    def builtin(self, name: str, node: ast.Call, args: list[Values]) -> Values | None:
        """What a call of this builtin function gives; None for another function."""
        first = args[0] if args else NONE
        if name in _ASK:
            return NONE
        if name == "getattr" and len(node.args) > 1:
            key = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            found = self.attribute(first, str(key)) if key else _iterate(v for v in first if not v.depth)
            return found | (args[2] if len(args) > 2 else NONE)
        if name == "next":
            found = _iterate(v for v in first if v.path[-1:] != (ALL,) or v.kind == "module")
            return found | {v._replace(kind="first", path=v.path[:-1], depth=0) for v in first if v.path[-1:] == (ALL,)
                            and v.kind == "weight"}  # fmt: skip
        if name in _SAME:
            return first
        if name in ("enumerate", "zip"):
            return _deepen(frozenset().union(*map(_iterate, args)), 2)
        if name in ("map", "filter"):
            return frozenset().union(*args[1:])
        return None

    def call_attribute(self, func: ast.Attribute, args: list[Values], kwargs: dict[str, Values]) -> Values:
        if isinstance(func.value, ast.Call) and isinstance(func.value.func, ast.Name) and func.value.func.id == "super":
            method = method_of(self.cls, func.attr, self.owner) if self.cls is not None else None
            if method is None or self.self_name is None:
                return NONE
            me = frozenset([Value("module", self.self_name, ())])
            return self.call_python(method[0], [me, *args], kwargs, self.cls, method[1])
        base, name = self.visit(func.value), func.attr
        weights = frozenset(v for v in base if v.kind != "module")
        modules = frozenset(v for v in base if v.kind == "module" and not v.depth)
        self.attribute(weights, name)
        if name in _CASTS:
            for values in (*args, *kwargs.values()):
                self.read(values, Use.FORM)
            return NONE
        if not modules:
            deep = frozenset(v for v in base if v.depth)
            if deep and name in ("items", "values", "append", "extend"):
                return _deepen(deep) if name == "items" else deep
            return self.call_static(func, args, kwargs)
        if name in _ITEMS:
            return _deepen(_iterate(modules), _ITEMS[name])
        if name in _DESCENDANTS:
            return frozenset(v._replace(path=_join(v.path, (ALL,)), depth=_DESCENDANTS[name]) for v in modules)
        if name in _PARAMETERS:
            depth = _PARAMETERS[name]
            return frozenset(Value("weight", v.root, _join(v.path, (ALL,)), depth) for v in modules if depth)
        result: set[Value] = set()
        for v in modules:
            if (method := self.own(v, name)) is not None:
                result |= self.call_python(method[0], [frozenset([v]), *args], kwargs, self.cls, method[1])
                modules -= {v}
        self.call_modules(modules, name, args, kwargs)
        return frozenset(result)

    def call_modules(self, called: Values, name: str, args: list[Values], kwargs: dict[str, Values]) -> None:
        """Methods of modules whose class is not known here."""
        given: list[tuple[int | str, Values]] = [(i, v) for i, v in enumerate(args, 1) if v]
        given += [(k, v) for k, v in kwargs.items() if v]
        for v in called:
            if v.kind == "module" and not v.depth and (given or name not in ("__call__", "forward")):
                self.summary.calls.add(Call(v, name, tuple(given), self.even_quantized))

    def call_local(
        self, function: ast.FunctionDef | ast.Lambda, args: list[Values], kwargs: dict[str, Values]
    ) -> Values:
        names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
        before = {name: set(self.env[name]) for name in names}
        for name, values in (*zip(names, args, strict=False), *kwargs.items()):
            self.env[name] |= values
        if not isinstance(function, ast.FunctionDef):
            return NONE
        if any(self.env[name] != before[name] for name in names):
            self.local_body(function)
        return frozenset(self.local_returns[function.name])

    def call_static(self, func: ast.expr, args: list[Values], kwargs: dict[str, Values]) -> Values:
        """A function of the module's globals: followed if it takes modules; it reads the weights that it takes."""
        for values in (*args, *kwargs.values()):
            self.read(values)
        if not any(args) and not any(kwargs.values()):
            return NONE
        function = function_of(_resolve(func, self.python))
        return NONE if function is None else self.call_python(function, args, kwargs)

    def call_python(
        self,
        function: types.FunctionType,
        args: list[Values],
        kwargs: dict[str, Values],
        cls: type | None = None,
        owner: type | None = None,
    ) -> Values:
        """Take over what another function does with these arguments."""
        summary = summarize(function, cls, owner)
        given: dict[str, Values] = dict(zip(summary.parameters, args, strict=False))
        given |= {k: v for k, v in kwargs.items() if k in summary.parameters}
        for read in list(summary.reads):
            even = read.even_quantized and self.even_quantized
            guards = tuple(self.guards) + tuple(
                g._replace(root=v.root, path=_join(v.path, g.path))
                for g in read.guards
                if len(vs := given.get(g.root, NONE)) == 1
                for v in vs
                if v.kind == "module" and not v.depth
            )
            for v in substitute(read.weight, given):
                self.summary.reads.add(read._replace(weight=v, even_quantized=even, guards=guards))
        for call in list(summary.calls):
            inner = tuple((k, frozenset(w for v in vs for w in substitute(v, given))) for k, vs in call.args)
            even = call.even_quantized and self.even_quantized
            for v in substitute(call.module, given):
                self.summary.calls.add(call._replace(module=v, args=inner, even_quantized=even))
        return frozenset(v for r in summary.returns for v in substitute(r, given))


def substitute(value: Value, given: dict[str, Values]) -> Values:
    """A callee's value as its caller has it."""
    return frozenset(
        value._replace(root=v.root, path=_join(v.path, value.path), depth=min(v.depth + value.depth, _DEEPEST))
        for v in given.get(value.root, NONE)
        if v.kind == "module" and (not v.depth or not value.path)
    )


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


def _asks_quantized(test: ast.expr) -> bool:
    """Whether this is transformers' question for a quantized model, `hasattr(self.config, "_is_quantized")`."""
    return (
        isinstance(test, ast.Call)
        and isinstance(test.func, ast.Name)
        and test.func.id == "hasattr"
        and isinstance(test.args[-1], ast.Constant)
        and test.args[-1].value == "_is_quantized"
    )


def _resolve(node: ast.expr, function: types.FunctionType) -> Any:
    """The object that a dotted name stands for in a function's globals and closure, or None."""
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, function)
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
