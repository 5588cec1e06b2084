"""Countdown: combine all of some whole numbers by + - * / into a target (Stream of Search's game).

    24 : 4 4 7 10
    10 - 4 = 6 ; 4 6 7
    7 - 6 = 1 ...

The one idea: a solution is a chain of lines, `10 - 4 = 6 ; 4 6 7`, each of which takes two of the
numbers that are left and says what is left behind it; the last one says `= target` and no more. A
line can be checked from the line before, equal states read equal, and the answer - one expression
over exactly the given numbers - is rebuilt from the lines. A chain may see that it is lost, and go
back to what was left before: the line `: 4 4 7 10` takes back all lines behind that state (Stream
of Search's chains search in this way too). Models trained on the task read the problem as above;
others are asked in words, and a plain expression behind an answer mark is as good (it may pass
through negative numbers and fractions, a chain may not).

Setting of Stream of Search (arXiv 2404.03683): 4 numbers from 1 to 99, targets from 10 to 100, all
numbers used, whole intermediate results. `generate` draws numbers and target evenly and keeps what
can be solved.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlm_jax.tasks.answers import find_marked
from rlm_jax.tasks.base import Example, Gold, Message, Problem, Task, Verdict, judge, make_chat
from rlm_jax.tasks.countdown_device import DEVICE_TASK
from rlm_jax.tasks.countdown_solvable import is_solvable
from rlm_jax.tasks.countdown_solver import OPERATORS, count_below
from rlm_jax.tasks.dial import check_dial
from rlm_jax.tasks.expressions import parse, strip_result, write_canonically

MAX_NUMBER = 99
TARGETS = (10, 100)
NUM_NUMBERS = (3, 4, 5, 6)
# What a state may be judged for: the targets of all problems and the numbers below, each by itself.
NUM_GOALS = TARGETS[1] + 1

INSTRUCTION = (
    "Use every number exactly once, with + - * / and brackets, to make the target. "
    "Combine two numbers per line and list what is left. "
    'Finish with the line "#### " followed by the whole expression.'
)
EXAMPLE = (
    "Make 24 out of 3 5 6 8.",
    "6 - 5 = 1 ; 1 3 8\n3 * 1 = 3 ; 3 8\n3 * 8 = 24\n#### (6 - 5) * 3 * 8",
)

_MANY = r"([0-9]{1,6}(?:[ ,]+(?:and +)?[0-9]{1,6})+)"
_FORMS = (
    (rf"([0-9]{{1,6}}) *: *{_MANY}", True),
    (rf"make ([0-9]{{1,6}}) (?:out of|from|with|of) {_MANY}\.?", True),
    (rf"{_MANY} *(?:=|->) *([0-9]{{1,6}})", False),
)
_LINE = re.compile(r"([0-9]+) *([-+*/]) *([0-9]+) *= *([0-9]+)(?: *;((?: +[0-9]+)+))? *")
_RETURN = re.compile(r":((?: +[0-9]+)+) *")


def prompt(problem: Problem) -> list[Message]:
    """One worked example, then the numbers and the target."""
    return make_chat(INSTRUCTION, EXAMPLE, problem.question)


def notation(problem: Problem) -> str:
    """The problem as models trained on the task read it: `24 : 4 4 7 10`."""
    numbers, target = problem.data
    return write_state(target, sorted(numbers))


def write_state(target: int, numbers: Sequence[int] | np.ndarray) -> str:
    """`24 : 4 4 7 10`, the problem as models trained on the task read it."""
    return f"{target} : {' '.join(map(str, numbers))}"


def write_return(numbers: Sequence[int] | np.ndarray) -> str:
    """`: 4 4 7 10` and a newline, the line that goes back to where these numbers were left."""
    return f": {' '.join(map(str, numbers))}\n"


def make_problem(numbers: tuple[int, ...], target: int, id: str = "") -> Problem:
    """The puzzle of `numbers` and `target`, which also stand in its `data`.

    Raises:
      ValueError: fewer than two numbers, or one outside of 0 to 999999.
    """
    for number in (*numbers, target):
        if not 0 <= number < 10**6:
            raise ValueError(f"{number!r} is no whole number from 0 to 999999")
    if len(numbers) < 2:
        raise ValueError(f"Countdown takes two numbers or more, got {list(numbers)}")
    question = f"Make {target} out of {' '.join(map(str, numbers))}."
    return Problem(question, (tuple(numbers), target), id)


def read(text: str) -> Problem:
    """The problem in `24 : 4 4 7 10`, `Make 24 out of 4, 4, 7 and 10.` or `4 4 7 10 = 24`.

    Raises:
      ValueError: the text holds no target and two numbers in one of these ways.
    """
    for pattern, target_first in _FORMS:
        match = re.fullmatch(pattern, text.strip(), re.IGNORECASE)
        if match is not None:
            first, second = (tuple(map(int, re.findall("[0-9]+", part))) for part in match.groups())
            target, numbers = (first, second) if target_first else (second, first)
            return make_problem(numbers, target[0], "question")
    raise ValueError(f"{text!r:.80} is no puzzle: write it as 24 : 4 4 7 10, the target first")


def extract(text: str) -> str | None:
    """The expression that `text` ends on, one space around operators, none inside brackets.

    Behind an answer mark stands an expression, with or without `= target`; otherwise the text is a
    chain of lines, and the expression is rebuilt from them.
    """
    marked = find_marked(text)
    if marked:
        return _read_expression(marked[0])
    lines = _read_lines(text)
    # A chain that still has numbers left has not said its answer.
    if lines is None or lines[-1].rest is not None:
        return None
    return write_canonically(_rebuild(lines))


def verify(problem: Problem, gold: Gold, text: str) -> Verdict:
    """Checks the expression, or every line of a chain, against the numbers and the target."""
    del gold
    numbers, target = problem.data
    return verify_text(numbers, target, text)


def verify_text(numbers: tuple[int, ...], target: int, text: str) -> Verdict:
    """`verify` on plain numbers; Game of 24 is Countdown with target 24."""
    if not find_marked(text):
        lines = _read_lines(text)
        if lines is None:
            return judge(False, "no expression and no chain of lines in the text")
        wrong = _find_wrong_line(sorted(numbers), target, lines)
        return judge(wrong is None, wrong or write_canonically(_rebuild(lines)) + f" = {target}")
    expression = extract(text)
    if expression is None:
        return judge(False, "what the answer mark points to is no expression")
    return judge_expression(numbers, target, expression)


def judge_expression(numbers: tuple[int, ...], target: int, expression: str) -> Verdict:
    """Whether an expression uses exactly the numbers and makes the target."""
    try:
        value, used = parse(expression)
    except ValueError as error:
        return judge(False, f"{expression:.80} is no expression: {error}")
    if sorted(used) != sorted(numbers):
        given = " ".join(map(str, numbers))
        return judge(False, f"{expression} does not use exactly {given}")
    return judge(value == target, f"{expression} = {value}")


def solve(numbers: tuple[int, ...], target: int) -> str | None:
    """An expression over whole numbers >= 0, or None when there is none. Exact."""
    state, lines = np.sort(np.array([numbers], np.int64)), []
    wanted = np.array([target], np.int64)
    while state.shape[1] > 1:
        moves, below = count_below(state, wanted)
        best = int(below[0].argmax())
        if not below[0, best]:
            return None
        sign = OPERATORS[moves.operator[0, best]]
        ends = (moves.larger[0, best], moves.smaller[0, best], moves.result[0, best])
        lines.append(Line(int(ends[0]), sign, int(ends[1]), int(ends[2]), None))
        state = moves.states[:, best]
    return write_canonically(_rebuild(lines)) if lines else None


def draw_solvable(
    rng: np.random.Generator,
    num_problems: int,
    size: int,
    targets: np.ndarray,
    *,
    highest: int = MAX_NUMBER,
    admit_fn: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Solvable problems: numbers [R, size], sorted, and targets [R] out of `targets`.

    Args:
      highest: numbers are drawn evenly from 1 to it.
      admit_fn: (numbers, targets) -> which of them may be drawn.
    """
    numbers, wanted, found = [], [], 0
    while found < num_problems:
        rows = max(16, min(8192, 8 * (num_problems - found))) >> max(0, 2 * (size - 4))
        state = np.sort(rng.integers(1, highest + 1, (max(rows, 1), size)), axis=1)
        target = rng.choice(targets, len(state))
        if admit_fn is not None:
            admitted = admit_fn(state, target)
            state, target = state[admitted], target[admitted]
        solvable = is_solvable(state, target)
        numbers.append(state[solvable])
        wanted.append(target[solvable])
        found += int(solvable.sum())
    if not numbers:
        return np.zeros((0, size), np.int64), np.zeros(0, np.int64)
    return np.concatenate(numbers)[:num_problems], np.concatenate(wanted)[:num_problems]


