"""Walks through the states of a Countdown problem, and what is right wherever they stand.

The one idea: the exact solver says at each state which moves keep the problem solvable; behind a
wrong one the only right line takes it back. So a walk that errs teaches what to try, to see that a
state is lost (as the next line, and as its value), and to try something else. Whose walk it is, the
solver's (`countdown_demos`) or a network's (`countdown_corrections`), makes no difference here.

And it says of every state which other targets it could still be made (`Step.goals`): whether three
numbers make 24 is one bit, what they make is a hundred, and costs a network no more to read.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rlm_jax.tasks.countdown import write_return, write_state
from rlm_jax.tasks.countdown_solvable import find_reachable
from rlm_jax.tasks.countdown_solver import OPERATORS, Moves, count_below
from rlm_jax.tasks.countdown_split import held_out_goals
from rlm_jax.tasks.demonstrations import Demonstration, Step

# States of more numbers make too much to list.
MAX_LISTED = 5


@dataclasses.dataclass(eq=False)
class Visit:
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
class Walk:
    """path: the states from the problem to where the walk stands; num_wrong: errors so far.

    states: what is left behind each step, None in the midst of a line. return_weight: of the choice
    to go back. keep_share: see `correct_walks`.
    """

    path: list[Visit]
    steps: list[Step]
    return_weight: float
    keep_share: float = 0.0
    num_wrong: int = 0
    solved: bool = False
    states: list[np.ndarray | None] = dataclasses.field(default_factory=list)

    def add(self, step: Step, state: np.ndarray | None) -> None:
        self.steps.append(step)
        self.states.append(state)


def visit_states(
    arrived: dict[int, np.ndarray], targets: np.ndarray, sharpness: float
) -> dict[int, Visit]:
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
            visits[index] = Visit(moves, row, states[row], right[row], wrong[row], tried)
    return visits


def take_right(walk: Walk, move: int) -> np.ndarray | None:
    """Makes a right move; the state that it leads to, None behind the last."""
    here = walk.path[-1]
    state = here.moves.states[here.row, move]
    walk.add(Step(write_move(here.moves, here.row, move), here.choices, 1.0), state)
    walk.solved = len(here.state) == 2
    return None if walk.solved else state


def take_wrong(walk: Walk, move: int) -> np.ndarray:
    """Makes a move that is not right; the state that it leads to."""
    here = walk.path[-1]
    opening, rest = write_consequence(here.moves, here.row, move)
    choices, weight = label_choice(walk, "" if here.tried[move] else opening.text)
    state = here.moves.states[here.row, move]
    walk.add(opening._replace(choices=choices, weight=weight), None)
    walk.add(rest._replace(value=0.0), state)
    return state


def take_back(walk: Walk) -> None:
    """Goes back to the last state that can be solved."""
    while walk.path[-1].lost:
        walk.path.pop()
    state = walk.path[-1].state
    back = write_return(state)
    walk.add(Step(back, ((back, 1.0),), 1.0, walk.return_weight), state)


def label_choice(
    walk: Walk, own: str = "", missed: bool = False
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


def tell_walks(
    walks: Sequence[Walk],
    numbers: np.ndarray,
    targets: np.ndarray,
    clean: np.ndarray,
    num_goals: int,
) -> list[Demonstration]:
    """The walks that may be learned from."""
    kept = np.flatnonzero(clean).tolist()
    states = [state for i in kept for state in (numbers[i], *walks[i].states)]
    goals = iter(list_goals(states, num_goals))
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


def list_goals(states: Sequence[np.ndarray | None], num_goals: int) -> list[np.ndarray | None]:
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


def _write_rest(moves: Moves, row: int, move: int) -> str:
    state = moves.states[row, move]
    line = f"= {moves.result[row, move]}"
    return line if len(state) == 1 else f"{line} ; {' '.join(map(str, state.tolist()))}\n"
