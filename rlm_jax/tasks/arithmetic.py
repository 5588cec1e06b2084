"""Arithmetic: generated expressions over whole numbers, with a difficulty dial.

The one idea: a random expression tree is evaluated while it grows, and an operator is only drawn
where its result is a whole number (and a product is at most `MAX_PRODUCT`), so the gold answer is
exact by construction. Difficulty in [0, 1] sets the number of operations (1 to 8) and the largest
operand (9 to 999). Problem i of a seed is the same whatever the number of problems.

Not self-verifying: checking an answer from the problem alone would be solving it.
"""

import operator
from typing import NamedTuple

import numpy as np

from rlm_jax.tasks import gsm8k
from rlm_jax.tasks.answers import extract_number
from rlm_jax.tasks.base import Example, Gold, Message, Problem, Task, make_chat

MAX_OPERATIONS = 8
MAX_PRODUCT = 10**6

INSTRUCTION = (
    "You compute arithmetic expressions. Write one calculation per line. "
    'Finish with the line "#### " followed by the final number.'
)
EXAMPLE = ("Compute (3 + 4) * 2 - 5.", "3 + 4 = 7\n7 * 2 = 14\n14 - 5 = 9\n#### 9")

_OPERATIONS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


class _Term(NamedTuple):
    text: str
    value: int
    precedence: int


def prompt(problem: Problem) -> list[Message]:
    """One worked example, then the expression."""
    return make_chat(INSTRUCTION, EXAMPLE, problem.question)


def generate(seed: int, num_problems: int, difficulty: float) -> list[Example]:
    """Makes `num_problems` examples at `difficulty`.

    Raises:
      ValueError: difficulty outside [0, 1], or a negative seed or number of problems.
    """
    if not 0.0 <= difficulty <= 1.0:
        raise ValueError(f"difficulty must be in [0, 1], not {difficulty}")
    if seed < 0 or num_problems < 0:
        raise ValueError(f"seed and num_problems must be >= 0, not {seed} and {num_problems}")
    num_operations = 1 + round(difficulty * (MAX_OPERATIONS - 1))
    max_operand = round(10 ** (1 + 2 * difficulty)) - 1
    examples = []
    for i in range(num_problems):
        rng = np.random.default_rng([seed, i])
        term = _make_term(rng, num_operations, max_operand)
        name = f"arithmetic-{difficulty:g}-{seed}-{i}"
        problem = Problem(f"Compute {term.text}.", (term.text,), name)
        examples.append((problem, Gold(str(term.value))))
    return examples


def _make_term(rng: np.random.Generator, num_operations: int, max_operand: int) -> _Term:
    if num_operations == 0:
        value = int(rng.integers(1, max_operand + 1))
        return _Term(str(value), value, 3)
    split = int(rng.integers(num_operations))
    left = _make_term(rng, split, max_operand)
    right = _make_term(rng, num_operations - 1 - split, max_operand)
    signs = ["+", "-"]
    if abs(left.value * right.value) <= MAX_PRODUCT:
        signs.append("*")
    if right.value and left.value % right.value == 0:
        signs.append("/")
    return _join(left, signs[rng.integers(len(signs))], right)


def _join(left: _Term, sign: str, right: _Term) -> _Term:
    precedence = _PRECEDENCE[sign]
    left_text = f"({left.text})" if left.precedence < precedence else left.text
    # Minus and division lean left: a - (b - c) needs its brackets though precedences are equal.
    tight = precedence if sign in "+*" else precedence + 1
    right_text = f"({right.text})" if right.precedence < tight else right.text
    value = _OPERATIONS[sign](left.value, right.value)
    return _Term(f"{left_text} {sign} {right_text}", value, precedence)


TASK = Task("arithmetic", 1, False, prompt, extract_number, gsm8k.verify, generate=generate)
