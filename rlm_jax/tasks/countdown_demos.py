"""Demonstrations of Countdown, with every right line and the exact state of affairs at each step.

The one idea: a demonstration is a walk through the states of a problem (`countdown_walks`) that
errs now and then on purpose, and goes back.
"""

import numpy as np

from rlm_jax.tasks.countdown import write_state
from rlm_jax.tasks.countdown_solvable import is_solvable
from rlm_jax.tasks.countdown_solver import count_below, list_moves
from rlm_jax.tasks.countdown_split import is_held_out, is_held_out_state
from rlm_jax.tasks.countdown_walks import (
    Walk,
    draw_index,
    list_choices,
    list_goals,
    take_back,
    take_right,
    take_wrong,
    tell_walks,
    visit_states,
    weigh_moves,
    write_opening,
)
from rlm_jax.tasks.demonstrations import Demonstration, Step


def demonstrate(
    rng: np.random.Generator,
    numbers: np.ndarray,
    targets: np.ndarray,
    *,
    wrong_share: float,
    sharpness: float,
    stray_share: float = 0.0,
    max_wrong: int = 4,
    return_weight: float = 1.0,
    num_goals: int = 0,
) -> list[Demonstration]:
    """One demonstration of each solvable problem: numbers [R, n], sorted, and targets [R].

    A wrong last line says what it makes, and is taken back: a chain that never missed would learn
    to write the target, whatever its numbers make.

    Problems on whose way a held-out problem stands are left out (`countdown_split`).

    Args:
      wrong_share: chance of a wrong move at each step but the last, where there is one. No walk
        tries the same wrong move of a state twice; moves to small numbers are likelier.
      sharpness: a right move weighs its number of solutions to this power; 0 weighs all the same.
      stray_share: chance that a walk goes on from a lost state before it goes back, or that its
        last line misses.
      max_wrong: a walk ends, unfinished, when it goes back after so many moves that were wrong or
        led on from a lost state. So the number of errors tells nothing about the next move.
      return_weight: what the choice to go back counts for. The solver goes back from every lost
        state at once; who cannot tell lost from solvable has to try a move or two before, and at
        weight 1 learns not to, wherever a state is likelier lost than not.
      num_goals: every state of at most five numbers says which targets below this one it makes.
    """
    walks = [Walk([], [], return_weight) for _ in numbers]
    clean = ~is_held_out(numbers, targets)
    # Where each unfinished walk has arrived: states that no solver has looked at yet.
    arrived = dict(enumerate(numbers)) if numbers.shape[1] > 1 else {}
    while arrived:
        visits = visit_states(arrived, targets, sharpness)
        arrived = {}
        for index, visit in visits.items():
            walks[index].path.append(visit)
            state = _go_on(rng, walks[index], wrong_share, stray_share, max_wrong)
            if state is not None:
                arrived[index] = state
        for index, state in arrived.items():
            if is_held_out_state(state[None], targets[index : index + 1])[0]:
                clean[index] = False
    return tell_walks(walks, numbers, targets, clean, num_goals)


def demonstrate_openings(
    rng: np.random.Generator,
    numbers: np.ndarray,
    targets: np.ndarray,
    *,
    sharpness: float,
    num_goals: int = 0,
) -> list[Demonstration]:
    """As `demonstrate`, but no more than which two numbers the first line combines, and how.

    That choice is the hard part of a solution and a third of its first line's tokens.
    """
    clean = ~is_held_out(numbers, targets)
    numbers, targets = numbers[clean], targets[clean]
    moves, below = count_below(numbers, targets)
    weight = weigh_moves(below, sharpness)
    demonstrations = []
    goals = list_goals(list(numbers), num_goals)
    for row, (state, target) in enumerate(zip(numbers, targets.tolist(), strict=True)):
        choices = list_choices(write_opening, moves, row, weight[row])
        step = Step(write_opening(moves, row, draw_index(rng, weight[row])), choices, None)
        demonstrations.append(
            Demonstration(write_state(target, state) + "\n", (step,), False, None, goals[row])
        )
    return demonstrations


def demonstrate_states(
    rng: np.random.Generator, numbers: np.ndarray, targets: np.ndarray, *, num_goals: int = 0
) -> list[Demonstration]:
    """No more than what a state is worth, behind one move from each problem, right or wrong.

    Args:
      numbers, targets: problems of three numbers or more, as in `demonstrate`.
    """
    states = draw_moves(rng, numbers)
    clean = ~(is_held_out(numbers, targets) | is_held_out(states, targets))
    states, targets = states[clean], targets[clean]
    values = is_solvable(states, targets)
    goals = list_goals(list(states), num_goals)
    return [
        Demonstration(write_state(target, state) + "\n", (), False, float(value), signs)
        for target, state, value, signs in zip(targets.tolist(), states, values, goals, strict=True)
    ]


def draw_moves(rng: np.random.Generator, states: np.ndarray) -> np.ndarray:
    """The states behind a legal move from each, right or wrong, smaller results the likelier.

    Args:
      states: [R, n], sorted rows of two numbers or more; -> [R, n - 1].
    """
    moves = list_moves(states)
    weight = np.cumsum(moves.legal / (1 + moves.result / 100), axis=1)
    drawn = rng.random((len(states), 1)) * weight[:, -1:]
    return moves.states[np.arange(len(states)), (weight <= drawn).sum(axis=1)]


def _go_on(
    rng: np.random.Generator, walk: Walk, wrong_share: float, stray_share: float, max_wrong: int
) -> np.ndarray | None:
    """Walks until it comes to a state to ask about, or ends."""
    while True:
        here = walk.path[-1]
        share = stray_share if here.lost or len(here.state) == 2 else wrong_share
        if here.wrong.any() and rng.random() < share:
            move = draw_index(rng, here.wrong)
            here.wrong[move] = 0.0
            walk.num_wrong += 1
            state = take_wrong(walk, move)
            if len(state) > 1:
                return state
        elif not here.lost:
            return take_right(walk, draw_index(rng, here.right))
        take_back(walk)
        if walk.num_wrong >= max_wrong:
            return None
