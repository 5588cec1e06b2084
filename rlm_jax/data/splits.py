"""The test sets of the puzzles: fixed problems that no training meets.

The one idea: a test set is drawn with a seed of its own from what `tasks.countdown_split` holds
out, so its name alone says which problems it holds.

  countdown4-inputs    1,000 sets of four numbers that no training sees, targets that it does
  countdown4-targets   1,000 problems whose targets no training sees
  countdown5, 6        500 sets of numbers that no training sees
  game24               the 100 hard puzzles of the Tree-of-Thoughts paper
"""

import functools
from typing import NamedTuple

import numpy as np

from rlm_jax.tasks import countdown, game24
from rlm_jax.tasks.base import Example, Gold
from rlm_jax.tasks.countdown_split import HARD_24, is_held_out_input, is_held_out_target

_SEED = 20_240_403


class Split(NamedTuple):
    """A test set: the name of its task, and its problems."""

    task: str
    examples: tuple[Example, ...]


SPLITS = ("countdown4-inputs", "countdown4-targets", "countdown5", "countdown6", "game24")
_SIZES = {"countdown5": 5, "countdown6": 6}


@functools.cache
def load_split(name: str) -> Split:
    """The problems of a test set, drawn once a process.

    Raises:
      ValueError: there is no such set.
    """
    if name not in SPLITS:
        raise ValueError(f"split {name!r}: accepted are {', '.join(SPLITS)}")
    if name == "game24":
        puzzles = sorted(HARD_24)
        examples = [
            (game24.make_problem(puzzle, f"game24-{'-'.join(map(str, puzzle))}"), Gold())
            for puzzle in puzzles
        ]
        return Split("game24", tuple(examples))
    targets = np.arange(countdown.TARGETS[0], countdown.TARGETS[1] + 1)
    held = is_held_out_target(targets)
    size = _SIZES.get(name, 4)
    rng = np.random.default_rng([_SEED, SPLITS.index(name)])
    inputs = name != "countdown4-targets"
    draw = countdown.draw_solvable(
        rng,
        1000 if size == 4 else 500,
        size,
        targets[~held] if inputs else targets[held],
        admit_fn=lambda numbers, _: is_held_out_input(numbers) == inputs,
    )
    examples = [
        (countdown.make_problem(tuple(numbers.tolist()), int(target), f"{name}-{i}"), Gold())
        for i, (numbers, target) in enumerate(zip(*draw, strict=True))
    ]
    return Split("countdown", tuple(examples))
