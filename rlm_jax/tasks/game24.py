"""Game of 24: combine four numbers by + - * / and brackets into 24 (Yao et al. 2023, 2305.10601).

The one idea: an answer is checked from the problem alone, with exact fractions, by a parser of our
own that knows digits, four operators and brackets and keeps its own stack: no `eval`, no
recursion, nothing else can run. Exactly the four given numbers must be used, each once.

Deviation from the Tree-of-Thoughts checker: a sign before a number is no operator here, so
`-(4 - 8) * 6` is refused; `(8 - 4) * 6` says the same.
"""

import csv
import os
import re
from fractions import Fraction
from typing import NamedTuple

from rlm_jax.tasks.answers import find_marked
from rlm_jax.tasks.base import Example, Gold, Message, Problem, Task, Verdict, judge, make_chat

TARGET = 24
MAX_EXPRESSION_CHARS = 200

INSTRUCTION = (
    "Use each of the four numbers exactly once, with + - * / and brackets, to make 24. "
    "Combine two numbers per line and list what is left. "
    'Finish with the line "#### " followed by the whole expression.'
)
EXAMPLE = (
    "Make 24 out of 3 5 6 8.",
    "6 - 5 = 1 (left: 1 3 8)\n3 * 1 = 3 (left: 3 8)\n3 * 8 = 24 (left: 24)\n#### (6 - 5) * 3 * 8",
)

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_SIGNS = str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-"})
_TEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": ""}
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")


class Parsed(NamedTuple):
    """An expression's value and the numbers that it was made of, in order."""

    value: Fraction
    numbers: tuple[int, ...]


def prompt(problem: Problem) -> list[Message]:
    """One worked example, then the four numbers."""
    return make_chat(INSTRUCTION, EXAMPLE, problem.question)


def make_problem(numbers: tuple[int, ...], id: str = "") -> Problem:
    """The puzzle of `numbers`, which also stand in its `data`."""
    return Problem(f"Make {TARGET} out of {' '.join(map(str, numbers))}.", tuple(numbers), id)


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


def extract(text: str) -> str | None:
    """The expression behind the last answer mark; without a mark, the last line that is one.

    Canonical: one space around operators, none inside brackets, and without its `= 24`. A marked
    answer that is no expression, or that claims to equal anything but 24, is no answer.
    """
    for segment in find_marked(text)[:1] or text.splitlines()[::-1]:
        expression = _strip_result(segment)
        try:
            parse(expression)
        except ValueError:
            continue
        return "".join(f" {t} " if t in _PRECEDENCE else t for t in _tokenize(expression))
    return None


def verify(problem: Problem, gold: Gold, text: str) -> Verdict:
    """Checks the expression that `text` ends on against the four numbers in `problem.data`."""
    del gold
    expression = extract(text)
    if expression is None:
        return judge(False, "no expression in the text")
    value, numbers = parse(expression)
    if sorted(numbers) != sorted(problem.data):
        given = " ".join(map(str, problem.data))
        return judge(False, f"{expression} does not use exactly {given}")
    return judge(value == TARGET, f"{expression} = {value}")


def solve(numbers: tuple[int, ...]) -> str | None:
    """An expression that makes 24 out of `numbers`, or None when there is none. Exact."""
    if len(numbers) == 1:
        return str(TARGET) if numbers[0] == TARGET else None
    return _solve([(Fraction(n), str(n)) for n in numbers])


def load(path: str | os.PathLike[str]) -> list[Example]:
    """Reads the published csv (Rank, Puzzles, ...); ids carry the zero-based row.

    Raises:
      ValueError: no `Puzzles` column, or a row without four whole numbers; names the row.
    """
    examples = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        for row, fields in enumerate(csv.DictReader(file)):
            numbers = (fields.get("Puzzles") or "").split()
            if len(numbers) != 4 or not all(re.fullmatch("[0-9]+", n) for n in numbers):
                raise ValueError(f"{path}: row {row} has no four numbers under Puzzles: {numbers}")
            problem = make_problem(tuple(map(int, numbers)), f"game24-{row}")
            examples.append((problem, Gold()))
    return examples


def _strip_result(segment: str) -> str:
    """`segment` without markup around it, TeX signs, and `= 24` on either side."""
    for tex, sign in _TEX.items():
        segment = segment.replace(tex, sign)
    sides = [side.strip(" \t\r$`*.") for side in segment.split("=")]
    if len(sides) == 2 and str(TARGET) in sides:
        return sides[0] if sides[1] == str(TARGET) else sides[1]
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


def _solve(terms: list[tuple[Fraction, str]]) -> str | None:
    for i, right in enumerate(terms):
        for j, left in enumerate(terms[:i]):
            rest = [term for k, term in enumerate(terms) if k not in (i, j)]
            for value, text in _combine(left, right):
                if rest:
                    found = _solve([*rest, (value, f"({text})")])
                    if found is not None:
                        return found
                elif value == TARGET:
                    return text
    return None


def _combine(left: tuple[Fraction, str], right: tuple[Fraction, str]) -> list[tuple[Fraction, str]]:
    """All that two terms can become, as value and text."""
    (a, x), (b, y) = left, right
    results = [(a + b, f"{x} + {y}"), (a - b, f"{x} - {y}"), (b - a, f"{y} - {x}")]
    results.append((a * b, f"{x} * {y}"))
    if b:
        results.append((a / b, f"{x} / {y}"))
    if a:
        results.append((b / a, f"{y} / {x}"))
    return results


TASK = Task("game24", 1, True, prompt, extract, verify, load=load)
