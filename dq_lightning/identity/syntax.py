"""Analyses the syntax of running code: what it refers to, and which calls may read files whose names it composes."""

import ast
import collections
import dis
import linecache
import types
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

# Methods that put something into a container.
_CHANGES = frozenset(("append", "appendleft", "extend", "insert", "update", "setdefault", "add", "__setitem__"))
# Functions whose result holds nothing but what their argument holds.
_CONVERSIONS = ("str", "Path", "fspath", "enumerate", "zip", "list", "tuple", "sorted")
# Names of the arguments in which functions take the file that they read. It may also be their first argument.
_FILE_ARGUMENTS = ("fp", "file", "f", "fname", "filename", "path")


def cells_of(function: Any) -> dict[str, Any]:
    """Return the values of the variables that a function takes from the functions around it, by name."""
    held = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # the variable has no value yet
            held[name] = "empty"
    return held


@lru_cache(64)
def _parsed(text: str) -> tuple[list[ast.AST], frozenset[types.CodeType]]:
    """Return the syntax nodes of the functions in a source, and the code objects that Python compiles from them."""
    try:
        tree = ast.parse(text)
        codes, found = [compile(text, "", "exec", dont_inherit=True)], set()
    except (SyntaxError, ValueError, RecursionError):
        return [], frozenset()
    while codes:
        inner = [one for one in codes.pop().co_consts if isinstance(one, types.CodeType)]
        codes += inner
        found.update(inner)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)], frozenset(found)


def _node_of(code: types.CodeType) -> Any:
    """Return the syntax node of running code, or None if the source at hand is not the one that it was made from."""
    linecache.checkcache(code.co_filename)
    nodes, codes = _parsed("".join(linecache.getlines(code.co_filename)))
    if code not in codes:
        return None

    def fits(node: Any) -> bool:
        if isinstance(node, ast.Lambda):
            places = {place[::2] for place in code.co_positions()}
            return code.co_name == "<lambda>" and (node.body.lineno, node.body.col_offset) in places
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        return bool(node.name == code.co_name and first == code.co_firstlineno)

    fitting = [node for node in nodes if fits(node)]
    return fitting[0] if len(fitting) == 1 else None


_NO_EFFECT = ("ctx", "annotation", "returns", "type_comment", "kind", "type_params", "type_ignores")


def _dumped(node: Any, *, top: bool = False) -> str:
    """Return a syntax tree as a text without parts that have no effect; it is equal in all versions of Python."""
    if isinstance(node, list):
        kept = [part for part in node if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
        return f"[{','.join(map(_dumped, kept))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    # The effect of the decorators is visible in the function that they returned.
    skipped = (*_NO_EFFECT, "decorator_list") if top else _NO_EFFECT
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in skipped and value not in (None, [])]
    return f"{type(node).__name__}({','.join(f'{name}={_dumped(value)}' for name, value in fields)})"


def _assignments(node: Any) -> list[tuple[ast.expr, ast.expr]]:
    """Return the targets that a syntax node assigns to, each with an expression of what is assigned."""
    if isinstance(node, ast.Assign):
        return [(target, node.value) for target in node.targets]
    if isinstance(node, ast.AugAssign):
        return [(node.target, ast.BinOp(node.target, node.op, node.value))]
    if isinstance(node, ast.AnnAssign | ast.NamedExpr):
        return [] if node.value is None else [(node.target, node.value)]
    if isinstance(node, ast.For | ast.comprehension):
        return [(node.target, node.iter)]
    if isinstance(node, ast.withitem):
        return [] if node.optional_vars is None else [(node.optional_vars, node.context_expr)]
    return []


