"""Generated arithmetic: exact golds, a dial that turns, problems that stay the same."""

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.tasks import arithmetic
from rlm_jax.tasks.base import Gold, Problem


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


def test_calculations_stay_within_what_the_device_can_tell():
    for problem, gold in arithmetic.generate(9, 500, 1.0):
        value, lines = arithmetic.work_out(problem.data[0])
        assert value == int(gold.answer)
        assert len(lines) == arithmetic.MAX_OPERATIONS
        for line in lines:
            left, right = line.split(" = ")
            assert evaluate(re.sub(r"(-[0-9]+)", r"(\1)", left)) == int(right)
            assert abs(int(right)) <= arithmetic.MAX_VALUE // 10


def test_a_worked_solution():
    problem = Problem("Compute (3 + 4) * 2 - 5.")
    assert arithmetic.write_solution(problem) == arithmetic.EXAMPLE[1]
    assert arithmetic.write_solution(Problem("Compute 1. Compute 2 * 3 * 4.")) == (
        "2 * 3 = 6\n6 * 4 = 24\n#### 24"
    )


@given(st.text("0123456789+-*/() ", max_size=12))
def test_expressions_against_python(text):
    try:
        value, _ = arithmetic.work_out(text)
    except ValueError:
        return
    # Python knows no numbers with leading zeros.
    assert evaluate(re.sub(r"\b0+(?=[0-9])", "", text)) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "ends too early"),
        ("1 +", "ends too early"),
        ("+ 1", "unexpected"),
        ("-1", "unexpected"),
        ("(1", "left open"),
        ("1)", r"unexpected '\)'"),
        ("()", "unexpected"),
        ("1 2", "unexpected"),
        ("7 / 2", "no whole number"),
        ("7 / (1 - 1)", "no whole number"),
        ("1 % 2", "unexpected|none of"),
        ("100000001", "over 100000000"),
        ("9" * 5000, "over 100000000"),
        ("100000 * 100000", "over 100000000"),
        ("(" * 9 + "1" + ")" * 9, "open brackets"),
        ("\N{ARABIC-INDIC DIGIT NINE}", "none of"),
    ],
)
def test_what_is_no_expression(expression, message):
    with pytest.raises(ValueError, match=message):
        arithmetic.work_out(expression)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 9", "9"),
        ("#### -9.", "-9"),
        ("#### \N{MINUS SIGN}9", "-9"),
        ("#### **1,234**", "1234"),
        ("#### 9.50", "9.5"),
        ("#### $9", "9"),
        ("14 - 5 = 9", "9"),
        ("#### 14 - 5 = 9", "9"),
        ("14 - 5 = 9\n#### \n", "9"),
        ("so the answer is 9.", "9"),
        ("\\boxed{9}", "9"),
        ("#### 9 apples", "9"),
        ("#### 9\nand 5 more", "9"),
        ("#### 9\n#### 8", "8"),
        ("#### -0", "0"),
        ("#### 9 or 8", None),
        ("#### 14 - 5", None),
        ("#### 10-3", None),
        ("#### - 9", None),
        ("#### -(9)", None),
        ("#### 1,00", None),
        ("#### 1.5.2", None),
        ("#### 3/4", None),
        ("#### 1e3", None),
        ("#### x9", None),
        ("#### 9 = ", None),
        ("#### \N{ARABIC-INDIC DIGIT NINE}", None),
        ("7 - 5 = 2\n#### nine", None),
        ("#### " + "9" * 5000, None),
        ("#### 0." + "3" * 5000, None),
        ("", None),
    ],
    ids=lambda text: repr(text)[:30],
)
def test_answers(text, answer):
    assert arithmetic.extract(text) == answer


def test_questions_without_an_expression_are_judged_by_their_gold():
    problem = Problem("What is four and five?", id="p")
    assert arithmetic.verify(problem, Gold("9"), "#### 9").correct
    assert not arithmetic.verify(problem, Gold("9"), "#### 8").correct
    assert arithmetic.verify(problem, Gold(), "#### 9").correct is None
    with pytest.raises(ValueError, match=r"p: .*'nine'"):
        arithmetic.verify(problem, Gold("nine"), "#### 9")


@pytest.mark.parametrize(
    ("step", "is_false"),
    [
        ("3 + 4 = 7\n", False),
        ("3 + 4 = 8\n", True),
        ("3+4=8", True),
        ("-3 - -4 = 1", False),
        ("3 * -4 = 12", True),
        ("8 / 2 = 4", False),
        ("8 / 3 = 2", True),
        ("8 / 0 = 0", True),
        ("0 / 8 = 0", False),
        ("-7 / 2 = -4", True),
        ("100000 * 100000 = 1", True),
        ("100000001 + 1 = 1", False),
        ("So 3 + 4 = 8", False),
        ("3 + 4 = 8 apples", False),
        ("3 + 4 + 5 = 8", False),
        ("#### 8", False),
        ("3 + 4 = 7\n3 + 4 = 8\n", False),
        ("", False),
    ],
)
def test_false_calculations(step, is_false):
    assert arithmetic.is_false_calculation(step) is is_false
