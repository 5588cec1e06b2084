"""Lines of Countdown that begin at random, to learn how they end, and not to write them twice.

The one idea: a line is a choice and what follows from it. Solutions, and walks around them, teach
both for the lines that solutions are made of; what a search tries when these are used up they
hardly show, and a network gets it wrong. Here the choices are drawn. What may be taught of them is
that a chain which came back tries something else.
"""

from collections.abc import Sequence

import numpy as np

from rlm_jax.tasks.countdown import write_return, write_state
from rlm_jax.tasks.countdown_solver import list_moves
from rlm_jax.tasks.countdown_split import is_held_out, is_held_out_state
from rlm_jax.tasks.countdown_walks import (
    draw_index,
    list_choices,
    write_consequence,
    write_opening,
)
from rlm_jax.tasks.demonstrations import Demonstration, Step

MAX_RESULT = 9_999
MAX_LINES = 6
MAX_TRIES = 12
_RETURN_SHARE = 0.4


def demonstrate_lines(
    rng: np.random.Generator, numbers: np.ndarray, targets: np.ndarray
) -> list[Demonstration]:
    """No more than how lines end that begin at random: what follows from a move, and what stands
    in a state to go back to. No line is taught to be chosen, and no state is judged.

    Walks hardly make large numbers, since solutions hardly do, and go back where the solver would.
    Here a move is the likelier the larger its result, up to `MAX_RESULT`, and a line goes back to
    any state that was left: a search, or a chain that has used up its likelier lines, has to get
    these right as well.

    Args:
      numbers, targets: problems of two numbers or more, as in `demonstrate`.
    """
    demonstrations = []
    clean = ~is_held_out(numbers, targets)
    for start, target in zip(numbers[clean], targets[clean].tolist(), strict=True):
        path, steps, seen = [start], [], [start]
        while len(seen) <= MAX_LINES:
            if len(path) > 1 and (len(path[-1]) == 1 or rng.random() < _RETURN_SHARE):
                at = int(rng.integers(len(path) - 1))
                steps += _write_return_from(path, at)
                path = path[: at + 1]
            else:
                moves = list_moves(path[-1][None])
                weight = moves.legal[0] * (moves.result[0] <= MAX_RESULT) * (1 + moves.result[0])
                move = draw_index(rng, weight / (101 + moves.result[0]))
                state = moves.states[0, move]
                if state.tolist() == [target]:
                    break  # It would end the chain: this line is taught elsewhere.
                steps += write_consequence(moves, 0, move)
                path.append(state)
            seen.append(path[-1])
        if not any(is_held_out_state(state[None], np.array([target]))[0] for state in seen):
            prompt = write_state(target, start) + "\n"
            demonstrations.append(Demonstration(prompt, tuple(steps), False, None))
    return demonstrations


def demonstrate_tries(
    rng: np.random.Generator, numbers: np.ndarray, targets: np.ndarray
) -> list[Demonstration]:
    """Every move of a problem that has no solution, once each and in any order, up to `MAX_TRIES`.

    Nothing is right there but what was not tried yet. So a network learns to look up, in its own
    text, which lines it has written from a state: walks of problems that can be solved say the same
    (no line that failed is ever right), too seldom to be learned from. When to go back they do not
    teach: behind every line, as here, would be too soon (`return_weight` of `demonstrate`).

    Args:
      numbers, targets: unsolvable problems of two numbers or more, as in `demonstrate`.
    """
    moves = list_moves(numbers)
    weights = moves.legal * (moves.result <= MAX_RESULT) / (1 + moves.result / 100)
    demonstrations = []
    for row, (state, target) in enumerate(zip(numbers, targets.tolist(), strict=True)):
        left = weights[row]
        back = write_return(state)
        steps: list[Step] = []
        for _ in range(min(MAX_TRIES, np.count_nonzero(left))):
            choices = list_choices(write_opening, moves, row, left)
            move = draw_index(rng, left)
            opening, rest = write_consequence(moves, row, move)
            steps += [opening._replace(choices=choices), rest._replace(value=0.0)]
            steps.append(Step(back, ((back, 1.0),), 0.0, weight=0.0))
            left[move] = 0.0
        prompt = write_state(target, state) + "\n"
        demonstrations.append(Demonstration(prompt, tuple(steps), False, None))
    return demonstrations


def _write_return_from(path: Sequence[np.ndarray], at: int) -> list[Step]:
    """The line from the end of `path` back to `path[at]`, to be learned from where it is the only
    way to go on."""
    state = path[at].tolist()
    others = {tuple(other.tolist()) for other in path[:-1]} - {tuple(state)}
    told = len(state)
    while told > 1 and all(other[: told - 1] != (*state[: told - 1],) for other in others):
        told -= 1
    first, rest = state[:told], state[told:]
    if not rest:
        return [Step(write_return(state), (), None)]
    text = " ".join(map(str, rest)) + "\n"
    return [Step(write_return(first)[:-1], (), None), Step(text, ((text, 1.0),), None)]
