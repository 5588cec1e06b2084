"""Demonstrations of Countdown, with every right line and the exact state of affairs at each step.

The one idea: a demonstration is a walk through the states of a problem that errs now and then on
purpose, and goes back. The exact solver says at each state which moves keep the problem solvable;
behind a wrong one the only right line takes it back. So one walk teaches what to try, to see that
a state is lost (as the next line, and as its value), and to try something else.

And it says of every state which other targets it could still be made (`Step.goals`): whether three
numbers make 24 is one bit, what they make is a hundred, and costs a network no more to read.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rlm_jax.tasks.countdown import Line, Traced, trace_lines, write_return, write_state
from rlm_jax.tasks.countdown_solvable import find_reachable, is_solvable
from rlm_jax.tasks.countdown_solver import OPERATORS, Moves, count_below, list_moves
from rlm_jax.tasks.countdown_split import held_out_goals, is_held_out, is_held_out_state
from rlm_jax.tasks.demonstrations import Demonstration, Step

# States of more numbers make too much to list.
MAX_LISTED = 5


@dataclasses.dataclass(eq=False)
class _Visit:
    """A state on a walk: row `row` of `moves`.

    right: shares of the moves [A] that keep the problem solvable; all 0 in a lost state.
    wrong: weights of the others that were not tried yet. tried: moves that a chain has made, and
      others to the same states; one that it has left again is not right once more.
    """

    moves: Moves
    row: int
    state: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    tried: np.ndarray

    @property
    def untried(self) -> np.ndarray:
        return np.where(self.tried, 0.0, self.right)

    @property
    def choices(self) -> tuple[tuple[str, float], ...]:
        return list_choices(write_move, self.moves, self.row, self.untried)

    @property
    def lost(self) -> bool:
        return not self.right.any()

    def note_try(self, move: int) -> None:
        """Neither `move` nor another one to the same state is to be chosen once more."""
        states = self.moves.states[self.row]
        self.tried |= (states == states[move]).all(-1)


@dataclasses.dataclass
class _Walk:
    """path: the states from the problem to where the walk stands; num_wrong: errors so far.

    states: what is left behind each step, None in the midst of a line. return_weight: of the choice
    to go back. keep_share: see `correct_walks`.
    """

    path: list[_Visit]
    steps: list[Step]
    return_weight: float
    keep_share: float = 0.0
    num_wrong: int = 0
    solved: bool = False
    states: list[np.ndarray | None] = dataclasses.field(default_factory=list)

    def add(self, step: Step, state: np.ndarray | None) -> None:
        self.steps.append(step)
        self.states.append(state)


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
    walks = [_Walk([], [], return_weight) for _ in numbers]
    clean = ~is_held_out(numbers, targets)
    # Where each unfinished walk has arrived: states that no solver has looked at yet.
    arrived = dict(enumerate(numbers)) if numbers.shape[1] > 1 else {}
    while arrived:
        visits = _visit(arrived, targets, sharpness)
        arrived = {}
        for index, visit in visits.items():
            walks[index].path.append(visit)
            state = _go_on(rng, walks[index], wrong_share, stray_share, max_wrong)
            if state is not None:
                arrived[index] = state
        for index, state in arrived.items():
            if is_held_out_state(state[None], targets[index : index + 1])[0]:
                clean[index] = False
    return _tell(walks, numbers, targets, clean, num_goals)


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
    walks = [_Walk([], [], return_weight, keep_share) for _ in numbers]
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
            _take_back(walk)
        elif not walk.solved and (untried := walk.path[-1].untried).any():
            _take_right(walk, draw_index(rng, untried))
        target = targets[index : index + 1]
        clean[index] &= not any(is_held_out_state(np.array([s]), target)[0] for s, _ in known)
    return _tell(walks, numbers, targets, clean, num_goals)


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
    goals = _list_goals(list(numbers), num_goals)
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
    goals = _list_goals(list(states), num_goals)
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


def label_goals(states: np.ndarray, num_goals: int) -> np.ndarray:
    """`Step.goals` of states [R, n], sorted rows -> [R, G]; 0 of what is held out."""
    signs = np.where(find_reachable(states, num_goals - 1), 1, -1).astype(np.int8)
    signs[held_out_goals(states, num_goals - 1)] = 0
    return signs


def weigh_moves(below: np.ndarray, sharpness: float) -> np.ndarray:
    """Shares of the moves [R, A] in a demonstration, from the solutions behind each."""
    weight = np.where(below > 0, np.maximum(below, 1).astype(float) ** sharpness, 0.0)
    return weight / np.maximum(weight.sum(-1, keepdims=True), 1e-30)


def write_move(moves: Moves, row: int, move: int) -> str:
    """`10 - 4 = 6 ; 4 6 7` and a newline; the last move of a chain ends on its result."""
    return f"{write_opening(moves, row, move)} {_write_rest(moves, row, move)}"


def write_opening(moves: Moves, row: int, move: int) -> str:
    """`10 - 4`: the choice that a line is, without what follows from it."""
    sign = OPERATORS[moves.operator[row, move]]
    return f"{moves.larger[row, move]} {sign} {moves.smaller[row, move]}"


def list_choices(
    write: Callable[[Moves, int, int], str], moves: Moves, row: int, weights: np.ndarray
) -> tuple[tuple[str, float], ...]:
    """`Step.choices`: the moves of weight [A], as `write` writes them; none where none has any."""
    weighed = np.flatnonzero(weights).tolist()
    total = weights.sum()
    return tuple((write(moves, row, move), float(weights[move] / total)) for move in weighed)


def write_consequence(moves: Moves, row: int, move: int) -> tuple[Step, Step]:
    """A line of which not the choice, but what follows from it is to be learned."""
    opening = write_opening(moves, row, move)
    rest = _write_rest(moves, row, move).removesuffix("\n") + "\n"
    return Step(opening, (), None), Step(rest, ((rest, 1.0),), None)


def draw_index(rng: np.random.Generator, weights: np.ndarray) -> int:
    """An index of `weights` [A], in proportion to them."""
    total = np.cumsum(weights)
    return int((total <= rng.random() * total[-1]).sum())


def _tell(
    walks: Sequence[_Walk],
    numbers: np.ndarray,
    targets: np.ndarray,
    clean: np.ndarray,
    num_goals: int,
) -> list[Demonstration]:
    """The walks that may be learned from."""
    kept = np.flatnonzero(clean).tolist()
    states = [state for i in kept for state in (numbers[i], *walks[i].states)]
    goals = iter(_list_goals(states, num_goals))
    return [
        Demonstration(
            prompt=write_state(int(targets[i]), numbers[i]) + "\n",
            goals=next(goals),
            steps=tuple(step._replace(goals=next(goals)) for step in walks[i].steps),
            finished=walks[i].solved,
            value=None,
        )
        for i in kept
    ]


def _list_goals(states: Sequence[np.ndarray | None], num_goals: int) -> list[np.ndarray | None]:
    """`Step.goals` of each state; None where there is no state, or where it makes too much."""
    if not num_goals:
        return [None] * len(states)
    keys = [None if state is None else tuple(state.tolist()) for state in states]
    known: dict[tuple[int, ...], np.ndarray] = {}
    for size in range(1, MAX_LISTED + 1):
        distinct = sorted({key for key in keys if key is not None and len(key) == size})
        if distinct:
            known |= zip(distinct, label_goals(np.array(distinct), num_goals), strict=True)
    return [None if key is None else known.get(key) for key in keys]


def _visit(
    arrived: dict[int, np.ndarray], targets: np.ndarray, sharpness: float
) -> dict[int, _Visit]:
    """Asks the solver about states of several sizes, those of a size together."""
    visits = {}
    for size in sorted({len(state) for state in arrived.values()}):
        indices = [index for index, state in arrived.items() if len(state) == size]
        states = np.stack([arrived[index] for index in indices])
        moves, below = count_below(states, targets[indices])
        right = weigh_moves(below, sharpness)
        wrong = (moves.legal & (below == 0)) / (1 + moves.result / 100)
        for row, index in enumerate(indices):
            tried = np.zeros(right.shape[1], bool)
            visits[index] = _Visit(moves, row, states[row], right[row], wrong[row], tried)
    return visits


def _go_on(
    rng: np.random.Generator, walk: _Walk, wrong_share: float, stray_share: float, max_wrong: int
) -> np.ndarray | None:
    """Walks until it comes to a state to ask about, or ends."""
    while True:
        here = walk.path[-1]
        share = stray_share if here.lost or len(here.state) == 2 else wrong_share
        if here.wrong.any() and rng.random() < share:
            move = draw_index(rng, here.wrong)
            here.wrong[move] = 0.0
            walk.num_wrong += 1
            state = _take_wrong(walk, move)
            if len(state) > 1:
                return state
        elif not here.lost:
            return _take_right(walk, draw_index(rng, here.right))
        _take_back(walk)
        if walk.num_wrong >= max_wrong:
            return None


def _take_right(walk: _Walk, move: int) -> np.ndarray | None:
    """Makes a right move; the state that it leads to, None behind the last."""
    here = walk.path[-1]
    state = here.moves.states[here.row, move]
    walk.add(Step(write_move(here.moves, here.row, move), here.choices, 1.0), state)
    walk.solved = len(here.state) == 2
    return None if walk.solved else state


def _take_wrong(walk: _Walk, move: int) -> np.ndarray:
    """Makes a move that is not right; the state that it leads to."""
    here = walk.path[-1]
    opening, rest = write_consequence(here.moves, here.row, move)
    choices, weight = _label(walk, "" if here.tried[move] else opening.text)
    state = here.moves.states[here.row, move]
    walk.add(opening._replace(choices=choices, weight=weight), None)
    walk.add(rest._replace(value=0.0), state)
    return state


def _take_back(walk: _Walk) -> None:
    """Goes back to the last state that can be solved."""
    while walk.path[-1].lost:
        walk.path.pop()
    state = walk.path[-1].state
    back = write_return(state)
    walk.add(Step(back, ((back, 1.0),), 1.0, walk.return_weight), state)


def _label(
    walk: _Walk, own: str = "", missed: bool = False
) -> tuple[tuple[tuple[str, float], ...], float]:
    """The right lines where the walk stands, and what choosing one counts for.

    own: what was written there, if that may be kept. missed: the walk stands behind a last line
    that made another number than the target.
    """
    here = walk.path[-1]
    if not missed and here.untried.any():
        return here.choices, 1.0
    kept = walk.keep_share if own else 0.0
    weights = {own: kept}
    if missed or here.lost:
        alive = next(visit for visit in reversed(walk.path) if not visit.lost)
        back = write_return(alive.state)
        if own.startswith(":"):
            # It went back: that is kept, and the solver says where to.
            weights = {back: kept}
        weights[back] = weights.get(back, 0.0) + (1 - walk.keep_share) * walk.return_weight
    total = sum(weights.values())
    return tuple((text, part / total) for text, part in weights.items() if part), total


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
) -> list[dict[tuple[tuple[int, ...], bool], _Visit]]:
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
    visits = _visit(states, wanted, sharpness)
    found: list[dict[tuple[tuple[int, ...], bool], _Visit]] = [{} for _ in numbers]
    for at, (index, (state, is_sound)) in enumerate(keys):
        visit = visits[at]
        if not is_sound:
            visit = dataclasses.replace(visit, right=np.zeros_like(visit.right))
        found[index][state, is_sound] = visit
    return found


def _take_line(walk: _Walk, found: Traced, arrived: _Visit | None, missed: bool) -> None:
    """Labels a line that was written, and goes where it leads.

    arrived: None for a state of one number. missed: see `_label`.
    """
    here, line = walk.path[-1], found.line
    assert line is not None
    if line.sign and found.follows:
        move = _find_move(here.moves, here.row, line)
        (_take_right if here.right[move] > 0 else _take_wrong)(walk, move)
        here.note_try(move)
    elif line.sign:
        choices, weight = _label(walk)
        walk.add(Step(f"{found.text}\n", choices, 0.0, weight), np.array(found.path[-1]))
    if line.sign:
        walk.path += [] if arrived is None else [arrived]
        return
    assert arrived is not None
    text = write_return(arrived.state)
    choices, weight = _label(walk, text, missed)
    walk.add(Step(text, choices, 0.0 if arrived.lost else 1.0, weight), arrived.state)
    walk.path = walk.path[: walk.path.index(arrived) + 1]


def _find_move(moves: Moves, row: int, line: Line) -> int:
    ends = max(line.left, line.right), min(line.left, line.right), OPERATORS.index(line.sign)
    written = (moves.larger[row], moves.smaller[row], moves.operator[row])
    same = np.logical_and.reduce([all_of == one for all_of, one in zip(written, ends, strict=True)])
    return int(np.flatnonzero(same & moves.legal[row])[0])


def _write_rest(moves: Moves, row: int, move: int) -> str:
    state = moves.states[row, move]
    line = f"= {moves.result[row, move]}"
    return line if len(state) == 1 else f"{line} ; {' '.join(map(str, state.tolist()))}\n"
