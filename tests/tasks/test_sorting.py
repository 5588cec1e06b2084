"""Sorting: Graph of Thoughts' errors (golden G58), the published sizes, near misses."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_jax.tasks import sorting
from rlm_jax.tasks.base import Gold, Problem

PROBLEM = sorting.make_problem([3, 1, 2, 1])

digit_lists = st.lists(st.integers(0, 9), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("out", "errors"), [([1, 2, 1, 3], 1), ([1, 1, 2, 2], 2), ([1, 1, 2, 3], 0), ([], 4)]
)
def test_golden_errors(out, errors):
    assert sorting.count_errors([3, 1, 2, 1], out) == errors


@given(digit_lists, digit_lists)
def test_errors_against_the_formula(given_, out):
    frequency = sum(abs(out.count(d) - given_.count(d)) for d in range(10))
    descents = sum(out[i] > out[i + 1] for i in range(len(out) - 1))
    assert sorting.count_errors(given_, out) == frequency + descents
    assert (sorting.count_errors(given_, out) == 0) == (out == sorted(given_))


@given(digit_lists, digit_lists)
def test_right_is_exactly_sorted(given_, out):
    problem = sorting.make_problem(given_)
    assert sorting.read_digits(problem.question) == given_
    for answer in (out, sorted(given_)):
        verdict = sorting.verify(problem, Gold(), f"#### {sorting.format_list(answer)}")
        assert verdict.correct is (answer == sorted(given_))


@pytest.mark.parametrize(("difficulty", "num_digits"), [(0, 4), (0.6, 32), (0.8, 64), (1, 128)])
def test_published_sizes(difficulty, num_digits):
    for problem, _ in sorting.generate(0, 20, difficulty):
        assert len(problem.data) == num_digits
        digits = list(problem.data)
        *lines, last = sorting.write_solution(problem).split("\n")
        assert len(lines) == max(0, 2 * num_digits // 16 - 2)
        # The runs are the given digits in their places; merges hold what they merge.
        for i, line in enumerate(lines[: num_digits // 16]):
            run = digits[16 * i : 16 * i + 16]
            assert sorting.parse_list(line.encode()) == sorted(run)
        assert Counter(sorting.parse_list(last.encode())) == Counter(digits)


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        ("[1, 1, 2, 3]", 2),
        ("1, 1, 2, 3", 2),
        ("1 1 2 3.", 2),
        ("**[1,1,2,3]**", 2),
        ("\\boxed{[1, 1, 2, 3]}", 2),
        ("Sorted: [1, 1, 2, 3] as asked, of [3, 1, 2, 1", 1),
        ("[3, 1, 2, 1] = [1, 1, 2, 3]", 2),
        ("[1, 1, 2, 3", 2),
        ("[1, 2, 1, 3]", 1),
        ("[1, 1, 2, 2]", 1),
        ("[1, 1, 2]", 1),
        ("[9, 8, 7, 6]", 0),
        ("[3]", 1),
        ("[1123]", -1),
        ("[1, 1, 2, 3.5]", -1),
        ("[1, 1, 2, three]", -1),
        ("[1, 1, 2, -3]", -1),
        ("[1, 1, 2, 03]", -1),
        ("[1, 1, 2, \N{ARABIC-INDIC DIGIT THREE}]", -1),
        ("sorted", -1),
        ("[]", -1),
        ("[1, 1, 2, 3] []", -1),
    ],
)
def test_levels(answer, level):
    verdict = sorting.verify(PROBLEM, Gold(), f"[0]\n#### {answer}")
    assert verdict.level == level, verdict
    assert verdict.correct is (level == 2)


@pytest.mark.parametrize("question", ["Sort this.", "Sort [].", "Sort [10, 2].", "Sort [a]."])
def test_a_question_without_digits_is_not_judged(question):
    assert sorting.verify(Problem(question), Gold(), "#### [1]").correct is None


@pytest.mark.parametrize("digits", [[], [10], [-1]])
def test_what_is_no_digit_is_refused(digits):
    with pytest.raises(ValueError, match="0 to 9"):
        sorting.make_problem(digits)


def test_the_example_is_right():
    assert sorting.verify(Problem(sorting.EXAMPLE[0]), Gold(), sorting.EXAMPLE[1]).correct
