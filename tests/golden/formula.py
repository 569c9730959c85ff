"""Evaluates a formula that a case holds as text, without running it as a program."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
UNARY: dict[type[ast.AST], Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: value for name, value in vars(math).items() if callable(value) and not name.startswith("_")},
    "abs": abs, "min": min, "max": max, "round": round, "float": float, "int": int,
}  # fmt: skip
CONSTANTS = {"nan": math.nan, "inf": math.inf, "pi": math.pi, "e": math.e}


def evaluate(formula: str, variables: Mapping[str, float]) -> float:
    """Value of a formula of arithmetic, comparisons, conditions and functions of numbers; `^` is a power.

    Raises ValueError for anything else, and what the arithmetic raises.
    """
    return float(_value(ast.parse(formula.replace("^", "**"), mode="eval").body, {**CONSTANTS, **variables}))


def _value(node: ast.AST, names: Mapping[str, float]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.BinOp(left, operation, right) if type(operation) in BINARY:
            return BINARY[type(operation)](_value(left, names), _value(right, names))
        case ast.UnaryOp(operation, operand) if type(operation) in UNARY:
            return UNARY[type(operation)](_value(operand, names))
        case ast.BoolOp(ast.And(), values):
            return all(_value(each, names) for each in values)
        case ast.BoolOp(ast.Or(), values):
            return any(_value(each, names) for each in values)
        case ast.Compare(left, operations, others) if all(type(each) in BINARY for each in operations):
            sides = [_value(each, names) for each in (left, *others)]
            return all(BINARY[type(o)](*pair) for o, *pair in zip(operations, sides, sides[1:], strict=False))
        case ast.IfExp(test, body, orelse):
            return _value(body if _value(test, names) else orelse, names)
        case ast.Call(ast.Name(id=name), arguments, []) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(each, names) for each in arguments))
    raise ValueError(f"{ast.unparse(node)}: not a part of a formula")
