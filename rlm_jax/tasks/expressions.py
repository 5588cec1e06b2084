"""Arithmetic expressions, evaluated exactly; what Game of 24, Countdown and arithmetic share.

The one idea: a parser of our own that knows digits, four operators and brackets and keeps its own
stack: no `eval`, no recursion, nothing else can run.
"""

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import NamedTuple, TypeVar

MAX_EXPRESSION_CHARS = 200
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_SIGNS = str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-"})
_TEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": ""}
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")

T = TypeVar("T")


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
    numbers: list[int] = []

    def read(token: str) -> Fraction:
        numbers.append(int(token))
        return Fraction(numbers[-1])

    return Parsed(evaluate(_tokenize(expression), read, _apply), tuple(numbers))


def evaluate(
    tokens: Iterable[str],
    read_fn: Callable[[str], T],
    apply_fn: Callable[[str, T, T], T],
    *,
    max_brackets: int | None = None,
) -> T:
    """The value of an expression with + - * / and brackets, in whatever its numbers are.

    Args:
      read_fn: a number's token -> the number; anything that is no operator or bracket goes there.
      apply_fn: (operator, left, right) -> the result; called in the order of evaluation.
      max_brackets: most brackets that may be open at once.

    Raises:
      ValueError: no expression; and what the functions raise.
    """
    values: list[T] = []
    pending: list[str] = []

    def reduce(precedence: int) -> None:
        """Applies the pending operators that bind at least as tightly, back to an open bracket."""
        while pending and pending[-1] != "(" and PRECEDENCE[pending[-1]] >= precedence:
            right, left = values.pop(), values.pop()
            values.append(apply_fn(pending.pop(), left, right))

    want_number = True
    for token in tokens:
        if (token == "(" or token.isdigit()) != want_number:
            raise ValueError(f"unexpected {token!r}")
        if token == "(":
            pending.append(token)
            if max_brackets is not None and pending.count("(") > max_brackets:
                raise ValueError(f"more than {max_brackets} open brackets")
        elif token == ")":
            reduce(0)
            if not pending:
                raise ValueError("unexpected ')'")
            pending.pop()
        elif token in PRECEDENCE:
            reduce(PRECEDENCE[token])
            pending.append(token)
            want_number = True
        else:
            values.append(read_fn(token))
            want_number = False
    if want_number:
        raise ValueError("it ends too early")
    reduce(0)
    if pending:
        raise ValueError("a bracket is left open")
    return values[0]


def write_canonically(expression: str) -> str:
    """One space around operators, none inside brackets."""
    return "".join(f" {t} " if t in PRECEDENCE else t for t in _tokenize(expression))


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