def generate(seed: int, num_problems: int, difficulty: float) -> list[Example]:
    """Solvable problems of 3 (difficulty 0) to 6 (difficulty 1) numbers.

    Raises:
      ValueError: difficulty outside [0, 1], or a negative seed or number of problems.
    """
    check_dial(seed, num_problems, difficulty)
    size = NUM_NUMBERS[round(difficulty * (len(NUM_NUMBERS) - 1))]
    rng = np.random.default_rng([seed, size])
    numbers, targets = draw_solvable(rng, num_problems, size, np.arange(TARGETS[0], TARGETS[1] + 1))
    return [
        (make_problem(tuple(row.tolist()), int(target), f"countdown{size}-{seed}-{i}"), Gold())
        for i, (row, target) in enumerate(zip(numbers, targets, strict=True))
    ]


def read_row(row: dict[str, Any], line: int) -> Example | None:
    """The problem of a row with `numbers` (a list) and `target`; None for a row without `numbers`.

    Raises:
      ValueError: these are no whole numbers, or too few.
    """
    if "numbers" not in row:
        return None
    numbers = row["numbers"]
    if not isinstance(numbers, list):
        raise ValueError(f'"numbers" is no list: {numbers!r:.60}')
    for number in (*numbers, row.get("target")):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{number!r:.60} is no whole number")
    return make_problem(tuple(numbers), row["target"], f"countdown-{line}"), Gold()


