"""GSM8K: the whole published test file, and files that are none."""

import json

import pytest

from rlm_jax.tasks import gsm8k
from rlm_jax.tasks.answers import format_number, parse_number
from rlm_jax.tasks.base import Gold, Problem

PROBLEM = Problem("How many?", id="p0")


@pytest.mark.parametrize(
    ("gold", "text", "correct"),
    [
        ("1,000", "#### 1000.0", True),
        ("1000", "so $1,000.00", True),
        ("15", "The answer is 1.5", False),
        ("1.5", "#### 15", False),
        ("3/4", "#### 0.75", True),
        ("50", "#### 50%", True),
        ("-7", "#### 7", False),
        ("10", "#### 010", True),
        ("10", "#### 100", False),
        ("10", "", False),
        ("10", "no idea", False),
    ],
)
def test_compares_numbers(gold, text, correct):
    verdict = gsm8k.verify(PROBLEM, Gold(gold), text)
    assert verdict.correct is correct
    assert verdict.reward == float(correct)


def test_without_gold_the_verdict_is_open():
    verdict = gsm8k.verify(PROBLEM, Gold(), "#### 5")
    assert verdict.correct is None
    assert verdict.reward == 0.0


def test_a_gold_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match=r"p0.*'many'"):
        gsm8k.verify(PROBLEM, Gold("many"), "#### 5")


def test_every_published_gold_verifies_and_no_changed_one_does(shared_data):
    path = shared_data / "gsm8k" / "test.jsonl"
    examples = gsm8k.load(path)
    worked = [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()]
    assert len(examples) == len(worked) == 1319
    for (problem, gold), text in zip(examples, worked, strict=True):
        assert gsm8k.verify(problem, gold, text).correct, problem.id
        value = parse_number(gold.answer)
        steps = text.rsplit("####", 1)[0]
        for wrong in (value + 1, value * 10, -value if value else 1, value / 10 or 2):
            changed = f"{steps}#### {format_number(wrong)}"
            assert not gsm8k.verify(problem, gold, changed).correct, problem.id


def test_prompt_holds_the_question_last_and_no_published_row(shared_data):
    chat = gsm8k.prompt(PROBLEM)
    assert chat[-1] == {"role": "user", "content": PROBLEM.question}
    assert gsm8k.TASK.extract(chat[-2]["content"]) == "16"
    published = (shared_data / "gsm8k" / "test.jsonl").read_text("utf-8")
    assert gsm8k.EXAMPLE[0] not in published


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 1"),
        ("[1]", "row 1"),
        ('{"question": "q"}', "row 1"),
        ('{"question": "q", "answer": "18"}', "row 1"),
        ('{"question": "q", "answer": 18}', "row 1"),
        ('{"question": "q", "answer": "#### many"}', "row 1 has no number"),
    ],
)
def test_a_broken_file_names_its_row(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "q", "answer": "#### 1"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        gsm8k.load(path)
