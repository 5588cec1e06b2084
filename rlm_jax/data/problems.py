"""Files of problems, one JSON object a line: `question`, optional `answer`, optional `id`.

The one idea: a bad line costs that line and nothing else. It is reported with its number and a
reason and skipped; everything else is kept. The answer goes into the gold and nowhere else. Of a
task whose problems are more than words, lines may hold the task's own fields (Countdown: `numbers`
and `target`) or a question in a form that it reads, and published tables (csv) are read too.
`write_problems` writes generated ones, whose `data` (`Problem.data`) stands in the line.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from rlm_jax.core.files import write_whole
from rlm_jax.tasks.base import Example, Gold, Problem, Task

MAX_LINE_BYTES = 1 << 20


class Malformed(NamedTuple):
    """A line that was skipped: its one-based number and what is wrong with it."""

    line: int
    reason: str


class ProblemFile(NamedTuple):
    """What a file of problems held."""

    examples: list[Example]
    malformed: list[Malformed]


def read_problems(path: str | os.PathLike[str], task: Task | None = None) -> ProblemFile:
    """Reads problems from a JSONL file, or a task's published table.

    Blank lines, CRLF, a byte-order mark and unknown fields are fine. A problem without an id gets
    one of its question and line number.

    Args:
      task: what the problems are of; None for questions in words.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the path is a folder, or a table with a row that is no problem.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; --problems takes a JSONL file")
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file of problems: {path}")
    if task is not None and task.load is not None and os.fspath(path).endswith(".csv"):
        return ProblemFile(task.load(path), [])
    examples: list[Example] = []
    malformed: list[Malformed] = []
    lines_by_id: dict[str, int] = {}
    with open(path, "rb") as file:
        for number, line in _iterate_lines(file):
            try:
                example = _parse_line(number, line, task)
                if example is None:
                    continue
                if task is not None:
                    # Says now, and not behind a search, what it cannot read.
                    (task.notation or task.prompt)(example[0])
                    task.verify(*example, "")
                first = lines_by_id.setdefault(example[0].id, number)
                if first != number:
                    raise ValueError(f"id {example[0].id!r} is taken by line {first}")
                examples.append(example)
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                malformed.append(Malformed(number, str(error)))
    return ProblemFile(examples, malformed)


def write_problems(path: str | os.PathLike[str], examples: Iterable[Example]) -> int:
    """Writes a file that `read_problems` reads as the same examples; returns how many there are.

    The file appears complete or not at all.
    """
    count = 0
    with write_whole(path) as beside, beside.open("w", encoding="utf-8") as file:
        for count, (problem, gold) in enumerate(examples, 1):  # noqa: B007
            row = {"id": problem.id, "question": problem.question, "answer": gold.answer}
            if problem.data:
                row["data"] = problem.data
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def to_tuples(value: Any) -> Any:
    """A JSON value with tuples in place of lists, as `Problem.data` is."""
    return tuple(map(to_tuples, value)) if isinstance(value, list) else value


def _iterate_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, each cut just past `MAX_LINE_BYTES`, so that none fills the memory."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
        yield number, line


def _parse_line(number: int, line: bytes, task: Task | None) -> Example | None:
    """The example on a line, or None for a blank one; ValueError says what is wrong."""
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        return None
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES} bytes")
    fields = _parse_object(line)
    own = None if task is None or task.read_row is None else task.read_row(fields, number)
    if own is not None:
        problem, gold = own
        return dataclasses.replace(problem, id=_read_scalar(fields, "id") or problem.id), gold
    question = fields.get("question")
    if question is None:
        raise ValueError('no field "question"')
    if not isinstance(question, str):
        raise ValueError(f'"question" is no string: {question!r:.60}')
    if not question.strip():
        raise ValueError('"question" is empty')
    answer = _read_scalar(fields, "answer")
    default_id = f"{hashlib.sha256(question.encode()).hexdigest()[:12]}-{number}"
    data = fields.get("data")
    if isinstance(data, list):
        problem = Problem(question.strip(), to_tuples(data))
    elif task is None or task.read is None:
        problem = Problem(question.strip())
    else:
        problem = task.read(question.strip())
    return dataclasses.replace(problem, id=_read_scalar(fields, "id") or default_id), Gold(answer)


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from None
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object but {type(fields).__name__}")
    try:
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"not JSON: {name} is no JSON number")


def _read_scalar(fields: dict[str, Any], name: str) -> str | None:
    """A string, or a number written as one; None when missing, null or blank."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise ValueError(f'"{name}" is neither a string nor a number: {value!r:.60}')
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'"{name}" is too large a number')
    return None if value is None else str(value).strip() or None
