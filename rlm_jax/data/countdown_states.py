"""Countdown states and all targets that each can be made, as batches by number.

What `models.state_value` learns from: states as searches meet them, which is behind one move or
more of a problem, right ones and wrong ones. The exact solver says of each which targets it makes.
Nothing is told of what is held out (`tasks.countdown_split`): targets that end in 3, and states
that are problems of a test set.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from rlm_jax.core.types import Float32, Int8, Int32
from rlm_jax.data.countdown import PUZZLE_24_NUMBER, check_shares, check_sizes
from rlm_jax.tasks.countdown import MAX_NUMBER, NUM_GOALS
from rlm_jax.tasks.countdown_demos import draw_moves
from rlm_jax.tasks.countdown_walks import MAX_LISTED, label_goals

# Of quotients: the least product, and the largest quotient that one more move takes to a goal.
_LEAST_PRODUCT = 256
_MAX_QUOTIENT = NUM_GOALS + MAX_NUMBER


class StateBatch(NamedTuple):
    """R states of at most M numbers.

    items: -1 where there are fewer. goals: 1 where the goal can be reached from the state, -1 where
    not, 0 where it is not to be learned.
    """

    items: Int32[Any, "R M"]
    goals: Int8[Any, "R G"]


class AskedBatch(NamedTuple):
    """R states of at most M numbers, each asked about K goals.

    items: as in `StateBatch`. labels: 1 where the goal can be reached, else 0. weights: of how many
    of the state's goals with that label each one that was drawn tells; 0 where there is none.
    """

    items: Int32[Any, "R M"]
    goals: Int32[Any, "R K"]
    labels: Float32[Any, "R K"]
    weights: Float32[Any, "R K"]


@dataclasses.dataclass(frozen=True)
class StateMix:
    """What a batch is made of.

    Attributes:
      seed: of everything.
      num_states: R.
      sizes: numbers of a state and their shares, which sum to 1.
      small_share: states of problems with numbers up to 13, as in Game of 24.
      deep_share: states behind two moves, of the others: one is the rule.
      whole_share: states that are problems themselves.
      quotient_share: states that a division of a large product leads on from, of all. Random moves
        seldom leave any, and 1 problem in 25 of four numbers has no other solution.
    """

    seed: int
    num_states: int = 256
    sizes: tuple[tuple[int, float], ...] = ((2, 0.1), (3, 0.62), (4, 0.24), (5, 0.04))
    small_share: float = 0.15
    deep_share: float = 0.2
    whole_share: float = 0.05
    quotient_share: float = 0.0

    def __post_init__(self):
        check_sizes(self.sizes, MAX_LISTED)
        check_shares(self, ("small_share", "deep_share", "whole_share", "quotient_share"))
        if self.num_states < 1:
            raise ValueError(f"num_states must be >= 1, got {self.num_states}")
        if self.deep_share + self.whole_share > 1:
            raise ValueError(
                f"deep_share={self.deep_share} and whole_share={self.whole_share}: their sum is "
                "at most 1"
            )


def make_states(mix: StateMix, number: int) -> StateBatch:
    """One batch; a pure function of its arguments."""
    rng = np.random.default_rng([mix.seed, 6, number])
    counts = rng.multinomial(mix.num_states, [share for _, share in mix.sizes])
    parts = [
        _draw_states(mix, rng, size, int(count))
        for (size, _), count in zip(mix.sizes, counts, strict=True)
    ]
    width = max(size for size, _ in mix.sizes)
    items = [
        np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in parts
    ]
    goals = [label_goals(part, NUM_GOALS) for part in parts]
    order = rng.permutation(mix.num_states)
    return StateBatch(np.concatenate(items)[order].astype(np.int32), np.concatenate(goals)[order])


def make_asked(mix: StateMix, num_asked: int, number: int) -> AskedBatch:
    """The batch of this number, asked about so many goals of each state, drawn without replacement.

    Half of them are goals that the state reaches: those are few, and tell more.
    """
    batch = make_states(mix, number)
    order = np.random.default_rng([mix.seed, 7, number]).random(batch.goals.shape)
    half = num_asked // 2
    parts = [draw_asked(batch.goals, order, 1, half)]
    parts.append(draw_asked(batch.goals, order, -1, num_asked - half))
    goals, labels, weights = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    return AskedBatch(batch.items, goals, labels, weights)


def draw_asked(
    goals: np.ndarray, order: np.ndarray, label: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Goals [R, count] of `label` that come first by `order`, their labels and weights."""
    drawn = np.argsort(np.where(goals == label, order, 2.0), axis=1)[:, :count]
    there = (goals == label).sum(axis=1, keepdims=True)
    weights = there / np.clip(there, 1, count) * (np.arange(count) < there)
    labels = np.full(drawn.shape, label > 0, np.float32)
    return drawn.astype(np.int32), labels, weights.astype(np.float32)


def list_problems(batch: StateBatch) -> list[tuple[int, ...]]:
    """All that a batch teaches of, each a target and sorted numbers (`countdown.problem_key`)."""
    return [
        (int(goal), *sorted(number for number in items if number >= 0))
        for items, goals in zip(batch.items.tolist(), batch.goals, strict=True)
        for goal in np.flatnonzero(goals)
    ]


def _draw_states(mix: StateMix, rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """States [count, size], sorted rows, behind as many moves as the mix says."""
    small = rng.random(count) < mix.small_share
    highest = np.where(small, PUZZLE_24_NUMBER, MAX_NUMBER)
    depth = 1 - (rng.random(count) < mix.whole_share).astype(int)
    depth += (depth == 1) & (rng.random(count) < mix.deep_share)
    states = np.zeros((count, size), np.int64)
    for moves in np.unique(depth):
        rows = np.flatnonzero(depth == moves)
        part = rng.integers(1, highest[rows, None] + 1, (len(rows), size + moves))
        part.sort(axis=1)
        for _ in range(moves):
            part = draw_moves(rng, part)
        states[rows] = part
    for row in np.flatnonzero(rng.random(count) < mix.quotient_share):
        states[row] = _draw_quotient(rng, size)
    return states


def _draw_quotient(rng: np.random.Generator, size: int) -> list[int]:
    """A state on the way from a * b / c or (a * b + d) / c, which come out even, d of any sign.

    It stands before the product, behind it or behind the sum, among other numbers that fill it up.
    """
    while True:
        first, second, divisor = rng.integers(2, MAX_NUMBER + 1, 3).tolist()
        product = first * second
        summand = -product % divisor - divisor * int(rng.integers(2))
        if rng.random() < 0.5:
            summand = 0
            divisor = int(rng.choice([d for d in range(2, MAX_NUMBER + 1) if product % d == 0]))
        total = product + summand
        others = [divisor, abs(summand)] if summand else [divisor]
        ways = [[first, second, *others], [product, *others], [total, divisor]]
        ways = [way for way in ways if len(way) <= size]
        if product >= _LEAST_PRODUCT and total % divisor == 0 and total <= _MAX_QUOTIENT * divisor:
            way = ways[int(rng.integers(len(ways)))]
            return sorted(way + rng.integers(1, MAX_NUMBER + 1, size - len(way)).tolist())
