"""Sorting digits, the Graph-of-Thoughts task (Besta et al. 2024, 2308.09687).

    Sort [3, 1, 2, 1] in ascending order.      ->      #### [1, 1, 2, 3]

The published sizes are 32, 64 and 128 digits from 0 to 9: `generate` at difficulty 0.6, 0.8 and
1.0; between them the length grows as a power of two, from 4 at difficulty 0. A text is right only
when its answer line (`answer_lines.py`) is exactly the sorted list; `count_errors` is the paper's
score of anything else: digits lost or added, plus neighbours in the wrong order.

Self-verifying: the list stands in the question. Levels: -1 no list of digits, 0 as many errors as
digits or more, 1 fewer errors, 2 sorted.

A worked solution (`write_solution`) sorts runs of up to 16 digits, as the paper does, and merges
them.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rlm_jax.tasks import sorting_device
from rlm_jax.tasks.answer_lines import find_answer_line
from rlm_jax.tasks.base import (
    Example,
    Gold,
    Message,
    Problem,
    Task,
    Verdict,
    grade,
    judge,
    make_chat,
)
from rlm_jax.tasks.dial import check_dial
from rlm_jax.tasks.sorting_device import SEPARATORS

RUN_DIGITS = 16

INSTRUCTION = (
    "You sort lists of digits. Keep every digit as often as it occurs. Write one list per line: "
    'sort parts first, then merge them. Finish with the line "#### " followed by the whole list.'
)
EXAMPLE = (
    "Sort [3, 1, 2, 7, 0, 1, 5, 3] in ascending order.",
    "#### [0, 1, 1, 2, 3, 3, 5, 7]",
)

_STATEMENT = re.compile(r"Sort \[([0-9, ]*)\]")
_WORD = re.compile(rb"[0-9]\.*")


def prompt(problem: Problem) -> list[Message]:
    """One sorted list, then the list."""
    return make_chat(INSTRUCTION, EXAMPLE, problem.question)


def make_problem(digits: Sequence[int], id: str = "") -> Problem:
    """The task of sorting `digits`, which also stand in its `data`.

    Raises:
      ValueError: no digits, or one outside 0 to 9.
    """
    if not digits or any(digit not in range(10) for digit in digits):
        raise ValueError(f"digits must be one or more of 0 to 9, not {list(digits)!r:.80}")
    return Problem(f"Sort {format_list(digits)} in ascending order.", tuple(digits), id)


def format_list(digits: Sequence[int]) -> str:
    """The one way to write a list: `[1, 1, 2, 3]`."""
    return f"[{', '.join(map(str, digits))}]"


def count_errors(given: Sequence[int], sorted_: Sequence[int]) -> int:
    """Graph of Thoughts' errors: digits too many or too few, plus descents."""
    want, have = Counter(given), Counter(sorted_)
    frequency = sum(abs(want[digit] - have[digit]) for digit in want | have)
    return frequency + sum(a > b for a, b in itertools.pairwise(sorted_))


def parse_list(line: bytes) -> list[int] | None:
    """The digits of an answer line, or None when it is no list of single digits.

    What counts stands behind the last `[`, if there is one, and before the next `]`.
    """
    inner = line.rsplit(b"[", 1)[-1].split(b"]", 1)[0]
    words = [word for word in re.split(rb"[" + re.escape(SEPARATORS) + rb"]+", inner) if word]
    if not words or not all(_WORD.fullmatch(word) for word in words):
        return None
    return [int(word[:1]) for word in words]


def extract(text: str) -> str | None:
    """The list on the answer line in its canonical form, or None."""
    line = find_answer_line(text)
    digits = None if line is None else parse_list(line)
    return None if digits is None else format_list(digits)


def verify(problem: Problem, gold: Gold, text: str) -> Verdict:
    """Compares the list in `text` with the digits in the question."""
    del gold
    given = read_digits(problem.question)
    if given is None:
        return judge(None, "the question states no list of digits")
    line = find_answer_line(text)
    digits = None if line is None else parse_list(line)
    if digits is None:
        return grade(-1, "no list of digits on the answer line")
    errors = count_errors(given, digits)
    if errors == 0:
        return grade(2, f"{len(given)} digits in order")
    return grade(int(errors < len(given)), f"{errors} errors over {len(given)} digits")


def read_digits(question: str) -> list[int] | None:
    """The digits of the last statement `Sort [...]` in a question, or None."""
    found = _STATEMENT.findall(question)
    words = re.findall("[0-9]+", found[-1]) if found else []
    if not words or any(len(word) > 1 for word in words):
        return None
    return [int(word) for word in words]


def write_solution(problem: Problem) -> str:
    """A worked solution: sorted runs, one a line, then every merge, then the answer.

    Raises:
      ValueError: the question states no list of digits.
    """
    digits = read_digits(problem.question)
    if digits is None:
        raise ValueError(f"{problem.question!r:.80} has no statement `Sort [...]`")
    starts = range(0, len(digits), RUN_DIGITS)
    runs = [sorted(digits[i : i + RUN_DIGITS]) for i in starts]
    lines = [format_list(run) for run in runs] if len(runs) > 1 else []
    while len(runs) > 1:
        runs = [sorted(itertools.chain(*runs[i : i + 2])) for i in range(0, len(runs), 2)]
        lines += [format_list(run) for run in runs] if len(runs) > 1 else []
    return "\n".join([*lines, f"#### {format_list(runs[0])}"])


def generate(seed: int, num_problems: int, difficulty: float) -> list[Example]:
    """Makes `num_problems` lists of round(2 ** (2 + 5 * difficulty)) digits.

    Raises:
      ValueError: difficulty outside [0, 1], or a negative seed or number of problems.
    """
    check_dial(seed, num_problems, difficulty)
    num_digits = round(2 ** (2 + 5 * difficulty))
    examples = []
    for i in range(num_problems):
        digits = np.random.default_rng([seed, i]).integers(0, 10, num_digits).tolist()
        problem = make_problem(digits, f"sorting-{difficulty:g}-{seed}-{i}")
        examples.append((problem, Gold(format_list(sorted(digits)))))
    return examples


TASK = Task(
    "sorting", 1, True, prompt, extract, verify, generate=generate, device=sorting_device.DEVICE
)
