"""Demonstrations of Countdown, with every right line and the exact state of affairs at each step.

The one idea: problems of one size are walked down together; at each step the exact solver says
which moves keep the problem solvable, one is taken, now and then a wrong one on purpose, so that
the values of lost states are seen too. A demonstration ends where it is lost.
"""

import numpy as np

from rlm_jax.tasks.countdown import write_state
from rlm_jax.tasks.countdown_solver import OPERATORS, Moves, count_below
from rlm_jax.tasks.countdown_split import is_held_out
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

    Problems on whose way a held-out problem stands are left out (`countdown_split`).

    Args:
      wrong_share: chance of a wrong move at each step but the last, where there is one.
      sharpness: a right move weighs its number of solutions to this power; 0 weighs all the same.
    """
    steps: list[list[Step]] = [[] for _ in numbers]
    lost = np.zeros(len(numbers), bool)
    clean = ~is_held_out(numbers, targets)
    rows, states = np.arange(len(numbers)), numbers
    while states.shape[1] > 1 and len(rows):
        moves, below = count_below(states, targets[rows])
        weight = weigh_moves(below, sharpness)
        wrong = (moves.legal & (below == 0)).astype(float)
        errs = (rng.random(len(rows)) < wrong_share) & (wrong.sum(-1) > 0) & (states.shape[1] > 2)
        taken = _draw(rng, np.where(errs[:, None], wrong, weight))
        for i, row in enumerate(rows.tolist()):
            choices = tuple(
                (write_move(moves, i, move), float(weight[i, move]))
                for move in np.flatnonzero(weight[i]).tolist()
            )
            text = write_move(moves, i, int(taken[i]))
            steps[row].append(Step(text, choices, 0.0 if errs[i] else 1.0))
        lost[rows] = errs
        states = moves.states[np.arange(len(rows)), taken]
        if states.shape[1] > 3:
            clean[rows] &= ~is_held_out(states, targets[rows])
        rows, states = rows[~errs], states[~errs]
    return [
        Demonstration(write_state(target, state) + "\n", tuple(walk), not failed, None)
        for target, state, walk, failed, keep in zip(
            targets.tolist(), numbers, steps, lost, clean, strict=True
        )
        if keep
    ]


def demonstrate_openings(
    rng: np.random.Generator, numbers: np.ndarray, targets: np.ndarray, *, sharpness: float
) -> list[Demonstration]:
    """As `demonstrate`, but no more than which two numbers the first line combines, and how.

    That choice is the hard part of a solution and a third of its first line's tokens.
    """
    clean = ~is_held_out(numbers, targets)
    numbers, targets = numbers[clean], targets[clean]
    moves, below = count_below(numbers, targets)
    weight = weigh_moves(below, sharpness)
    taken = _draw(rng, weight)
    demonstrations = []
    for row, (state, target) in enumerate(zip(numbers, targets.tolist(), strict=True)):
        choices = tuple(
            (_write_opening(moves, row, move), float(weight[row, move]))
            for move in np.flatnonzero(weight[row]).tolist()
        )
        step = Step(_write_opening(moves, row, int(taken[row])), choices, None)
        demonstrations.append(
            Demonstration(write_state(target, state) + "\n", (step,), False, None)
        )
    return demonstrations


def weigh_moves(below: np.ndarray, sharpness: float) -> np.ndarray:
    """Shares of the moves [R, A] in a demonstration, from the solutions behind each."""
    weight = np.where(below > 0, np.maximum(below, 1).astype(float) ** sharpness, 0.0)
    return weight / weight.sum(-1, keepdims=True)


def write_move(moves: Moves, row: int, move: int) -> str:
    """`10 - 4 = 6 ; 4 6 7` and a newline; the last move of a chain ends on its result."""
    sign = OPERATORS[moves.operator[row, move]]
    left, right = moves.larger[row, move], moves.smaller[row, move]
    line = f"{left} {sign} {right} = {moves.result[row, move]}"
    state = moves.states[row, move]
    return line if len(state) == 1 else f"{line} ; {' '.join(map(str, state.tolist()))}\n"


def _write_opening(moves: Moves, row: int, move: int) -> str:
    sign = OPERATORS[moves.operator[row, move]]
    return f"{moves.larger[row, move]} {sign} {moves.smaller[row, move]}"


def _draw(rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
    """One column of each row [R, A], in proportion to the weights."""
    total = np.cumsum(weights, axis=1)
    return (total <= rng.random((len(weights), 1)) * total[:, -1:]).sum(-1)
