"""The test sets: fixed for good, held out, solvable, of the sizes that are reported."""

import hashlib
import json

import numpy as np
import pytest

from rlm_jax.data.splits import SPLITS, load_split
from rlm_jax.tasks import countdown
from rlm_jax.tasks.base import Gold
from rlm_jax.tasks.countdown_solver import count_solutions
from rlm_jax.tasks.countdown_split import (
    is_held_out,
    is_held_out_input,
    is_held_out_puzzle,
    is_held_out_target,
)

# Published figures are of these very problems: another set of them needs another name.
DIGESTS = {
    "countdown4-inputs": (1000, "5602249b1dc7c931"),
    "countdown4-targets": (1000, "c08783f99cd89729"),
    "countdown5": (500, "3b2f016e31949557"),
    "countdown6": (500, "a383123a18f0081d"),
    "game24": (100, "0c2a4e4e6d0b533f"),
}


def read_split(name):
    """Sorted numbers [R, n] and targets [R]."""
    split = load_split(name)
    data = [p.data if split.task == "countdown" else (p.data, 24) for p, _ in split.examples]
    return np.array([sorted(row) for row, _ in data]), np.array([target for _, target in data])


@pytest.mark.parametrize("name", SPLITS)
def test_splits_are_fixed_and_held_out(name):
    split = load_split(name)
    data = json.dumps([problem.data for problem, _ in split.examples])
    digest = hashlib.sha256(data.encode()).hexdigest()[:16]
    assert (len(split.examples), digest) == DIGESTS[name]
    assert len({problem.id for problem, _ in split.examples}) == len(split.examples)
    assert all(gold == Gold() for _, gold in split.examples)
    numbers, targets = read_split(name)
    assert is_held_out(numbers, targets).all()
    if name == "game24":
        assert is_held_out_puzzle(numbers, targets).all()
    elif name == "countdown4-targets":
        assert is_held_out_target(targets).all()
        assert not is_held_out_input(numbers).any()
    else:
        assert is_held_out_input(numbers).all()
        assert not is_held_out_target(targets).any()


@pytest.mark.parametrize(("name", "count"), [("countdown5", 40), ("countdown6", 2)])
def test_problems_of_many_numbers_are_solvable(name, count):
    """By the solver that counts; the draw trusts one that stops at the first solution."""
    numbers, targets = read_split(name)
    assert numbers.shape[1] == int(name[-1])
    assert (numbers.min(), numbers.max()) >= (1, 90)
    assert (count_solutions(numbers[-count:], targets[-count:]) > 0).all()


def test_a_split_is_what_the_task_draws():
    """Problem for problem, though the task counts all solutions."""
    targets = np.arange(countdown.TARGETS[0], countdown.TARGETS[1] + 1)
    numbers, wanted = countdown.draw_solvable(
        np.random.default_rng([20_240_403, SPLITS.index("countdown5")]),
        500,
        5,
        targets[~is_held_out_target(targets)],
        admit_fn=lambda numbers, _: is_held_out_input(numbers),
    )
    found, found_targets = read_split("countdown5")
    assert (found == numbers).all()
    assert (found_targets == wanted).all()


def test_unknown_splits_are_named():
    with pytest.raises(ValueError, match="'gsm'"):
        load_split("gsm")
