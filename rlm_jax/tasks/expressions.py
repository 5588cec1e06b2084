"""Arithmetic expressions of whole numbers, evaluated exactly; what Game of 24 and Countdown share.

The one idea: a parser of our own that knows digits, four operators and brackets and keeps its own
stack: no `eval`, no recursion, nothing else can run.
"""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_EXPRESSION_CHARS = 200

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_SIGNS = str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-"})
_TEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": ""}
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")


class Parsed(NamedTuple):
    """An expression's value and the numbers that it was made of, in order."""

    value: Fraction
    numbers: tuple[int, ...]


def parse(expression: str) -> Parsed:
    """Evaluates an expression of whole numbers, + - * / and brackets, exactly.

    Raises:
      ValueError: anything else in it, a division by zero, or over `MAX_EXPRESSION_CHARS`.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"longer than {MAX_EXPRESSION_CHARS} characters")
    values: list[Fraction] = []
    numbers: list[int] = []
    pending: list[str] = []
    want_number = True
    for token in _tokenize(expression):
        is_operand = token == "(" or token.isdigit()
        if is_operand != want_number:
            raise ValueError(f"unexpected {token!r}")
        if token == "(":
            pending.append(token)
        elif token == ")":
            _reduce(values, pending, 0)
            if not pending:
                raise ValueError("unexpected ')'")
            pending.pop()
        elif token in _PRECEDENCE:
            _reduce(values, pending, _PRECEDENCE[token])
            pending.append(token)
            want_number = True
        else:
            numbers.append(int(token))
            values.append(Fraction(numbers[-1]))
            want_number = False
    if want_number:
        raise ValueError("it ends too early")
    _reduce(values, pending, 0)
    if pending:
        raise ValueError("a bracket is left open")
    return Parsed(values[0], tuple(numbers))


def write_canonically(expression: str) -> str:
    """One space around operators, none inside brackets."""
    return "".join(f" {t} " if t in _PRECEDENCE else t for t in _tokenize(expression))


def strip_result(segment: str, target: int) -> str:
    """`segment` without markup around it, TeX signs, and `= target` on either side."""
    for tex, sign in _TEX.items():
        segment = segment.replace(tex, sign)
    sides = [side.strip(" \t\r$`*.") for side in segment.split("=")]
    if len(sides) == 2 and str(target) in sides:
        return sides[0] if sides[1] == str(target) else sides[1]
    return sides[0] if len(sides) == 1 else segment


def _tokenize(expression: str) -> list[str]:
    tokens, end = [], 0
    expression = expression.translate(_SIGNS)
    while end < len(expression):
        if expression[end] == " ":
            end += 1
            continue
        match = _TOKEN.match(expression, end)
        if match is None:
            raise ValueError(f"{expression[end]!r} is none of 0-9 + - * / ( )")
        tokens.append(match[0])
        end = match.end()
    return tokens


def _reduce(values: list[Fraction], pending: list[str], precedence: int) -> None:
    """Applies the pending operators that bind at least as tightly, back to an open bracket."""
    while pending and pending[-1] != "(" and _PRECEDENCE[pending[-1]] >= precedence:
        right, left = values.pop(), values.pop()
        values.append(_apply(pending.pop(), left, right))


def _apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if right == 0:
        raise ValueError("division by zero")
    return left / right
