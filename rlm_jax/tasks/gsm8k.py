"""GSM8K: grade-school word problems with one number as the answer (Cobbe et al. 2021, 2110.14168).

A line of the published files: `{"question": "...", "answer": "worked steps\\n#### 18"}`. Answers
are compared as exact numbers, see `answers.py`. The worked example in the prompt is our own.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from rlm_jax.tasks.answers import extract_number, format_number, parse_number
from rlm_jax.tasks.base import Example, Gold, Message, Problem, Task, Verdict, judge, make_chat

INSTRUCTION = (
    "You solve math word problems. Write one short calculation step per line. "
    'Finish with the line "#### " followed by the final number.'
)
EXAMPLE = (
    "A baker fills 6 boxes with 8 rolls each. She sells 30 rolls and eats 2. "
    "How many rolls are left?",
    "The baker has 6 * 8 = 48 rolls.\n"
    "After selling 30 rolls she has 48 - 30 = 18 rolls.\n"
    "After eating 2 rolls she has 18 - 2 = 16 rolls.\n"
    "#### 16",
)


def prompt(problem: Problem) -> list[Message]:
    """One worked example, then the question."""
    return make_chat(INSTRUCTION, EXAMPLE, problem.question)


def verify(problem: Problem, gold: Gold, text: str) -> Verdict:
    """Compares the number that `text` ends on with the gold number.

    Raises:
      ValueError: the gold answer is not a number.
    """
    if gold.answer is None:
        return judge(None, "no gold answer to compare with")
    expected = parse_number(gold.answer)
    if expected is None:
        raise ValueError(f"{problem.id}: gold answer {gold.answer!r} is not a number")
    found = extract_number(text)
    if found is None:
        return judge(False, "no number in the text")
    right = found == format_number(expected)
    return judge(right, f"{found} {'=' if right else '≠'} {format_number(expected)}")


def load(path: str | os.PathLike[str]) -> list[Example]:
    """Reads a published file; problem ids are the file's stem and the zero-based row.

    Raises:
      ValueError: a row lacks its fields or its `#### number` line; the message names the row.
    """
    path = pathlib.Path(path)
    examples = []
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for row, line in enumerate(lines):
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: row {row} is not a GSM8K problem ({error})") from None
        try:
            example = read_row(fields, row + 1) if isinstance(fields, dict) else None
        except ValueError as error:
            raise ValueError(f"{path}: row {row} has {error}") from None
        if example is None or "####" not in line:
            raise ValueError(f"{path}: row {row} is not a GSM8K problem with a worked answer")
        problem, gold = example
        examples.append((dataclasses.replace(problem, id=f"gsm8k-{path.stem}-{row}"), gold))
    return examples


def read_row(row: dict[str, Any], line: int) -> Example | None:
    """A row as published, whose `answer` is worked steps and `#### 18`; `18` alone will do.

    Raises:
      ValueError: the answer is no number; a row without the two texts gives None.
    """
    question, worked = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip() or not isinstance(worked, str):
        return None
    answer = worked.rsplit("####", 1)[-1].strip()
    if parse_number(answer) is None:
        raise ValueError(f"no number behind #### or alone in its answer: {answer!r:.60}")
    return Problem(question, id=f"gsm8k-{line - 1}"), Gold(answer)


TASK = Task("gsm8k", 1, False, prompt, extract_number, verify, read_row=read_row)
