"""3-SAT: the solver against all 32 assignments, the formula's size, partial and hostile answers."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.tasks import sat
from rlm_jax.tasks.base import Gold, Problem

PROBLEM = sat.make_problem(3, [(1, -2, 3), (-1, 2, -3)])

literals = st.integers(1, 5).flatmap(lambda i: st.sampled_from([i, -i]))
formulas = st.lists(st.lists(literals, min_size=1, max_size=3).map(tuple), min_size=1, max_size=25)


def is_true(clauses, values):
    return all(any(values[abs(x) - 1] == (x > 0) for x in clause) for clause in clauses)


@settings(max_examples=300, deadline=None)
@given(formulas)
def test_solver_against_all_assignments(clauses):
    satisfiable = any(is_true(clauses, v) for v in itertools.product([False, True], repeat=5))
    values = sat.solve(5, clauses)
    assert (values is not None) == satisfiable
    if values is not None:
        assert is_true(clauses, [values[i] for i in range(1, 6)])


@settings(max_examples=100)
@given(formulas, st.lists(st.booleans(), min_size=5, max_size=5))
def test_verdict_is_the_formula_s_value(clauses, values):
    problem = sat.make_problem(5, clauses)
    text = "#### " + sat.format_assignment(dict(enumerate(values, 1)))
    assert sat.verify(problem, Gold(), text).level == (2 if is_true(clauses, values) else 0)


@pytest.mark.parametrize(
    ("difficulty", "num_clauses"), [(0.0, 5), (0.25, 9), (0.5, 13), (0.75, 17), (1.0, 22)]
)
def test_clauses_follow_the_dial(difficulty, num_clauses):
    for problem, _ in sat.generate(2, 30, difficulty):
        num_variables, *clauses = problem.data
        assert num_variables == 5
        # At the hardest end a clause may have been dropped.
        assert len(clauses) == num_clauses or (difficulty == 1.0 and len(clauses) < 22)
        assert all(len({abs(x) for x in clause}) == 3 for clause in clauses)
        assert sat.read_clauses(problem.question) == (5, clauses)


def test_half_of_the_literals_are_negated():
    clauses = [c for problem, _ in sat.generate(0, 100, 0.5) for c in problem.data[1:]]
    negated = sum(x < 0 for clause in clauses for x in clause)
    assert 0.4 < negated / (3 * len(clauses)) < 0.5


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        ("x1=True, x2=True, x3=False", 2),
        ("x1: true, x2: T, x3: 0", 2),
        ("x3 is false and x1 is true and x2 is true", 2),
        ("x1=False, x2=False, x3=False", 2),
        ("x1=True, x2=True, x3=False.", 2),
        ("**x1**=True, x2=**True**, x3 is **False**", 2),
        ("x1=True, x2=True, x3=False.5", 1),
        ("x1=True, x2=False, x3=True", 0),
        ("x1=True, x3=True, x2=False", 0),
        ("x1=True", 1),
        ("x2=True, x3=True", 1),
        ("x1=True, x1=True, x2=True, x3=False", -1),
        ("x1=True, x1=False", -1),
        ("x1=True, x2=True, x3=False, x4=True", -1),
        ("x1=True, x2=True, x3=Falsehood", 1),
        ("x0=True", -1),
        ("True, True, False", -1),
        ("(x1 or not x2 or x3)", -1),
        ("x99999999999=True", -1),
    ],
)
def test_levels(answer, level):
    verdict = sat.verify(PROBLEM, Gold(), f"x1=False is tried first.\n#### {answer}")
    assert verdict.level == level
    assert verdict.correct is (level == 2)


@pytest.mark.parametrize(
    "question",
    [
        "Is x1 true?",
        "Find truth values for x1, x3 that make every clause true: (x1 or x3)",
        "Find truth values for x1, x2 that make every clause true: (x1 or x3)",
        "Find truth values for x1, x2 that make every clause true: (x1 xor x2)",
        "Find truth values for x1, x2 that make every clause true: nothing",
    ],
)
def test_a_question_without_clauses_is_not_judged(question):
    assert sat.verify(Problem(question), Gold(), "#### x1=True").correct is None


def test_the_example_is_right():
    problem = Problem(sat.EXAMPLE[0])
    assert sat.verify(problem, Gold(), sat.EXAMPLE[1]).correct
