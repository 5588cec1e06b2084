"""What an earlier run left, and whether this one may go on with it.

The one idea: a record and a figure are of a model, settings and problems. They are kept where all
of these are as they were; what differs is named, before a model is loaded.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlm_jax.data.records import Record, list_changes, read_records
from rlm_jax.tasks.base import Example, Problem


def require_same(holds: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses what was made in another way; every name in `now` counts.

    Args:
      holds: what is there, as "FILE holds records of greedy".

    Raises:
      ValueError: something differs, by its name.
    """
    other = list_changes(then, now)
    if other:
        raise ValueError(
            f"{holds} with {', '.join(other)}; name another --out, or go on with the same settings"
        )


def read_finished(
    path: str | os.PathLike[str],
    strategy: str,
    settings: Mapping[str, Any],
    problems: Sequence[Problem],
) -> Iterator[Record]:
    """The records of a strategy in a file; none where there is no file yet.

    Args:
      settings: of this run, with its seed. problems: of this run; the file may hold others.

    Raises:
      ValueError: a record of the strategy under other settings, or of another question under the
        id of one of the problems; a line that is no record.
    """
    if not os.path.exists(path):
        return
    questions = {problem.id: problem.question for problem in problems}
    for record in read_records(path):
        if record["strategy"] != strategy:
            continue
        then = record["config"] | {"seed": record["seed"]}
        require_same(f"{path} holds records of {strategy}", then, settings)
        if questions.get(record["id"], record["question"]) != record["question"]:
            raise ValueError(
                f"{path} holds another question under the id {record['id']!r}; name another --out"
            )
        yield record


def digest_problems(examples: Sequence[Example]) -> str:
    """Short, and another one for other problems, answers or ids, or another order of them."""
    said = [(problem.id, problem.question, gold.answer) for problem, gold in examples]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
