"""What one function does with the modules and weights that it is given, from its source and without running it.

`summarize` follows names, attributes, loops, comprehensions and calls of other functions. It takes no branch for
granted, so a read on any of them counts.
"""

from __future__ import annotations

import ast
import inspect
import types
from collections import defaultdict
from collections.abc import Iterable

from lora_ops.injection.source.functions import function_of, method_of, resolve, tree_of
from lora_ops.injection.source.guards import asks_quantized
from lora_ops.injection.source.values import (
    ALL,
    NONE,
    Call,
    Guard,
    Read,
    Summary,
    Use,
    Value,
    Values,
    deepen,
    iterate,
    join,
    substitute,
)  # fmt: skip

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
        tree = tree_of(function)
        if tree is None:
            _guess(function, summary)
        else:
            Reader(function, cls, owner, summary).function(tree)
    return _summaries[key]


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


class Reader(ast.NodeVisitor):
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
                result.add(v._replace(path=join(v.path, (attr,))))
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
            direct = {v._replace(path=join(v.path, (str(key),))) for v in values if v.kind == "module" and not v.depth}
            return frozenset(direct) | iterate(v for v in values if v.depth)
        return iterate(values)

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
        before, self.even_quantized = self.even_quantized, self.even_quantized and not asks_quantized(node.test)
        values |= self.visit(node.orelse)
        self.even_quantized = before
        return values

    def visit_Starred(self, node: ast.Starred) -> Values:
        return iterate(self.visit(node.value))

    def visit_Tuple(self, node: ast.Tuple | ast.List | ast.Set) -> Values:
        return deepen(self.union(*node.elts)) if node.elts else NONE

    visit_List = visit_Set = visit_Tuple

    def visit_Dict(self, node: ast.Dict) -> Values:
        return deepen(self.union(*node.values)) if node.values else NONE

    def visit_Await(self, node: ast.Await) -> Values:
        return self.visit(node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Values:
        values = self.visit(node.value)
        self.bind(node.target, values)
        return values

    def visit_GeneratorExp(self, node: ast.GeneratorExp | ast.ListComp | ast.SetComp) -> Values:
        self.generators(node.generators)
        return deepen(self.visit(node.elt))

    visit_ListComp = visit_SetComp = visit_GeneratorExp

    def visit_DictComp(self, node: ast.DictComp) -> Values:
        self.generators(node.generators)
        return deepen(self.visit(node.value))

    def generators(self, generators: list[ast.comprehension]) -> None:
        for generator in generators:
            self.bind(generator.target, iterate(self.visit(generator.iter)))
            for test in generator.ifs:
                self.visit(test)

    # Statements

    def bind(self, target: ast.AST, values: Values) -> None:
        if isinstance(target, ast.Name):
            self.env[target.id] |= values
        elif isinstance(target, ast.Starred):
            self.bind(target.value, deepen(values))
        elif isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self.bind(element, iterate(values))
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
        self.bind(node.target, iterate(self.visit(node.iter)))
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
        self.even_quantized = before and not asks_quantized(node.test)
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
            found = self.attribute(first, str(key)) if key else iterate(v for v in first if not v.depth)
            return found | (args[2] if len(args) > 2 else NONE)
        if name == "next":
            found = iterate(v for v in first if v.path[-1:] != (ALL,) or v.kind == "module")
            return found | {v._replace(kind="first", path=v.path[:-1], depth=0) for v in first if v.path[-1:] == (ALL,)
                            and v.kind == "weight"}  # fmt: skip
        if name in _SAME:
            return first
        if name in ("enumerate", "zip"):
            return deepen(frozenset().union(*map(iterate, args)), 2)
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
                return deepen(deep) if name == "items" else deep
            return self.call_static(func, args, kwargs)
        if name in _ITEMS:
            return deepen(iterate(modules), _ITEMS[name])
        if name in _DESCENDANTS:
            return frozenset(v._replace(path=join(v.path, (ALL,)), depth=_DESCENDANTS[name]) for v in modules)
        if name in _PARAMETERS:
            depth = _PARAMETERS[name]
            return frozenset(Value("weight", v.root, join(v.path, (ALL,)), depth) for v in modules if depth)
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
        function = function_of(resolve(func, self.python))
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
                g._replace(root=v.root, path=join(v.path, g.path))
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
