"""The language of ``filter --where``: conditions on fields, read with Python's grammar and never run by it."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from clipscale.data.samples import BadSample
from clipscale.errors import ConfigError

Operators = Mapping[type[ast.AST], Callable[[Any, Any], Any]]

COMPARE: Operators = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda one, many: one in many, ast.NotIn: lambda one, many: one not in many,
}  # fmt: skip
ARITHMETIC: Operators = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
FUNCTIONS: Mapping[str, Callable[[Any], Any]] = {"len": len, "lower": lambda text: text.lower()}
LITERALS = (str, int, float, bool, type(None))
ALLOWED = "fields, numbers, strings, comparisons, in, and, or, not, + - * / // %, len(), lower(), field['name']"


def parse(text: str) -> ast.expr:
    """A condition. Raises ConfigError, in one line, for what is not one."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        _check(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        what = error.msg if isinstance(error, SyntaxError) else str(error) or "too deep"
        raise ConfigError(f"--where {text!r}: {what}; it is made of {ALLOWED}") from None
    return tree


def field_names(tree: ast.expr) -> set[str]:
    """The fields that a condition names."""
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in functions}


def holds(tree: ast.expr, field: Callable[[str], Any]) -> bool:
    """Whether the condition is true of the sample whose fields ``field(name)`` gives.

    ``and`` and ``or`` look no further than they must. Raises BadSample: what ``field`` raises for a field that is
    absent, and ``not_computable`` where values are of the wrong kind (``"a" < 1``) or a division is by zero.
    """
    try:
        return bool(_value(tree, field))
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        raise BadSample("not_computable") from None


def _check(node: ast.AST) -> None:
    match node:
        case ast.Constant(value=value):
            fine = isinstance(value, LITERALS)
        case ast.Call(func=ast.Name(id=name), args=[_], keywords=[]):
            fine = name in FUNCTIONS
        case ast.Compare(ops=ops):
            fine = all(type(op) in COMPARE for op in ops)
        case ast.BinOp(op=op):
            fine = type(op) in ARITHMETIC
        case ast.UnaryOp(op=op):
            fine = isinstance(op, ast.Not | ast.USub)
        case ast.Subscript(slice=ast.Constant(value=str() | int())):
            fine = True
        case _:
            fine = isinstance(node, ast.Name | ast.BoolOp | ast.List | ast.Tuple)
    if not fine:
        raise ValueError(f"{ast.unparse(node)!r} cannot be used")
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr) and not (isinstance(node, ast.Call) and child is node.func):
            _check(child)


def _value(node: ast.expr, field: Callable[[str], Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return field(name)
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_value(part, field) for part in values)
        case ast.BoolOp(values=values):
            return any(_value(part, field) for part in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, field)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, field)
        case ast.Compare():
            return _compare(node, field)
        case ast.BinOp(left=left, op=op, right=right):
            return ARITHMETIC[type(op)](_number(left, field), _number(right, field))
        case ast.Call(func=ast.Name(id=name), args=[argument]):
            return FUNCTIONS[name](_value(argument, field))
        case ast.Subscript(value=whole, slice=ast.Constant(value=str() | int() as key)):
            try:
                return _value(whole, field)[key]
            except (KeyError, IndexError):
                raise BadSample(f"no_{key!s}") from None
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(element, field) for element in elements]
    raise AssertionError(ast.dump(node))


def _compare(node: ast.Compare, field: Callable[[str], Any]) -> bool:
    left = _value(node.left, field)
    for op, term in zip(node.ops, node.comparators, strict=True):
        right = _value(term, field)
        if not COMPARE[type(op)](left, right):
            return False
        left = right
    return True


def _number(node: ast.expr, field: Callable[[str], Any]) -> float:
    value = _value(node, field)
    if not isinstance(value, int | float):  # "a" * 10**9, or a format: `%` on a string
        raise TypeError
    return value
