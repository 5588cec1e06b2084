"""Answers of True or False: how tasks that ask for one find and grade it."""

import re

from rlm_jax.tasks.answers import find_marked
from rlm_jax.tasks.base import Gold, Problem, Verdict, grade, judge

_TRUTH = re.compile(r"\b(not\s+)?(true|false|yes|no)\b", re.IGNORECASE)


def extract_truth(text: str) -> str | None:
    """`"True"` or `"False"`: the one that a solution ends on, or None.

    Behind the most trusted answer mark (`answers.find_marked`) it must stand alone: "True or
    False" answers nothing. Without a mark the last such word of the text counts. Yes means True;
    "not true" answers nothing.
    """
    marked = find_marked(text)
    found = _TRUTH.findall(marked[0] if marked else text)
    meant = [None if negated else word.lower() in ("true", "yes") for negated, word in found]
    if not meant or meant[-1] is None or (marked and len(set(meant)) > 1):
        return None
    return str(meant[-1])


def verify_truth(problem: Problem, gold: Gold, text: str) -> Verdict:
    """Compares the True or False that `text` ends on with the gold answer.

    Levels: -1 neither, 0 wrong, 2 right.

    Raises:
      ValueError: the gold answer is neither.
    """
    if gold.answer is None:
        return judge(None, "no gold answer to compare with")
    expected = extract_truth(gold.answer)
    if expected is None:
        raise ValueError(f"{problem.id}: gold answer {gold.answer!r} is neither True nor False")
    found = extract_truth(text)
    if found is None:
        return grade(-1, "neither True nor False")
    return grade(2 if found == expected else 0, f"{found}, expected {expected}")
