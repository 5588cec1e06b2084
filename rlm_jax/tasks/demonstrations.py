"""Worked solutions that say at every step what else would have been right, and how things stand.

The one idea: a task with an exact solver knows not one right step but all of them, and whether a
state can still be solved. A demonstration carries both in the task's own text, so that training
needs nothing of the task (`rlm_jax.data.demonstrations` turns them into token labels).
"""

from typing import NamedTuple

import numpy as np


class Step(NamedTuple):
    """One step of a demonstration.

    Attributes:
      text: the step taken, its separator included.
      choices: texts that would have been right here and their weights, which sum to 1; `text` need
        not be among them. Empty: nothing is known, or nothing is right.
      value: probability that the problem can still be solved behind `text`, None when unknown.
      weight: what choosing this step counts for, against 1 for others: the loss weight of its first
        token.
      goals: [G], of each goal that a problem of the task may have 1 where it can be reached behind
        `text`, -1 where it cannot, 0 where it is not to be learned; None when nothing is known.
    """

    text: str
    choices: tuple[tuple[str, float], ...]
    value: float | None
    weight: float = 1.0
    goals: np.ndarray | None = None


class Demonstration(NamedTuple):
    """A problem in a task's notation, and the steps that were taken from there.

    Attributes:
      prompt: what the model reads.
      steps: what it writes; the last one ends the solution when `finished`.
      value, goals: as in `Step`, of the problem itself.
    """

    prompt: str
    steps: tuple[Step, ...]
    finished: bool
    value: float | None
    goals: np.ndarray | None = None