def _read_expression(segment: str) -> str | None:
    sides = segment.split("=")
    target = sides[-1].strip(" \t\r$`*.") if len(sides) == 2 else ""
    if target.isascii() and target.isdigit() and len(target) < 10:
        segment = strip_result(segment, int(target))
    else:
        segment = segment.strip(" \t\r$`*.")
    try:
        parse(segment)
    except ValueError:
        return None
    return write_canonically(segment)


class Line(NamedTuple):
    """A line of a chain: a move, or, without a `sign`, a return to the numbers `rest`.

    rest: what is left, rising; None where a line does not say it.
    """

    left: int
    sign: str
    right: int
    result: int
    rest: list[int] | None


def read_line(text: str) -> Line | None:
    """One line of a chain, without its newline; None where it is none."""
    text = text.lstrip(" ")
    if max(map(len, re.findall("[0-9]+", text)), default=0) > 9:
        return None
    match, back = _LINE.fullmatch(text), _RETURN.fullmatch(text)
    if match is not None:
        left, sign, right, result, rest = match.groups()
        return Line(int(left), sign, int(right), int(result), _read_rest(rest))
    return None if back is None else Line(0, "", 0, 0, _read_rest(back[1]))


def follow(path: list[list[int]], line: Line) -> list[list[int]] | str:
    """The states from the problem on, rising, one line further; or what is wrong with the line."""
    left, sign, right, result, rest = line
    if not sign:
        if rest not in path[:-1]:
            return f"{_join(rest)} was not left before: there is no way back to it"
        return path[: path.index(rest) + 1]
    said = f"{left} {sign} {right} = {result}"
    state = path[-1].copy()
    for number in (left, right):
        if number not in state:
            return f"{said}: there is no {number} left"
        state.remove(number)
    if result != _apply(sign, left, right):
        return f"{said} is wrong"
    state = sorted([*state, result])
    if rest is None and len(state) > 1:
        return f"{said} does not say that {_join(state)} are left"
    if rest is not None and (len(state) == 1 or rest != state):
        return f"{said}: what is left is {_join(state)}"
    return [*path, state]


def drop_errors(problem: Problem, text: str) -> str:
    """A chain of lines without those that do not follow, and without what stands on them.

    Behind a wrong line that says what it leaves a chain may go on as if that was so, and go back:
    it solves the problem where what remains of it does. A wrong line, or one on wrong numbers, that
    makes the target is the end of a chain, which takes the problem for solved, and is not dropped.
    """
    numbers, target = problem.data
    return drop_wrong_lines(numbers, target, text)


