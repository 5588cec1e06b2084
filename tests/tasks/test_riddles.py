"""Riddles: the solver against brute force, uniqueness, clues that all count, partial answers."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.tasks import riddles
from rlm_jax.tasks.base import Gold, Problem
from rlm_jax.tasks.riddles import Clue

VALUES = ["Anna", "Ben", "Clara", "coffee", "juice", "milk"]
PROBLEM = riddles.make_problem(
    3, 2, [Clue("at", "Anna", 2), Clue("left", "Ben", "milk"), Clue("same", "Clara", "coffee")]
)
SOLUTION = "1: Ben, juice; 2: Anna, milk; 3: Clara, coffee"


def holds(clue, houses):
    """The clues' meaning, said once more."""
    kind, value, other = clue
    here = houses[value]
    if kind == "at":
        return here == other
    there = houses[other]
    return {
        "same": here == there,
        "left": here < there,
        "right": here > there,
        "beside": here - there in (1, -1),
    }[kind]


def brute_force(clues):
    found = []
    for names, drinks in itertools.product(itertools.permutations((1, 2, 3)), repeat=2):
        houses = dict(zip(VALUES, names + drinks, strict=True))
        if all(holds(clue, houses) for clue in clues):
            found.append(houses)
    return found


places = st.builds(Clue, st.just("at"), st.sampled_from(VALUES), st.integers(1, 3))
pairs = st.permutations(VALUES).flatmap(
    lambda v: st.sampled_from(["same", "left", "right", "beside"]).map(lambda k: Clue(k, *v[:2]))
)


@settings(max_examples=150, deadline=None)
@given(st.lists(places | pairs, max_size=6))
def test_solver_against_brute_force(clues):
    def key(houses):
        return sorted(houses.items())

    found = riddles.solve(3, 2, clues, most=100)
    assert sorted(found, key=key) == sorted(brute_force(clues), key=key)
    assert len(riddles.solve(3, 2, clues)) == min(2, len(found))


@pytest.mark.parametrize(("difficulty", "num_houses", "num_attributes"), [
    (0.0, 3, 2), (0.34, 3, 3), (0.5, 4, 3), (0.7, 4, 4), (1.0, 5, 5),
])  # fmt: skip
def test_every_riddle_has_one_way_and_no_clue_to_spare(difficulty, num_houses, num_attributes):
    for problem, gold in riddles.generate(4, 3, difficulty):
        assert problem.data[:2] == (num_houses, num_attributes)
        clues = list(problem.data[2:])
        (houses,) = riddles.solve(num_houses, num_attributes, clues)
        assert riddles.format_arrangement(houses) == gold.answer
        assert len(houses) == num_houses * num_attributes
        assert all(holds(clue, houses) for clue in clues)
        for clue in clues:
            fewer = [other for other in clues if other is not clue]
            assert len(riddles.solve(num_houses, num_attributes, fewer)) == 2


def test_all_kinds_of_clues_occur():
    clues = [clue for problem, _ in riddles.generate(0, 40, 0.5) for clue in problem.data[2:]]
    assert {clue.kind for clue in clues} == set(riddles.KINDS)


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        (SOLUTION, 2),
        ("3: coffee Clara; 2: milk Anna; 1: juice Ben", 2),
        ("House 1: BEN and the juice drinker; house 2: Anna, milk; house 3: Clara, coffee", 2),
        ("2: Anna", 1),
        ("1: Ben; 2: Anna", 1),
        ("1: juice; 2: milk; 3: Clara", 1),
        ("1: Anna", 0),
        ("1: Clara, milk", 1),
        ("3: Clara, milk; 2: coffee", 0),
        ("1: Ben, juice; 2: Anna, milk; 3: Clara, juice", -1),
        ("1: Ben, Anna", 0),
        ("1: coffee, milk", 0),
        ("1: Ben, tea", -1),
        ("4: Ben", -1),
        ("1: Zoe", -1),
        ("1", -1),
        ("Ben lives in 1", -1),
        ("12: Ben", -1),
    ],
)
def test_levels(answer, level):
    verdict = riddles.verify(PROBLEM, Gold(), f"#### 1: Anna\n#### {answer}")
    assert verdict.level == level, verdict
    assert verdict.correct is (level == 2)


@settings(max_examples=100)
@given(st.permutations(VALUES[:3]), st.permutations(VALUES[3:]), st.integers(0, 6))
def test_verdict_is_the_clues(names, drinks, num_values):
    """Of every arrangement, whole or not: broken when a clue about what is there does not hold."""
    houses = {**{v: i for i, v in enumerate(names, 1)}, **{v: i for i, v in enumerate(drinks, 1)}}
    houses = dict(list(houses.items())[:num_values])
    text = "#### " + riddles.format_arrangement(houses)
    clues = PROBLEM.data[2:]
    known = [c for c in clues if c.value in houses and (c.kind == "at" or c.other in houses)]
    level = 0 if not all(holds(clue, houses) for clue in known) else 2 if num_values == 6 else 1
    assert riddles.verify(PROBLEM, Gold(), text).level == (level if num_values else -1)


def test_without_clues_nothing_is_judged():
    assert riddles.verify(Problem("Who?"), Gold(), f"#### {SOLUTION}").correct is None


def test_the_example_is_right():
    _, question, solution, _ = riddles.prompt(PROBLEM)
    assert question["content"] == PROBLEM.question
    assert riddles.verify(PROBLEM, Gold(), solution["content"]).correct
    assert brute_force(PROBLEM.data[2:]) == riddles.solve(3, 2, PROBLEM.data[2:])
