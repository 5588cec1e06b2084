"""Demonstrations of Countdown, with every right line and the exact state of affairs at each step.

The one idea: problems of one size are walked down together; at each step the exact solver says
which moves keep the problem solvable, one is taken, now and then a wrong one on purpose, so that
the values of lost states are seen too. A demonstration ends where it is lost.
"""

from collections.abc import Sequence

import numpy as np

from rlm_jax.tasks.countdown_solver import OPERATORS, Moves, count_below
from rlm_jax.tasks.demonstrations import Demonstration, Step


def demonstrate(
    rng: np.random.Generator,
    numbers: np.ndarray,
    targets: np.ndarray,
    *,
    wrong_share: float,
    sharpness: float,
) -> list[Demonstration]:
    """One demonstration of each solvable problem: numbers [R, n], sorted, and targets [R].

    Args:
      wrong_share: chance of a wrong move at each step but the last, where there is one.
      sharpness: a right move weighs its number of solutions to this power; 0 weighs all the same.
    """
    steps: list[list[Step]] = [[] for _ in numbers]
    lost = np.zeros(len(numbers), bool)
    rows, states = np.arange(len(numbers)), numbers
    while states.shape[1] > 1 and len(rows):
        moves, below = count_below(states, targets[rows])
        weight = np.where(below > 0, np.maximum(below, 1).astype(float) ** sharpness, 0.0)
        weight /= weight.sum(-1, keepdims=True)
        wrong = (moves.legal & (below == 0)).astype(float)
        errs = (rng.random(len(rows)) < wrong_share) & (wrong.sum(-1) > 0) & (states.shape[1] > 2)
        taken = _draw(rng, np.where(errs[:, None], wrong, weight))
        for i, row in enumerate(rows):
            choices = tuple(
                (write_move(moves, i, move), float(weight[i, move]))
                for move in np.flatnonzero(weight[i])
            )
            text = write_move(moves, i, int(taken[i]))
            steps[row].append(Step(text, choices, 0.0 if errs[i] else 1.0))
        lost[rows] = errs
        states = moves.states[np.arange(len(rows)), taken][~errs]
        rows = rows[~errs]
    return [
        Demonstration(write_state(target, state) + "\n", tuple(walk), not failed, 1.0)
        for target, state, walk, failed in zip(targets, numbers, steps, lost, strict=True)
    ]


def write_state(target: int, numbers: Sequence[int] | np.ndarray) -> str:
    """` 24 : 4 4 7 10`, the problem as models trained on the task read it."""
    return f" {target} : {' '.join(map(str, numbers))}"


def write_move(moves: Moves, row: int, move: int) -> str:
    """` 10 - 4 = 6 ; 4 6 7` and a newline; the last move of a chain ends on its result."""
    sign = OPERATORS[moves.operator[row, move]]
    left, right = moves.larger[row, move], moves.smaller[row, move]
    line = f" {left} {sign} {right} = {moves.result[row, move]}"
    state = moves.states[row, move]
    return line if len(state) == 1 else f"{line} ; {' '.join(map(str, state.tolist()))}\n"


def _draw(rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
    """One column of each row [R, A], in proportion to the weights."""
    total = np.cumsum(weights, axis=1)
    return (total <= rng.random((len(weights), 1)) * total[:, -1:]).sum(-1)