class Code(ast.NodeVisitor):
    """Syntax visitor that collects what the code of a function refers to.

    Attributes:
        name: qualified name of the function, for messages.
        function_name: name of the function.
        node: syntax of the function; None if no source fits its code.
        text: the syntax as text; empty without a node.
        scope: values by name, of the function's module and of the functions around it.
        chains: names of the scope or of builtins that the code uses, each with the attributes that are taken from it.
        attributes: names of the attributes that are taken from anything else.
        stored: names of the attributes that the code sets.
        calls: every call with each of its arguments.
        passed_on: those of the chains that are used for more than being called.
        unresolved: reasons why the code could not be resolved completely.
        arguments: names of all arguments, also those of inner functions.
        assigned: expressions that are assigned to each local name.
    """

    def __init__(self, function: types.FunctionType) -> None:
        self.name = function.__qualname__.replace("<locals>.", "")
        self.function_name = function.__name__
        self.scope: Mapping[str, Any] = collections.ChainMap(cells_of(function), function.__globals__)
        self.node = _node_of(function.__code__)
        self.text = "" if self.node is None else _dumped(self.node, top=True)
        self.chains: list[tuple[str, ...]] = []
        self.attributes: list[str] = []
        self.stored: set[str] = set()
        self.calls: list[Call] = []
        self.passed_on: set[tuple[str, ...]] = set()
        self._function: ast.expr | None = None
        self.unresolved: list[str] = []
        self.arguments: set[str] = set()
        self.assigned: dict[str, list[ast.expr]] = {}
        self._global = set(_global_names(function.__code__)) | set(function.__code__.co_freevars)
        if self.node is None:
            self.chains = [(name,) for name in sorted(self._global)]
            return
        for part in [self.node.args, *(self.node.body if isinstance(self.node.body, list) else [self.node.body])]:
            self.visit(part)

    def visit_arg(self, node: ast.arg) -> None:
        self.arguments.add(node.arg)

    def generic_visit(self, node: ast.AST) -> None:
        for target, value in _assignments(node):
            for part in ast.walk(target):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    self.assigned.setdefault(part.id, []).append(value)
        for name, field in ast.iter_fields(node):
            if name not in _NO_EFFECT:
                for part in field if isinstance(field, list) else [field]:
                    if isinstance(part, ast.AST):
                        self.visit(part)

    def visit_Import(self, node: Any) -> None:
        self.unresolved.append(f"{self.name} imports inside a function")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.visit_Import(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self._global and isinstance(node.ctx, ast.Load):
            self._refer(node, (node.id,))

    def _refer(self, node: ast.expr, chain: tuple[str, ...]) -> None:
        self.chains.append(chain)
        if node is not self._function:
            self.passed_on.add(chain)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        names, base = [node.attr], node.value
        while isinstance(base, ast.Attribute):
            names.append(base.attr)
            base = base.value
        names.reverse()
        if not isinstance(node.ctx, ast.Load):
            self.stored.add(names[-1])
            names.pop()
        if isinstance(base, ast.Name) and base.id in self._global:
            self._refer(node, (base.id, *names))
            return
        self.attributes += names
        self.visit(base)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._change(node.value, node)
        self.generic_visit(node)

    def _change(self, held: ast.expr, how: ast.expr) -> None:
        """Record that the expression `how` puts something into the container `held`."""
        while isinstance(held, ast.Subscript):
            held = held.value
        if isinstance(held, ast.Attribute):
            self.stored.add(held.attr)
        elif isinstance(held, ast.Name):
            self.assigned.setdefault(held.id, []).append(ast.Call(how, [], []))

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in _CHANGES:
            self._change(called.value, node)
        last = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        constant = node.args[1] if len(node.args) > 1 else None
        if last == "getattr" and isinstance(constant, ast.Constant) and isinstance(constant.value, str):
            self.attributes.append(constant.value)
            called = ast.Name("hasattr", ast.Load())
        self._function = called
        self.visit(called)
        given = [*enumerate(node.args), *((word.arg, word.value) for word in node.keywords)]
        for place, part in given:
            self.calls.append(Call(self, last, place == 0 or place in _FILE_ARGUMENTS, part))
            self.visit(part)

    def origin(self, value: ast.expr, computed: set[str], seen: tuple[str, ...] = ()) -> str:
        """Return where the value of an expression comes from; `seen` are local names that are being resolved.

        This is "described" for a value that is described as it is, "argument" for an argument, and "composed" for a
        value that code composes. `computed` holds the names of attributes that code sets or computes, and "[]" if it
        computes items.
        """
        while isinstance(value, ast.Subscript | ast.Attribute | ast.Starred):
            if (value.attr if isinstance(value, ast.Attribute) else "[]") in computed:
                return "composed"
            value = value.value
        if isinstance(value, ast.Call):
            name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
            if name == "BytesIO":
                return "described"
            if name in _CONVERSIONS and len(value.args) == 1:
                return self.origin(value.args[0], computed, seen)
            if name == "get" and isinstance(value.func, ast.Attribute) and len(value.args) == 1:
                return self.origin(value.func.value, computed, seen)
            return "composed"
        if isinstance(value, ast.Tuple | ast.List) and value.elts:
            return _worst([self.origin(part, computed, seen) for part in value.elts])
        if isinstance(value, ast.IfExp):
            return _worst([self.origin(part, computed, seen) for part in (value.body, value.orelse)])
        if not isinstance(value, ast.Name) or value.id in seen:
            return "composed"
        found = [self.origin(one, computed, (*seen, value.id)) for one in self.assigned.get(value.id, [])]
        if value.id in self.arguments:
            found.append("described" if value.id == "self" else "argument")
        elif not found:
            found.append("described" if value.id in self._global else "composed")
        return _worst(found)


def _worst(origins: list[str]) -> str:
    return next((one for one in ("composed", "argument") if one in origins), "described")


class Call(NamedTuple):
    """A call in some code, with the last part of the name of what is called and one of its arguments.

    `first` says whether a function that reads files would take this argument as the file.
    """

    code: Code
    name: str
    first: bool
    argument: ast.expr


def composed_names(calls: list[Call], library: set[str], computed: set[str], plain: set[str]) -> list[str]:
    """Find calls that may read files whose names are composed by code, so that the files are not described.

    `library` holds the names of library functions that read files, and `computed` those of attributes that code sets or
    computes. Under a name outside of `plain`, a function of any other name may be called.

    A reason is returned for each such call, in words.
    """

    def reads(call: Call, origin: str) -> bool:
        constant = isinstance(call.argument, ast.Constant) and not isinstance(call.argument.value, str)
        by_users = call.name in users or (bool(users) and call.name not in plain)
        of_file = by_users or (call.name in library and call.first)
        return of_file and not constant and call.code.origin(call.argument, computed) == origin

    users: set[str] = set()
    while more := {call.code.function_name for call in calls if reads(call, "argument")} - users:
        users |= more  # a function that passes its argument to a function that reads files also reads files
    return list(
        dict.fromkeys(
            f"{call.code.name} passes {call.name} a name that it computes" for call in calls if reads(call, "composed")
        )
    )


def _global_names(code: types.CodeType) -> Iterator[str]:
    # `co_names` is not enough, since it also holds attributes: `self.model` is not the global name `model`.
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _global_names(one)
