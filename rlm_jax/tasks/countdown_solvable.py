"""Whether Countdown problems can be solved at all, without counting their solutions.

For one target the one idea is: an expression splits the numbers in two, so a target is met halfway.
What the smaller part can make says what the larger one has to make, and of at most four numbers
that is looked up among all that they make. The search ends with the first solution. Equal to
`countdown_solver.count_solutions(...) > 0`, a hundred times faster for six numbers. For all targets
at once every state on the way is made: microseconds for three numbers, milliseconds for five.
"""

import numpy as np

from rlm_jax.tasks.countdown_solver import MAX_NUMBER, count_solutions, list_moves

# Sets of that many numbers make some hundred values: those are listed.
_LISTED = 4
_CHUNK_ROWS = 1 << 15


def is_solvable(states: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Whether each state can be made its target: states [R, n], sorted rows, targets [R] -> [R]."""
    if states.shape[1] <= _LISTED:
        return count_solutions(states, targets) > 0
    problems = [
        (tuple(row), target)
        for row, target in zip(states.tolist(), np.asarray(targets).tolist(), strict=True)
    ]
    known = {problem: _Numbers(problem[0]).make(problem[1]) for problem in set(problems)}
    return np.array([known[problem] for problem in problems], bool)


def find_reachable(states: np.ndarray, highest: int) -> np.ndarray:
    """Which targets 0 to `highest` each state can be made: states [R, n], sorted rows -> [R, T]."""
    found = np.zeros((len(states), highest + 1), bool)
    _mark_reachable(states, np.arange(len(states)), found)
    return found


def _mark_reachable(states: np.ndarray, owners: np.ndarray, found: np.ndarray) -> None:
    """Marks in `found` what the states make, each in the row of its owner."""
    for start in range(0, len(states), _CHUNK_ROWS):
        part, rows = (array[start : start + _CHUNK_ROWS] for array in (states, owners))
        if part.shape[1] == 1:
            _mark(part[:, 0], rows, found)
        elif part.shape[1] == 2:
            _mark_last(part[:, 0], part[:, 1], rows, found)
        else:
            moves = list_moves(part)
            rows = np.broadcast_to(rows[:, None], moves.legal.shape)
            _mark_reachable(moves.states[moves.legal], rows[moves.legal], found)


def _mark_last(
    smaller: np.ndarray, larger: np.ndarray, owners: np.ndarray, found: np.ndarray
) -> None:
    """`_mark_reachable` of two numbers, without making the moves: most states are of this size."""
    for results in (larger + smaller, larger - smaller, larger * smaller):
        _mark(results, owners, found)
    quotient = larger // np.maximum(smaller, 1)
    divides = (smaller > 0) & (quotient * smaller == larger)
    _mark(quotient[divides], owners[divides], found)


def _mark(results: np.ndarray, owners: np.ndarray, found: np.ndarray) -> None:
    near = results < found.shape[1]
    found[owners[near], results[near]] = True


class _Numbers:
    """One set of numbers; its parts are bit masks, and what they make is found once."""

    def __init__(self, numbers: tuple[int, ...]):
        self._all = (1 << len(numbers)) - 1
        self._values = {1 << place: {number} for place, number in enumerate(numbers)}

    def make(self, target: int) -> bool:
        """Whether all of the numbers make the target."""
        return 0 <= target <= MAX_NUMBER and self._make(self._all, target)

    def _make(self, part: int, target: int) -> bool:
        if part.bit_count() <= _LISTED:
            return target in self._list(part)
        # Halves of equal size first: they make most, and are cheap to list.
        for small in sorted(_split(part), key=int.bit_count, reverse=True):
            for value in self._list(small):
                if any(self._make(part ^ small, other) for other in _complete(value, target)):
                    return True
                if value == 0 == target:
                    return True
        return False

    def _list(self, part: int) -> set[int]:
        """All that a part of the numbers makes."""
        if part not in self._values:
            self._values[part] = {
                result
                for small in _split(part)
                for left in self._list(small)
                for right in self._list(part ^ small)
                for result in _combine(left, right)
            }
        return self._values[part]


def _split(part: int) -> list[int]:
    """The smaller halves of all ways to split a part in two."""
    halves, half = [], (part - 1) & part
    while half:
        size = 2 * half.bit_count() - part.bit_count()
        if size < 0 or (size == 0 and half < part ^ half):
            halves.append(half)
        half = (half - 1) & part
    return halves


def _combine(left: int, right: int) -> list[int]:
    """The results of all moves of two numbers."""
    low, high = min(left, right), max(left, right)
    results = [one for one in (low + high, low * high) if one <= MAX_NUMBER]
    results.append(high - low)
    if low and high % low == 0:
        results.append(high // low)
    return results


def _complete(value: int, target: int) -> list[int]:
    """The numbers that a move combines with `value` into `target`, unless any one is."""
    others = [target + value]
    if target >= value:
        others.append(target - value)
    else:
        others.append(value - target)
    if value and target % value == 0:
        others.append(target // value)
    if value and target:
        others.append(value * target)
        if value % target == 0:
            others.append(value // target)
    return [other for other in others if other <= MAX_NUMBER]
