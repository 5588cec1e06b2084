"""Free-form questions: numbers as numbers, words as words, and no answer as no verdict."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlm_jax.tasks import free
from rlm_jax.tasks.base import Gold, Problem

PROBLEM = Problem("Which?")


@pytest.mark.parametrize(
    ("gold", "text", "correct"),
    [
        ("18", "so 9 * 2 = 18\n#### 18", True),
        ("9 * 2 = 18\n#### 18", "#### 18", True),
        ("9 * 2 = 18\n#### 18", "#### 9", False),
        ("1,000", "It costs $1000.00", True),
        ("1.5", "#### 15", False),
        ("Paris", "The capital is found.\n#### Paris.", True),
        ("the Eiffel Tower", "The answer is: Eiffel tower", True),
        ("Paris", "#### London", False),
        ("A", "#### A", True),
        ("B", "#### A", False),
        ("C#", "#### C#", True),
        ("C#", "#### C", False),
        ("Route 66", "Route 66", True),
        ("Route 66", "Take Route 66.\n#### 66", False),
        ("Paris", "#### 7", False),
        ("7", "#### seven", False),
        ("yes", "**Answer:** Yes!", True),
        ("3.5", "3.5", True),
        ("x + 1", "#### x+1", False),
        ("Paris", "", False),
        (None, "#### 5", None),
    ],
)
def test_verdicts(gold, text, correct):
    assert free.verify(PROBLEM, Gold(gold), text).correct is correct


@given(st.text(max_size=60))
@example("0^B")
def test_normal_form_is_stable(text):
    assert free.normalize(free.normalize(text)) == free.normalize(text)


@given(st.text(max_size=200))
def test_any_text_is_judged(text):
    answer = free.extract(text)
    assert answer is None or answer
    assert free.verify(PROBLEM, Gold("18"), text).correct in (True, False)


def test_the_prompt_ends_on_the_question():
    assert free.prompt(PROBLEM)[-1] == {"role": "user", "content": "Which?"}
