"""The states that a search's values spoke of, and whether they could still be solved.

For tasks with an exact solver: Countdown and Game of 24. A record's nodes say by their lines which
numbers were left behind them; the solver says whether those make the target. It looks at finished
records alone: no search ever sees what it says.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from rlm_jax.data.records import Record
from rlm_jax.evaluation.calibration import Judged
from rlm_jax.tasks import countdown, game24
from rlm_jax.tasks.base import Problem
from rlm_jax.tasks.countdown_solvable import is_solvable

COUNTDOWN_TASKS = ("countdown", "game24")


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
    paths = {record["nodes"][0]["id"]: [sorted(numbers)]}
    for node in record["nodes"][1:]:
        above = paths.get(node["parents"][0])
        line = countdown.read_line(node["text"].removesuffix("\n"))
        if above is None or line is None:
            continue
        path = countdown.follow(above, line)
        if isinstance(path, list):
            paths[node["id"]] = path
    return {node: tuple(path[-1]) for node, path in paths.items()}


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
