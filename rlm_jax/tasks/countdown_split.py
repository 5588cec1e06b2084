"""What no training may see: the test problems of Countdown and of Game of 24.

The one idea: the split is a rule on the problem itself, not a list of what was drawn, so that a
generator can obey it without knowing any test set. Held out are

  inputs    one set of numbers in 50, by a hash, with every target
  targets   those ending in 3, with every set of numbers
  puzzles   the 100 hard ones of Game of 24 in the Tree-of-Thoughts paper (rows 900 to 999 of its
            list), in any order, that is Countdown with target 24
"""

import numpy as np

HELD_OUT_SHARE = 50
_FREE_NUMBERS = 3
_HARD_24 = (
    "4-5-6-10 1-2-4-7 2-5-8-11 3-4-4-13 6-7-8-9 1-11-11-13 1-8-10-11 2-3-6-9 1-3-5-9 3-3-7-12 "
    "4-5-7-9 1-2-8-13 4-6-6-9 1-4-4-8 1-5-10-11 3-4-6-11 2-4-8-9 1-4-5-13 2-2-7-12 3-3-6-7 "
    "1-5-9-13 5-6-7-13 5-5-8-10 2-4-6-12 6-7-8-11 7-9-9-13 3-6-9-12 6-9-12-13 4-7-9-13 5-6-8-12 "
    "2-4-6-7 2-5-10-10 6-6-7-12 6-9-9-11 5-8-11-12 5-6-8-10 6-11-12-13 2-2-8-8 2-7-12-13 "
    "2-6-8-12 3-4-9-13 4-5-10-12 1-2-7-11 4-5-6-8 6-10-12-13 1-3-9-9 1-4-4-11 2-3-9-10 1-2-3-13 "
    "1-6-6-6 1-2-2-9 1-3-6-11 5-10-12-13 2-3-6-6 6-7-10-12 7-8-8-12 3-4-6-8 1-7-9-11 2-3-6-13 "
    "2-2-5-12 2-6-8-13 8-8-10-12 1-3-8-13 4-4-7-10 1-7-10-13 1-9-10-13 3-3-4-11 2-5-7-7 "
    "3-9-10-13 2-3-4-7 4-4-8-12 1-2-6-10 1-5-12-12 5-6-6-8 7-7-8-11 1-3-7-10 3-3-9-12 3-5-7-10 "
    "4-10-12-13 2-3-10-12 3-4-6-6 5-8-8-8 6-8-8-12 2-3-4-9 2-6-7-11 5-9-12-12 1-2-7-12 2-4-5-6 "
    "5-5-8-13 2-3-3-10 3-4-8-12 2-4-6-11 2-2-8-9 1-5-6-7 5-8-10-11 4-4-9-12 2-5-6-6 2-4-9-12 "
    "4-8-11-13 4-9-10-13 "
)
HARD_24 = frozenset(tuple(map(int, puzzle.split("-"))) for puzzle in _HARD_24.split())


def is_held_out_input(numbers: np.ndarray) -> np.ndarray:
    """Whether sets of numbers [R, n], sorted, are held out with every target."""
    code = np.full(len(numbers), 0x9E3779B97F4A7C15, np.uint64)
    with np.errstate(over="ignore"):
        for column in numbers.T:
            code = (code ^ column.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
            code ^= code >> np.uint64(29)
    return code % np.uint64(HELD_OUT_SHARE) == 0


def is_held_out_target(targets: np.ndarray) -> np.ndarray:
    """Whether targets [R] are held out with every set of numbers."""
    return targets % 10 == 3


def is_held_out_puzzle(numbers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Whether problems are hard puzzles of Game of 24: numbers [R, n], sorted, and targets [R]."""
    found = [tuple(row) in HARD_24 for row in numbers.tolist()]
    return (targets == 24) & np.array(found, bool)


def is_held_out(numbers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Whether problems are held out for any of the reasons."""
    return (
        is_held_out_input(numbers)
        | is_held_out_target(targets)
        | is_held_out_puzzle(numbers, targets)
    )


def is_held_out_state(states: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """As `is_held_out`, of states [R, n] that stand on the way of problems.

    Those of three numbers stand on the way of too many to be held out.
    """
    if states.shape[1] <= _FREE_NUMBERS:
        return np.zeros(len(states), bool)
    return is_held_out(states, targets)


def held_out_goals(states: np.ndarray, highest: int) -> np.ndarray:
    """Of which targets 0 to `highest` nothing may be learned at states [R, n], sorted: [R, T]."""
    num_goals = highest + 1
    rows = np.repeat(states, num_goals, axis=0)
    goals = np.tile(np.arange(num_goals), len(states))
    held_out = is_held_out_target(goals) | is_held_out_state(rows, goals)
    return held_out.reshape(len(states), num_goals)
