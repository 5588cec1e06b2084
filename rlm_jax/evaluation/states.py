"""The states that a search's values spoke of, and whether they could still be solved.

For tasks with an exact solver: Countdown and Game of 24. A record's nodes say by their lines which
numbers were left behind them; the solver says whether those make the target. It looks at finished
records alone: no search ever sees what it says.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from rlm_jax.data.records import Record
from rlm_jax.evaluation.calibration import Judged
from rlm_jax.tasks import game24
from rlm_jax.tasks.base import Problem
from rlm_jax.tasks.countdown_solvable import is_solvable

COUNTDOWN_TASKS = ("countdown", "game24")

_MOVE = re.compile(r" *([0-9]+) *([-+*/]) *([0-9]+) *= *([0-9]+) *(?:;((?: +[0-9]+)+))? *\n?")
_RETURN = re.compile(r" *:((?: +[0-9]+)+) *\n?")

# What is left, and all that was left on the way there, for the lines that go back.
Path = tuple[tuple[int, ...], ...]


def read_puzzle(task: str, problem: Problem) -> tuple[tuple[int, ...], int]:
    """The numbers and the target of a problem of Countdown or of Game of 24.

    Raises:
      ValueError: it is of another task.
    """
    if task not in COUNTDOWN_TASKS:
        raise ValueError(f"task {task!r}: accepted are {', '.join(COUNTDOWN_TASKS)}")
    return problem.data if task == "countdown" else (problem.data, game24.TARGET)


def judge_states(
    task: str, problems: Iterable[Problem], records: Iterable[Record]
) -> Iterator[tuple[int, Judged]]:
    """The states of searched problems that a network valued: (node id, what is to be known of it).

    Left out are roots, what is dead (pruned, merged or refuted by the task), states of one number,
    which the task decides without a network, lines that do not follow, and nodes without a value.
    A line that goes back leads to the state it goes back to.

    Args:
      problems: by their ids those of the records.

    Raises:
      ValueError: another task than Countdown and Game of 24.
    """
    puzzles = {problem.id: read_puzzle(task, problem) for problem in problems}
    found: list[tuple[int, str, tuple[int, ...], int, float]] = []
    for record in records:
        numbers, _ = puzzles[record["id"]]
        states = read_states(record, numbers)
        for node in record["nodes"][1:]:
            state, value = states.get(node["id"]), node["value"].get("model")
            if state is None or len(state) < 2 or value is None or not _is_valued(record, node):
                continue
            found.append((node["id"], record["id"], state, len(numbers) - len(state), value))
    truths = _solve([(state, puzzles[name][1]) for _, name, state, *_ in found])
    for (node, name, _, depth, value), truth in zip(found, truths, strict=True):
        yield node, Judged(name, depth, value, truth)


def read_states(record: Record, numbers: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """What is left behind each node, sorted; without nodes whose line does not follow."""
    paths: dict[int, Path] = {record["nodes"][0]["id"]: (tuple(sorted(numbers)),)}
    for node in record["nodes"][1:]:
        above = paths.get(node["parents"][0])
        path = None if above is None else _follow(above, node["text"])
        if path is not None:
            paths[node["id"]] = path
    return {node: path[-1] for node, path in paths.items()}


def _follow(path: Path, line: str) -> Path | None:
    """The path one line on; None where the line is none, or is wrong."""
    back = _RETURN.fullmatch(line)
    if back is not None:
        state = _read_numbers(back[1])
        return path[: path.index(state) + 1] if state in path[:-1] else None
    move = _MOVE.fullmatch(line)
    if move is None:
        return None
    left, right, result = (int(move[place]) for place in (1, 3, 4))
    rest = list(path[-1])
    for number in (left, right):
        if number not in rest:
            return None
        rest.remove(number)
    if not _is_right(left, move[2], right, result):
        return None
    state = tuple(sorted([*rest, result]))
    said = state if move[5] is None and len(state) == 1 else _read_numbers(move[5] or "")
    return (*path, state) if said == state else None


def _is_right(left: int, sign: str, right: int, result: int) -> bool:
    if sign == "/":
        return right > 0 and result * right == left
    return result == {"+": left + right, "-": left - right, "*": left * right}[sign]


def _read_numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted(map(int, text.split())))


def _is_valued(record: Record, node: dict[str, Any]) -> bool:
    """Whether the network has looked at the node, and the search has kept it."""
    waits = record["config"].get("judge") == "visit" and node["visits"] == 0
    return node["alive"] and not node["terminal"] and not waits


def _solve(puzzles: list[tuple[tuple[int, ...], int]]) -> list[bool]:
    """Whether each state makes its target; those of a size are looked at together."""
    truths = [False] * len(puzzles)
    for size in {len(state) for state, _ in puzzles}:
        places = [place for place, (state, _) in enumerate(puzzles) if len(state) == size]
        states = np.array([puzzles[place][0] for place in places], np.int64)
        targets = np.array([puzzles[place][1] for place in places], np.int64)
        for place, truth in zip(places, is_solvable(states, targets).tolist(), strict=True):
            truths[place] = truth
    return truths
