"""Values of a sweep file that are computed from others: `= gradient_batch / data.batch_size`.

Standard library and bnnfree.errors only.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from typing import Any

from bnnfree.errors import BnnfreeError, nearest

LONGEST = 1000  # characters of a formula
LARGEST = 1e300  # of every number on the way: products of whole numbers would grow without end


def _round(value: float, digits: int = 0) -> float:
    if not (type(digits) is int and 0 <= digits <= 15):
        raise ValueError(f"round: got {digits!r} digits, expected 0 to 15")
    return round(value, digits)


FUNCTIONS: dict[str, Callable[..., float]] = {"sqrt": math.sqrt, "min": min, "max": max, "round": _round}
OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


class ExpressionError(BnnfreeError):
    """A formula that cannot be read, or that has no finite value."""


def is_expression(value: Any) -> bool:
    """Is it a text that begins with `=`?"""
    return isinstance(value, str) and value.startswith("=")


def compute(text: str, names: Mapping[str, Any], where: str) -> int | float:
    """The value of `text` (with its `=`): numbers, + - * /, brackets, sqrt min max round, and dotted `names`.

    A whole number comes as an int, so that 128 / 32 fits a key that counts. Errors: ExpressionError.
    """
    formula = text.removeprefix("=").strip()
    try:
        if len(formula) > LONGEST:
            raise ValueError(f"it has {len(formula)} characters, expected up to {LONGEST}")
        value = _value(ast.parse(formula, mode="eval").body, names)
    except SyntaxError:
        raise ExpressionError(f"{where}: got {text!r}, expected a formula such as = gradient_batch / 2.") from None
    except (ArithmeticError, ValueError, TypeError, RecursionError, MemoryError) as error:
        shown = text if len(text) <= LONGEST else f"{text[:60]}..."
        raise ExpressionError(f"{where}: got {shown!r}, which has no value: {error or type(error).__name__}.") from None
    return int(value) if value == int(value) else value


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    value = _computed(node, names)
    if not abs(value) <= LARGEST:
        raise ArithmeticError("it is not finite")
    return value


def _computed(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left, names), _value(node.right, names))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
        if node.keywords or not node.args:
            raise TypeError(f"{node.func.id} takes numbers")
        return FUNCTIONS[node.func.id](*(_value(argument, names) for argument in node.args))
    name = ast.unparse(node)
    if name in names:
        value = names[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r} and no number")
        return value
    if isinstance(node, ast.Name | ast.Attribute):
        raise ValueError(f"no constant or recipe key is called {name!r}.{nearest(name, names)}")
    raise ValueError(f"{name!r} is no number, name, + - * /, {', '.join(FUNCTIONS)}")
