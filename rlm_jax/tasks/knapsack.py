"""Knapsack as a decision: can some of the items reach a value? (x1's synthetic domain; B11)

    Items (weight, value): (3, 4), (5, 7), (2, 3). Can some of them, each at most once, weigh at
    most 7 in total and be worth at least 10?
        ->      Weight 5 + 2 = 7 and value 7 + 3 = 10.
                #### True

Difficulty d in [0, 1] sets the number of items, 3 + int(27 d), and how close the value asked for
comes to the best that can be reached: within half of it at d = 0, within a twentieth at d = 1.
Weights and values are drawn from 1 to 20, the limit from n*20/4 to 3n*20/4; half of the answers
are True.

Not self-verifying, though the exact solver decides it from the problem alone: of two answers one
is right, so a search that may ask has been told. Levels: -1 no answer, 0 wrong, 2 right.
"""

from collections.abc import Sequence

import numpy as np

from rlm_jax.tasks.base import Example, Gold, Message, Problem, Task, make_chat
from rlm_jax.tasks.dial import check_dial
from rlm_jax.tasks.truth import extract_truth, verify_truth

MAX_SIZE = 20

Item = tuple[int, int]
"""Weight and value."""

INSTRUCTION = (
    "You decide whether a choice of items exists. Try one choice per line. "
    'Finish with the line "#### True" or "#### False".'
)
EXAMPLE = (
    "Items (weight, value): (3, 4), (5, 7), (2, 3). Can some of them, each at most once, "
    "weigh at most 7 in total and be worth at least 10?",
    "(5, 7) and (3, 4) weigh 5 + 3 = 8, over 7.\n"
    "(5, 7) and (2, 3) weigh 5 + 2 = 7 and are worth 7 + 3 = 10.\n"
    "#### True",
)


def prompt(problem: Problem) -> list[Message]:
    """One worked example, then the items."""
    return make_chat(INSTRUCTION, EXAMPLE, problem.question)


def make_problem(items: Sequence[Item], limit: int, target: int, id: str = "") -> Problem:
    """The question; `data` is (limit, target, items)."""
    listed = ", ".join(f"({weight}, {value})" for weight, value in items)
    question = (
        f"Items (weight, value): {listed}. Can some of them, each at most once, "
        f"weigh at most {limit} in total and be worth at least {target}?"
    )
    return Problem(question, (limit, target, *map(tuple, items)), id)


def solve(items: Sequence[Item], limit: int) -> tuple[int, tuple[int, ...]]:
    """The greatest value within `limit` and the positions of items that reach it. Exact.

    Raises:
      ValueError: a weight below 1.
    """
    if any(weight < 1 for weight, _ in items):
        raise ValueError(f"weights must be >= 1, not {[weight for weight, _ in items]}")
    # best[w]: the greatest value of weight at most w, with the items that make it.
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())] * (max(limit, 0) + 1)
    for i, (weight, value) in enumerate(items):
        for room in range(len(best) - 1, weight - 1, -1):
            reached, chosen = best[room - weight]
            if reached + value > best[room][0]:
                best[room] = (reached + value, (*chosen, i))
    return best[-1]


def generate(seed: int, num_problems: int, difficulty: float) -> list[Example]:
    """Makes `num_problems` decisions, half of them True.

    Raises:
      ValueError: difficulty outside [0, 1], or a negative seed or number of problems.
    """
    check_dial(seed, num_problems, difficulty)
    num_items = 3 + int(27 * difficulty)
    examples = []
    for i in range(num_problems):
        rng = np.random.default_rng([seed, i])
        sizes = rng.integers(1, MAX_SIZE + 1, (num_items, 2)).tolist()
        items = [(weight, value) for weight, value in sizes]
        limit = int(rng.integers(num_items * 5, num_items * 15 + 1))
        optimum, _ = solve(items, limit)
        # The gap to the optimum shrinks from a half to a twentieth of it.
        widest = max(1, int(optimum * (0.5 - 0.45 * difficulty)))
        gap = int(rng.integers(0, widest))
        reachable = bool(rng.integers(2))
        target = optimum - gap if reachable else optimum + 1 + gap
        problem = make_problem(items, limit, target, f"knapsack-{difficulty:g}-{seed}-{i}")
        examples.append((problem, Gold(str(reachable))))
    return examples


TASK = Task("knapsack", 1, False, prompt, extract_truth, verify_truth, generate=generate)
