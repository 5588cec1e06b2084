"""Generated arithmetic: exact golds, a dial that turns, problems that stay the same."""

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.tasks import arithmetic


def evaluate(expression):
    """Python's own parser on exact numbers: the oracle (the text is checked to be arithmetic)."""
    assert re.fullmatch(r"[0-9+\-*/() ]+", expression)
    return eval(re.sub(r"([0-9]+)", r"Fraction(\1)", expression), {"Fraction": Fraction})


@settings(deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_gold_is_the_expression_s_value(seed, difficulty):
    for problem, gold in arithmetic.generate(seed, 4, difficulty):
        (expression,) = problem.data
        assert problem.question == f"Compute {expression}."
        assert evaluate(expression) == int(gold.answer)
        assert arithmetic.TASK.verify(problem, gold, f"so\n#### {gold.answer}").correct
        assert not arithmetic.TASK.verify(problem, gold, f"#### {int(gold.answer) + 1}").correct


def test_difficulty_sets_operations_and_operands():
    seen = []
    for difficulty in (0.0, 0.5, 1.0):
        texts = [p.data[0] for p, _ in arithmetic.generate(0, 200, difficulty)]
        operations = {len(re.findall(r" [-+*/] ", text)) for text in texts}
        largest = max(int(n) for text in texts for n in re.findall(r"[0-9]+", text))
        seen.append((operations, largest))
    assert [operations for operations, _ in seen] == [{1}, {5}, {8}]
    assert seen[0][1] == 9
    assert 90 <= seen[1][1] <= 99
    assert 900 <= seen[2][1] <= 999


def test_all_operators_occur_and_problems_differ():
    texts = [p.data[0] for p, _ in arithmetic.generate(1, 200, 0.3)]
    assert all(any(f" {operator} " in text for text in texts) for operator in "+-*/")
    assert len(set(texts)) > 190


def test_a_problem_does_not_depend_on_how_many_there_are():
    assert arithmetic.generate(3, 9, 0.4)[:2] == arithmetic.generate(3, 2, 0.4)
    assert arithmetic.generate(3, 2, 0.4) != arithmetic.generate(4, 2, 0.4)
    ids = [p.id for p, _ in arithmetic.generate(3, 9, 0.4)]
    assert len(set(ids)) == 9


@pytest.mark.parametrize(
    ("seed", "num_problems", "difficulty"),
    [(0, 1, -0.1), (0, 1, 1.1), (0, 1, float("nan")), (-1, 1, 0.5), (0, -1, 0.5)],
)
def test_arguments_out_of_range(seed, num_problems, difficulty):
    with pytest.raises(ValueError, match="must be"):
        arithmetic.generate(seed, num_problems, difficulty)
