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
from typing import Any

from rlm_jax.tasks import countdown
from rlm_jax.tasks.answers import find_marked
from rlm_jax.tasks.base import Example, Gold, Message, Problem, Task, Verdict, judge, make_chat
from rlm_jax.tasks.expressions import parse, strip_result, write_canonically

TARGET = 24

INSTRUCTION = (
    "Use each of the four numbers exactly once, with + - * / and brackets, to make 24. "
    "Combine two numbers per line and list what is left. "
    'Finish with the line "#### " followed by the whole expression.'
)
EXAMPLE = (
    "Make 24 out of 3 5 6 8.",
    "6 - 5 = 1 (left: 1 3 8)\n3 * 1 = 3 (left: 3 8)\n3 * 8 = 24 (left: 24)\n#### (6 - 5) * 3 * 8",
)


def prompt(problem: Problem) -> list[Message]:
    """One worked example, then the four numbers."""
    return make_chat(INSTRUCTION, EXAMPLE, problem.question)


def make_problem(numbers: tuple[int, ...], id: str = "") -> Problem:
    """The puzzle of `numbers`, which also stand in its `data`."""
    return Problem(f"Make {TARGET} out of {' '.join(map(str, numbers))}.", tuple(numbers), id)


def read(text: str) -> Problem:
    """The puzzle of the four numbers in a text, or a puzzle as `countdown.read` takes it.

    Raises:
      ValueError: anything else, or another target than 24.
    """
    numbers = re.fullmatch(r"[0-9]{1,6}(?:[ ,]+[0-9]{1,6}){3}", text.strip())
    if numbers is not None:
        return make_problem(tuple(map(int, re.findall("[0-9]+", text))), "question")
    refusal = f"{text!r:.80} is no Game of 24: four numbers, as 4 4 7 10"
    try:
        data, target = countdown.read(text).data
    except ValueError:
        raise ValueError(refusal) from None
    if target != TARGET or len(data) != 4:
        raise ValueError(refusal)
    return make_problem(data, "question")


def read_row(row: dict[str, Any], line: int) -> Example | None:
    """The puzzle of a row with four `numbers` and, if it likes, `target`, which is 24.

    Raises:
      ValueError: anything else; a row without `numbers` gives None.
    """
    found = countdown.read_row({"target": TARGET, **row}, line)
    if found is None:
        return None
    numbers, target = found[0].data
    if target != TARGET or len(numbers) != 4:
        raise ValueError(f"{list(numbers)} and {target} are no Game of 24: four numbers, target 24")
    return make_problem(numbers, f"game24-{line}"), Gold()


def notation(problem: Problem) -> str:
    """The puzzle as models trained on Countdown read it: `24 : 4 4 7 10`."""
    return countdown.write_state(TARGET, sorted(problem.data))


def extract(text: str) -> str | None:
    """The expression behind the last answer mark; without a mark, the last line that is one.

    Canonical: one space around operators, none inside brackets, and without its `= 24`. A marked
    answer that is no expression, or that claims to equal anything but 24, is no answer. A text
    that is a chain of Countdown's lines gives the expression that they build.
    """
    chain = None if find_marked(text) else countdown.extract(text)
    if chain is not None:
        return chain
    for segment in find_marked(text)[:1] or text.splitlines()[::-1]:
        expression = strip_result(segment, TARGET)
        try:
            parse(expression)
        except ValueError:
            continue
        return write_canonically(expression)
    return None


def verify(problem: Problem, gold: Gold, text: str) -> Verdict:
    """Checks the expression that `text` ends on against the four numbers in `problem.data`."""
    del gold
    if not find_marked(text) and countdown.extract(text) is not None:
        return countdown.verify_text(problem.data, TARGET, text)
    expression = extract(text)
    if expression is None:
        return judge(False, "no expression in the text")
    return countdown.judge_expression(problem.data, TARGET, expression)


def drop_errors(problem: Problem, text: str) -> str:
    """As `countdown.drop_errors`."""
    return countdown.drop_wrong_lines(problem.data, TARGET, text)


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


TASK = Task(
    "game24",
    2,
    True,
    prompt,
    extract,
    verify,
    load=load,
    read_row=read_row,
    read=read,
    notation=notation,
    device=countdown.DEVICE_TASK,
    drop_errors=drop_errors,
)
