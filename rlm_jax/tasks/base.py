"""What a task is: problems, golds, verdicts, and the functions that make and check them.

The one idea: what a solver may see (`Problem`) and what only a verifier may see (`Gold`) are two
types. A search is handed problems and nothing else, so it cannot lean on the answer by accident.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from rlm_jax.tasks.device import DeviceTask

Message = dict[str, str]
"""One chat message: `{"role": "system" | "user" | "assistant", "content": text}`."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a solver may see.

    Attributes:
      question: the problem in words.
      data: the problem in numbers, where a task has such a form (Game of 24: its four numbers).
      id: names the problem in records; unique within a data set.
    """

    question: str
    data: tuple[Any, ...] = ()
    id: str = ""


@dataclasses.dataclass(frozen=True)
class Gold:
    """What only a verifier may see. `answer` is None when no answer is known or none is needed."""

    answer: str | None = None


class Verdict(NamedTuple):
    """How a text was judged.

    Attributes:
      correct: None when there is nothing to judge by.
      reward: 1.0 for correct, 0.0 otherwise (Blueprint A3, binary design).
      reason: one line for a person.
      level: finer than right or wrong, where a task grades so (x1's levels): -1 no valid answer,
        0 wrong, 1 partly right or not yet contradicted, 2 solved.
    """

    correct: bool | None
    reward: float
    reason: str
    level: int | None = None


Example = tuple[Problem, Gold]


@dataclasses.dataclass(frozen=True)
class Task:
    """A family of problems, as functions.

    Attributes:
      name: the family's name in records and flags.
      version: rises whenever prompts, extraction or verdicts change.
      self_verifying: answers can be checked from the problem alone; only then may a search use
        the verifier at test time.
      prompt: problem -> the chat that asks for its solution.
      extract: a solution's text -> its answer in canonical form, equal for equal answers (what a
        majority vote counts), or None when the text holds no answer.
      verify: (problem, gold, a solution's text) -> verdict.
      load: a table in the task's published format (csv) -> examples, where there is one.
      read_row: an object of a JSONL file and its one-based line -> example, where the task's files
        have fields of their own, or None for an object without these; raises ValueError for what
        is no problem.
      generate: (seed, num_problems, difficulty in [0, 1]) -> examples, where they can be made.
      read: a problem as a person types it -> the problem, where that takes more than its words;
        raises ValueError for what is none.
      notation: problem -> the text that models trained on the task read and nothing else; where a
        tokenizer has no chat template it takes the place of `prompt`.
      device: the checker of steps on token ids, where there is one; only self-verifying tasks.
      drop_errors: (problem, the text of a chain) -> the chain without steps that do not follow, and
        without what stands on them, where steps say what they leave (`StepCheck.claims`).
    """

    name: str
    version: int
    self_verifying: bool
    prompt: Callable[[Problem], list[Message]]
    extract: Callable[[str], str | None]
    verify: Callable[[Problem, Gold, str], Verdict]
    load: Callable[[str | os.PathLike[str]], list[Example]] | None = None
    read_row: Callable[[dict[str, Any], int], Example | None] | None = None
    generate: Callable[[int, int, float], list[Example]] | None = None
    read: Callable[[str], Problem] | None = None
    notation: Callable[[Problem], str] | None = None
    device: DeviceTask | None = None
    drop_errors: Callable[[Problem, str], str] | None = None

    def keep_sound(self, problem: Problem, text: str, may_err: bool) -> str:
        """What is judged of a chain: all of it, or, of one that `may_err`, what follows.

        Raises:
          ValueError: `may_err`, and the task cannot say what follows.
        """
        if not may_err:
            return text
        if self.drop_errors is None:
            raise ValueError(f"may_err=True: accepted is False for task {self.name}")
        return self.drop_errors(problem, text)


def judge(correct: bool | None, reason: str) -> Verdict:
    """A verdict with the binary reward."""
    return Verdict(correct, 1.0 if correct else 0.0, reason)


def grade(level: int, reason: str) -> Verdict:
    """A verdict with the binary reward out of a level; only level 2 is correct."""
    if level not in (-1, 0, 1, 2):
        raise ValueError(f"level {level}: accepted are -1, 0, 1 and 2")
    return judge(level == 2, reason)._replace(level=level)


def make_chat(instruction: str, example: tuple[str, str], question: str) -> list[Message]:
    """A chat that shows one solved example before it asks `question`."""
    shown_question, shown_solution = example
    return [
        {"role": "system", "content": instruction},
        {"role": "user", "content": shown_question},
        {"role": "assistant", "content": shown_solution},
        {"role": "user", "content": question},
    ]
