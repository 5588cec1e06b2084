"""Free-form questions: a user's own, with an answer to grade by when the user gave one.

Two answers are equal when both are numbers and equal as numbers, or else when their words are
equal but for case, punctuation and articles.
"""

import re

from rlm_jax.tasks.answers import find_marked, find_numbers, format_number, parse_number
from rlm_jax.tasks.base import Gold, Message, Problem, Task, Verdict, judge
from rlm_jax.tasks.gsm8k import prompt as prompt_math

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# C# is a word, # 5 holds one.
_NO_WORDS = re.compile(r"[^\w.%+/*#-]+|(?<!\w)#+|(?<!\d)\.|\.(?!\d)")


def prompt(problem: Problem) -> list[Message]:
    """The word-problem prompt: steps a line, answer behind ####."""
    return prompt_math(problem)


def normalize(answer: str) -> str:
    """The canonical form of an answer: a number's, or else its words in lower case."""
    plain = _NO_WORDS.sub(" ", answer.lower())
    # A choice may be called A.
    words = " ".join(_ARTICLES.sub(" ", plain).split() or plain.split())
    for text in (answer, words):
        value = parse_number(text)
        if value is not None:
            return format_number(value)
    return words


def extract(text: str) -> str | None:
    """What stands behind the last answer mark; without one, the last number or the last line."""
    for segment in find_marked(text):
        answer = normalize(segment)
        if answer:
            return answer
    line = _last_line(text)
    numbers = find_numbers(line)
    return format_number(numbers[-1]) if numbers else normalize(line) or None


def verify(problem: Problem, gold: Gold, text: str) -> Verdict:
    """Compares the answer in `text` with the user's; undecided when there is none."""
    del problem
    if gold.answer is None:
        return judge(None, "no answer to compare with")
    # A worked solution, as GSM8K's answers are, names its answer behind a mark.
    marked = [answer for answer in map(normalize, find_marked(gold.answer)) if answer]
    expected, found = (marked or [normalize(gold.answer)])[0], extract(text)
    if found is None:
        return judge(False, "no answer in the text")
    right = found == expected
    if not right and not any(map(normalize, find_marked(text))):
        # An answer may be words with a number in them.
        right = normalize(_last_line(text)) == expected
        found = expected if right else found
    return judge(right, f"{found} {'=' if right else '≠'} {expected}")


def _last_line(text: str) -> str:
    """The last line with something on it."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


TASK = Task("free", 1, False, prompt, extract, verify)
