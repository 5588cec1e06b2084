"""Einstein riddles: who lives where, from clues that leave one way (x1's domain; Blueprint, B11).

    There are 3 houses in a row, numbered 1 to 3 from left to right, each with one person.
    Names: Anna, Ben, Clara. Drinks: coffee, juice, milk. ... Which house has what?
        ->      #### 1: Ben, juice; 2: Anna, milk; 3: Clara, coffee

Difficulty d in [0, 1] sets 3 + int(2 d) houses and 2 + int(3 d) attributes. The one idea of the
generator: while an exact solver finds a second arrangement, add a true clue that forbids it; then
drop every clue that is not needed. So the arrangement is unique and every clue counts.

Self-verifying: an arrangement is held against every clue. Levels: -1 no arrangement, 0 a clue is
broken or a house has two values of one attribute, 1 values are missing and no clue is broken, 2
all in place. Deviation from x1, which asks for one house number in a box: that could only be
checked by solving.
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlm_jax.tasks.answer_lines import find_answer_text
from rlm_jax.tasks.base import (
    Example,
    Gold,
    Message,
    Problem,
    Task,
    Verdict,
    grade,
    judge,
    make_chat,
)
from rlm_jax.tasks.dial import check_dial

ATTRIBUTES = {
    "Names": (("Anna", "Ben", "Clara", "David", "Emma"), "{}"),
    "Drinks": (("coffee", "juice", "milk", "tea", "water"), "the {} drinker"),
    "Pets": (("bird", "cat", "dog", "fish", "horse"), "the {} owner"),
    "Colours": (("blue", "green", "red", "white", "yellow"), "the owner of the {} house"),
    "Jobs": (("baker", "doctor", "farmer", "pilot", "teacher"), "the {}"),
}
KINDS = {
    "at": "{} lives in house {}.",
    "same": "{} is {}.",
    "left": "{} lives somewhere to the left of {}.",
    "right": "{} lives somewhere to the right of {}.",
    "beside": "{} lives next to {}.",
}

INSTRUCTION = (
    "You solve riddles about houses in a row. Draw one conclusion per line. Finish with the line "
    '"#### " followed by every house, such as "1: Anna, tea; 2: Ben, milk".'
)

_PHRASES = {v: phrase for values, phrase in ATTRIBUTES.values() for v in values}
_PLACES = {v: (a, i) for a, (vs, _) in enumerate(ATTRIBUTES.values()) for i, v in enumerate(vs)}
_BY_WORD = {value.lower(): value for value in _PLACES}
_HOUSE = re.compile(r"\W*(?:house\s*)?([1-9])\b(.*)", re.IGNORECASE | re.DOTALL)


class Clue(NamedTuple):
    """`kind` of KINDS about one value and another; of "at", about a value and a house number."""

    kind: str
    value: str
    other: str | int


class Arrangement(NamedTuple):
    """House numbers from 1 by value, and how many houses and attributes there are."""

    num_houses: int
    num_attributes: int
    houses: dict[str, int]


def prompt(problem: Problem) -> list[Message]:
    """One worked example, then the riddle."""
    return make_chat(INSTRUCTION, _EXAMPLE, problem.question)


def make_problem(
    num_houses: int, num_attributes: int, clues: Sequence[Clue], id: str = ""
) -> Problem:
    """The riddle of `clues`; `data` is (num_houses, num_attributes, clues)."""
    lists = list(ATTRIBUTES.items())[:num_attributes]
    listed = " ".join(f"{name}: {', '.join(vs[:num_houses])}." for name, (vs, _) in lists)
    numbered = " ".join(f"({i}) {_say(clue)}" for i, clue in enumerate(clues, 1))
    question = (
        f"There are {num_houses} houses in a row, numbered 1 to {num_houses} from left to right, "
        f"each with one person. {listed} {numbered} Which house has what?"
    )
    return Problem(question, (num_houses, num_attributes, *clues), id)


def parse_arrangement(line: str) -> dict[str, int] | None:
    """House numbers by value on an answer line; None when there are none or a value has two."""
    houses: dict[str, int] = {}
    for part in line.split(";"):
        match = _HOUSE.fullmatch(part)
        if match is None:
            return None
        for word in re.findall(r"\w+", match[2].lower()):
            value = _BY_WORD.get(word)
            if value in houses:
                return None
            if value is not None:
                houses[value] = int(match[1])
    return houses or None


def format_arrangement(houses: dict[str, int]) -> str:
    """The one way to write an arrangement: `1: Ben, juice; 2: Anna, milk`, in order."""
    rows = []
    for house in sorted(set(houses.values())):
        values = sorted((v for v in houses if houses[v] == house), key=_PLACES.__getitem__)
        rows.append(f"{house}: {', '.join(values)}")
    return "; ".join(rows)


def extract(text: str) -> str | None:
    """The arrangement on the answer line in canonical form, or None."""
    line = find_answer_text(text)
    houses = None if line is None else parse_arrangement(line)
    return None if houses is None else format_arrangement(houses)


def verify(problem: Problem, gold: Gold, text: str) -> Verdict:
    """Holds the arrangement that `text` ends on against every clue in `problem.data`."""
    del gold
    if not problem.data:
        return judge(None, "no clues in the problem's data")
    num_houses, num_attributes, *clues = problem.data
    line = find_answer_text(text)
    houses = None if line is None else parse_arrangement(line)
    if houses is None or not houses.keys() <= set(_list_values(num_houses, num_attributes)):
        return grade(-1, "no arrangement of these values on the answer line")
    if max(houses.values()) > num_houses:
        return grade(-1, f"there are only {num_houses} houses")
    rooms = [(_PLACES[value][0], house) for value, house in houses.items()]
    if len(set(rooms)) < len(rooms):
        return grade(0, "two values of one attribute in one house")
    broken = next((clue for clue in map(Clue._make, clues) if is_broken(clue, houses)), None)
    if broken is not None:
        return grade(0, f"broken: {_say(broken)}")
    num_missing = num_houses * num_attributes - len(houses)
    return grade(1 if num_missing else 2, f"no clue broken, {num_missing} values missing")


def is_broken(clue: Clue, houses: dict[str, int]) -> bool:
    """Whether values that are in place contradict a clue."""
    here = houses.get(clue.value)
    there = clue.other if isinstance(clue.other, int) else houses.get(clue.other)
    if here is None or there is None:
        return False
    return not bool(_holds(clue.kind, np.int32(here), np.int32(there)))


def solve(
    num_houses: int, num_attributes: int, clues: Sequence[Clue], most: int = 2
) -> list[dict[str, int]]:
    """The arrangements that break no clue, at most `most` of them. Exact.

    Each attribute is one of n! orders; clues about one attribute strike orders out, clues about
    two become a table of orders that go together, and a depth-first search does the rest.
    """
    orders = np.array(list(itertools.permutations(range(1, num_houses + 1))), np.int32)
    domains = np.ones((num_attributes, len(orders)), bool)
    shape = (num_attributes, num_attributes, len(orders), len(orders))
    fits = np.ones(shape, bool)
    for clue in clues:
        a, i = _PLACES[clue.value]
        if isinstance(clue.other, int):
            domains[a] &= orders[:, i] == clue.other
            continue
        b, j = _PLACES[clue.other]
        if a == b:
            domains[a] &= _holds(clue.kind, orders[:, i], orders[:, j])
        else:
            table = _holds(clue.kind, orders[:, i][:, None], orders[:, j][None, :])
            fits[a, b] &= table
            fits[b, a] &= table.T
    found: list[dict[int, int]] = []
    _search(domains, fits, {}, found, most)
    names = list(ATTRIBUTES.values())[:num_attributes]
    return [
        {names[a][0][i]: int(h) for a, o in chosen.items() for i, h in enumerate(orders[o])}
        for chosen in found
    ]


def generate(seed: int, num_problems: int, difficulty: float) -> list[Example]:
    """Makes `num_problems` riddles, each with exactly one arrangement, which is the gold.

    Raises:
      ValueError: difficulty outside [0, 1], or a negative seed or number of problems.
    """
    check_dial(seed, num_problems, difficulty)
    num_houses, num_attributes = 3 + int(2 * difficulty), 2 + int(3 * difficulty)
    examples = []
    for i in range(num_problems):
        rng = np.random.default_rng([seed, i])
        clues, houses = _draw(rng, num_houses, num_attributes)
        name = f"riddles-{difficulty:g}-{seed}-{i}"
        problem = make_problem(num_houses, num_attributes, clues, name)
        examples.append((problem, Gold(format_arrangement(houses))))
    return examples


def _draw(
    rng: np.random.Generator, num_houses: int, num_attributes: int
) -> tuple[list[Clue], dict[str, int]]:
    """Clues that leave one arrangement, none of them to spare, and the arrangement."""
    values = _list_values(num_houses, num_attributes)
    orders = [rng.permutation(num_houses) + 1 for _ in range(num_attributes)]
    houses = {value: int(orders[_PLACES[value][0]][_PLACES[value][1]]) for value in values}
    pairs = itertools.permutations(values, 2)
    pool = [Clue(kind, v, w) for v, w in pairs for kind in ("same", "left", "right", "beside")]
    pool += [Clue("at", value, houses[value]) for value in values]
    pool = [clue for clue in pool if not is_broken(clue, houses)]
    pool = [pool[i] for i in rng.permutation(len(pool))]
    clues: list[Clue] = []
    while others := [h for h in solve(num_houses, num_attributes, clues) if h != houses]:
        clues.append(next(clue for clue in pool if is_broken(clue, others[0])))
    for clue in list(clues):
        fewer = [other for other in clues if other is not clue]
        if len(solve(num_houses, num_attributes, fewer)) == 1:
            clues = fewer
    return clues, houses


def _search(
    domains: np.ndarray, fits: np.ndarray, chosen: dict[int, int], found: list, most: int
) -> None:
    """Fixes the attribute with the fewest orders left, in every way, one after the other."""
    left = [a for a in range(len(domains)) if a not in chosen]
    if not left:
        found.append(dict(chosen))
        return
    a = min(left, key=lambda a: int(domains[a].sum()))
    for order in np.flatnonzero(domains[a]):
        narrowed = domains & fits[a, :, order]
        if narrowed[left].any(axis=1).all():
            _search(narrowed, fits, {**chosen, a: int(order)}, found, most)
        if len(found) >= most:
            return


def _holds(kind: str, here: np.ndarray | np.int32, there: np.ndarray | np.int32):
    if kind in ("at", "same"):
        return here == there
    if kind == "left":
        return here < there
    if kind == "right":
        return here > there
    return np.abs(here - there) == 1


def _list_values(num_houses: int, num_attributes: int) -> list[str]:
    lists = list(ATTRIBUTES.values())[:num_attributes]
    return [value for values, _ in lists for value in values[:num_houses]]


def _say(clue: Clue) -> str:
    other = clue.other if isinstance(clue.other, int) else _PHRASES[clue.other].format(clue.other)
    said = KINDS[clue.kind].format(_PHRASES[clue.value].format(clue.value), other)
    return said[0].upper() + said[1:]


_EXAMPLE = (
    make_problem(
        3,
        2,
        [Clue("at", "Anna", 2), Clue("left", "Ben", "milk"), Clue("same", "Clara", "coffee")],
    ).question,
    "Anna lives in house 2, so Ben, left of someone, and Clara live in houses 1 and 3.\n"
    "Clara drinks coffee, so milk is Ben's or Anna's, and not Ben's: Anna drinks milk.\n"
    "Ben lives left of house 2, in house 1, and drinks juice. Clara lives in house 3.\n"
    "#### 1: Ben, juice; 2: Anna, milk; 3: Clara, coffee",
)

TASK = Task("riddles", 1, True, prompt, extract, verify, generate=generate)
