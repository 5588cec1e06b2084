"""Which line is the answer, whether True or False was said, and what levels mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_jax.tasks.answer_lines import find_answer_line, find_answer_text
from rlm_jax.tasks.base import Gold, Problem, grade
from rlm_jax.tasks.dial import check_dial
from rlm_jax.tasks.truth import extract_truth, verify_truth


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", None),
        (" \n#### \n::**\n", None),
        ("4", b"4"),
        ("2 + 2 = 4\n#### 4\n", b" 4"),
        ("2 + 2 = 4\n####", b"2 + 2 = 4"),
        ("#### 4\n####\n", b" 4"),
        ("#### 4\n#### 5", b" 5"),
        ("####\n\n 5\nand 6", b" 5"),
        ("#### 4 #### ", b" 4 "),
        ("a\n#### 4\nb\n#### \n**\n", b" 4"),
        ("########5", b"5"),
        ("#####5", b"#5"),
        ("###5", b"###5"),
        ("a\nb\n\n", b"b"),
        ("a\r\nb\r\n", b"b\r"),
        ("a\N{LINE SEPARATOR}b", "a\N{LINE SEPARATOR}b".encode()),
        ("\ud800", b"\xed\xa0\x80"),
    ],
)
def test_answer_lines(text, line):
    assert find_answer_line(text) == line
    assert (find_answer_text(text) is None) == (line is None)


@given(st.text(alphabet="#4 \n:*a", max_size=40))
def test_the_answer_line_is_a_line_that_is_not_blank(text):
    line = find_answer_text(text)
    if line is None:
        assert not text.strip("# \n:*")
    else:
        assert line in text
        assert "\n" not in line
        assert line.strip("# :*")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### True", "True"),
        ("It is true.\n#### False", "False"),
        ("so it is false", "False"),
        ("The answer is: yes.", "True"),
        ("\\boxed{False}", "False"),
        ("True, then false\nno", "False"),
        ("#### True or False", None),
        ("#### not true", None),
        ("untrue", None),
        ("#### maybe", None),
        ("", None),
        ("#### True\n#### TRUE", "True"),
    ],
)
def test_truth(text, answer):
    assert extract_truth(text) == answer


def test_truth_is_graded():
    problem = Problem("?", id="p")
    assert verify_truth(problem, Gold("True"), "#### yes") == (
        True, 1.0, "True, expected True", 2,
    )  # fmt: skip
    assert verify_truth(problem, Gold("True"), "#### False").level == 0
    assert verify_truth(problem, Gold("True"), "#### perhaps").level == -1
    assert verify_truth(problem, Gold(), "#### True").correct is None
    with pytest.raises(ValueError, match=r"p: .*'42'"):
        verify_truth(problem, Gold("42"), "#### True")


def test_only_level_two_is_correct():
    assert [grade(level, "").correct for level in (-1, 0, 1, 2)] == [False, False, False, True]
    assert [grade(level, "").reward for level in (-1, 0, 1, 2)] == [0.0, 0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="level 3"):
        grade(3, "")


def test_the_dial_s_ends_are_allowed():
    check_dial(0, 0, 0.0)
    check_dial(0, 1, 1.0)