def drop_wrong_lines(numbers: Sequence[int], target: int, text: str) -> str:
    """`drop_errors` on plain numbers."""
    kept, num_sound = [], 1
    for found in trace_lines(numbers, text):
        moves = found.num_sound != num_sound
        num_sound = found.num_sound
        if found.line is None or moves or found.path[-1] == [target]:
            kept.append(found.text)
    return "\n".join(kept)


class Traced(NamedTuple):
    """A line of a chain that may err, and the states on the way to what it leaves.

    Attributes:
      text, line: as written; line None where it is none, or nothing goes on from it, and the next
        one is read as if it were not there.
      path: states from the problem on, each as the line that leads there says.
      num_sound: of these states, those that follow from the problem's numbers; they come first.
      follows: whether the line follows from the state before it, sound or not.
    """

    text: str
    line: Line | None
    path: list[list[int]]
    num_sound: int
    follows: bool


def trace_lines(numbers: Sequence[int], text: str) -> Iterator[Traced]:
    """Goes the way that the lines of a chain say, the wrong ones too."""
    path, num_sound = [sorted(numbers)], 1
    for text_line in text.split("\n"):
        line = read_line(text_line)
        found = "" if line is None else follow(path, line)
        if line is None or (isinstance(found, str) and not _says_rest(path[-1], line)):
            yield Traced(text_line, None, path, num_sound, False)
        elif isinstance(found, str):
            path = [*path, line.rest or [line.result]]
            yield Traced(text_line, line, path, num_sound, False)
        else:
            num_sound = min(num_sound + (line.sign != "" and num_sound == len(path)), len(found))
            path = found
            yield Traced(text_line, line, path, num_sound, True)


def _says_rest(state: list[int], line: Line) -> bool:
    """Whether a move from `state`, right or wrong, says as many numbers as it would leave."""
    if len(state) <= 2:
        return len(state) == 2 and bool(line.sign) and line.rest is None
    return bool(line.sign) and line.rest is not None and len(line.rest) == len(state) - 1


def _read_lines(text: str) -> list[Line] | None:
    """The lines of a chain; None where one is none."""
    lines: list[Line] = []
    for text_line in text.split("\n"):
        if not text_line.strip(" "):
            continue
        line = read_line(text_line)
        if line is None:
            return None
        lines.append(line)
    return lines or None


def _read_rest(rest: str | None) -> list[int] | None:
    return None if rest is None else sorted(map(int, rest.split()))


def _find_wrong_line(state: list[int], target: int, lines: list[Line]) -> str | None:
    """What is wrong with a chain from `state` to the target, or None."""
    path = [state]
    for line in lines:
        found = follow(path, line)
        if isinstance(found, str):
            return found
        path = found
    state = path[-1]
    if len(state) > 1:
        return f"{_join(state)} are left"
    return None if state[0] == target else f"the chain ends on {state[0]}, not on {target}"


def _join(numbers: Sequence[int] | None) -> str:
    return " ".join(map(str, numbers or ()))


def _apply(sign: str, left: int, right: int) -> int | None:
    if sign == "/":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def _rebuild(lines: list[Line]) -> str:
    """The expression of the last line, results replaced by what they were made of."""
    kept: list[Line] = []
    for line in lines:
        if line.sign:
            kept.append(line)
        else:
            # Every line leaves one number less: those that leave fewer are taken back.
            kept = [other for other in kept if len(other.rest or ()) >= len(line.rest or ())]
    made: dict[int, list[str]] = {}
    for left, sign, right, result, _ in kept:
        sides = [
            f"({made[number].pop()})" if made.get(number) else str(number)
            for number in (left, right)
        ]
        made.setdefault(result, []).append(f"{sides[0]} {sign} {sides[1]}")
    return made[kept[-1].result][-1]


TASK = Task(
    "countdown",
    1,
    True,
    prompt,
    extract,
    verify,
    read_row=read_row,
    generate=generate,
    read=read,
    notation=notation,
    device=DEVICE_TASK,
    drop_errors=drop_errors,
)
