"""Chains of Countdown that a network wrote, corrected line by line by the exact solver (DAgger).

The one idea: a chain is a walk as any other (`countdown_walks`), but its errors are the network's
own, and so are the tries behind each state that the labels depend on.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlm_jax.tasks.countdown import Line, Traced, trace_lines, write_return
from rlm_jax.tasks.countdown_solver import OPERATORS, Moves
from rlm_jax.tasks.countdown_split import is_held_out, is_held_out_state
from rlm_jax.tasks.countdown_walks import (
    Visit,
    Walk,
    draw_index,
    label_choice,
    take_back,
    take_right,
    take_wrong,
    tell_walks,
    visit_states,
)
from rlm_jax.tasks.demonstrations import Demonstration, Step


def correct_walks(
    rng: np.random.Generator,
    numbers: np.ndarray,
    targets: np.ndarray,
    chains: Sequence[str],
    *,
    sharpness: float,
    return_weight: float = 1.0,
    keep_share: float = 0.0,
    may_err: bool = False,
    num_goals: int = 0,
) -> list[Demonstration]:
    """What the solver says to chains that a network wrote (DAgger, Ross et al., arXiv 1011.0686).

    In a walk of `demonstrate` the wrong moves are drawn; here they are the network's own, so it
    learns for the states, and with the tries behind it, that it will meet when it is asked. Lines
    are labelled as there, and where a chain ends without a solution one right line is added.
    Problems are left out as there.

    A right line that a chain has written, and gone back behind, is not right once more: a network
    that gave up there would do so again, and nothing would tell it to try something else.

    Args:
      numbers, targets: solvable problems, as in `demonstrate`. chains: lines of each, as written.
      keep_share: where nothing is right but to go back, what the chain itself did, if it did
        nothing twice, has so much of the label, against the way back with what remains of
        `return_weight`. So a network takes over by what rule its chains were decoded.
      may_err: a line that does not follow, but says what it leaves, leads to a state in which
        nothing is right but to go back; else it ends the chain.
    """
    walks = [Walk([], [], return_weight, keep_share) for _ in numbers]
    taken = [
        _follow_chain(row.tolist(), chain, may_err)
        for row, chain in zip(numbers, chains, strict=True)
    ]
    clean = ~is_held_out(numbers, targets)
    visits = _visit_chains(numbers, targets, taken, sharpness)
    for index, (walk, lines) in enumerate(zip(walks, taken, strict=True)):
        known = visits[index]
        walk.path.append(known[_name_start(numbers[index])])
        missed = False
        for taken_line in lines:
            _take_line(walk, taken_line, known.get(_name_state(taken_line)), missed)
            missed = len(taken_line.path[-1]) == 1
        if walk.path[-1].lost or (missed and not walk.solved):
            take_back(walk)
        elif not walk.solved and (untried := walk.path[-1].untried).any():
            take_right(walk, draw_index(rng, untried))
        target = targets[index : index + 1]
        clean[index] &= not any(is_held_out_state(np.array([s]), target)[0] for s, _ in known)
    return tell_walks(walks, numbers, targets, clean, num_goals)


def _follow_chain(state: list[int], chain: str, may_err: bool) -> list[Traced]:
    """The lines of a chain up to the first that nothing goes on from."""
    taken = []
    for found in trace_lines(state, chain):
        if found.line is None or not (found.follows or may_err):
            break
        taken.append(found)
    return taken


def _name_start(state: np.ndarray) -> tuple[tuple[int, ...], bool]:
    return tuple(state.tolist()), True


def _name_state(found: Traced) -> tuple[tuple[int, ...], bool]:
    """The state behind a line, and whether it follows from the problem."""
    return tuple(found.path[-1]), found.num_sound == len(found.path)


def _visit_chains(
    numbers: np.ndarray,
    targets: np.ndarray,
    taken: Sequence[Sequence[Traced]],
    sharpness: float,
) -> list[dict[tuple[tuple[int, ...], bool], Visit]]:
    """Of each chain, what the solver says of its states of two numbers or more.

    In a state that does not follow from the problem nothing is right.
    """
    keys = [
        (index, name)
        for index, lines in enumerate(taken)
        for name in {_name_start(numbers[index]), *map(_name_state, lines)}
        if len(name[0]) > 1
    ]
    wanted = targets[[index for index, _ in keys]]
    states = {at: np.array(state) for at, (_, (state, _)) in enumerate(keys)}
    visits = visit_states(states, wanted, sharpness)
    found: list[dict[tuple[tuple[int, ...], bool], Visit]] = [{} for _ in numbers]
    for at, (index, (state, is_sound)) in enumerate(keys):
        visit = visits[at]
        if not is_sound:
            visit = dataclasses.replace(visit, right=np.zeros_like(visit.right))
        found[index][state, is_sound] = visit
    return found


def _take_line(walk: Walk, found: Traced, arrived: Visit | None, missed: bool) -> None:
    """Labels a line that was written, and goes where it leads.

    arrived: None for a state of one number. missed: see `label_choice`.
    """
    here, line = walk.path[-1], found.line
    assert line is not None
    if line.sign and found.follows:
        move = _find_move(here.moves, here.row, line)
        (take_right if here.right[move] > 0 else take_wrong)(walk, move)
        here.note_try(move)
    elif line.sign:
        choices, weight = label_choice(walk)
        walk.add(Step(f"{found.text}\n", choices, 0.0, weight), np.array(found.path[-1]))
    if line.sign:
        walk.path += [] if arrived is None else [arrived]
        return
    assert arrived is not None
    text = write_return(arrived.state)
    choices, weight = label_choice(walk, text, missed)
    walk.add(Step(text, choices, 0.0 if arrived.lost else 1.0, weight), arrived.state)
    walk.path = walk.path[: walk.path.index(arrived) + 1]


def _find_move(moves: Moves, row: int, line: Line) -> int:
    ends = max(line.left, line.right), min(line.left, line.right), OPERATORS.index(line.sign)
    written = (moves.larger[row], moves.smaller[row], moves.operator[row])
    same = np.logical_and.reduce([all_of == one for all_of, one in zip(written, ends, strict=True)])
    return int(np.flatnonzero(same & moves.legal[row])[0])
