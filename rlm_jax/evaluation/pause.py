"""Running searches to a file and back, so that a stopped run goes on as if nothing had happened.

The file holds the search (numbers only) and what says whose search it is: the settings of the run,
the problem of each row, and a digest of every question. A search goes on under the same settings
and questions alone; whatever differs is named before a model is loaded.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlm_jax.core.snapshot import load_snapshot, read_about, save_snapshot
from rlm_jax.data.records import list_changes
from rlm_jax.evaluation.programs import Programs
from rlm_jax.evaluation.solver import Encoded, Running, Slot
from rlm_jax.reasoning.structure import NO_NODE
from rlm_jax.tasks.base import Problem

Settings = Mapping[str, Any]


class Saved(NamedTuple):
    """A saved search: the width of its prompts; row, problem id and seconds of each taken row."""

    path: pathlib.Path
    width: int
    rows: tuple[tuple[int, str, float], ...]


def save_running(
    path: pathlib.Path,
    running: Running,
    batch: Sequence[Encoded],
    width: int,
    settings: Settings,
    problems: Sequence[Problem],
) -> None:
    """Writes a batch of searches under way; an older file is replaced.

    Args:
      batch: what the places of `running` mean. settings: flat scalars that must not change until
        the search goes on. problems: of the whole run, those finished among them.
    """
    rows = [
        [row, batch[slot.place].problem.id, slot.seconds]
        for row, slot in enumerate(running.slots)
        if slot is not None
    ]
    about = {
        "settings": dict(settings),
        "problems": _digest(problems),
        "width": width,
        "rows": rows,
    }
    save_snapshot(path, running.search, about)


def find_saved(path: pathlib.Path, settings: Settings, problems: Sequence[Problem]) -> Saved | None:
    """What was saved, if anything was and it belongs to this run.

    Problems that came to the run since then are welcome: none of the saved searches knows of them.

    Raises:
      ValueError: another setting, a problem that is gone or asks something else, or no snapshot;
        all that differs is named.
    """
    if not path.exists():
        return None
    about = read_about(path)
    try:
        then, questions = dict(about["settings"]), dict(about["problems"])
        rows = tuple((int(row), str(name), float(spent)) for row, name, spent in about["rows"])
        saved = Saved(path, int(about["width"]), rows)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} holds no search of this program") from None
    other = list_changes(then, {**dict.fromkeys(then), **settings})
    now = _digest(problems)
    gone = [f"problem {name!r:.80} (now gone)" for name in questions if name not in now]
    asks = [
        f"another question of problem {name!r:.80}"
        for name, digest in questions.items()
        if now.get(name, digest) != digest
    ]
    found = [*other, *gone[:3], *asks[:3]]
    if found:
        raise ValueError(
            f"{path} holds running searches with {', '.join(found)}; go on as before, name another "
            "--out, or delete that file to begin them anew"
        )
    return saved


def load_running(saved: Saved, programs: Programs, batch: Sequence[Encoded]) -> Running:
    """The saved searches, of those problems that are in the batch; the others' rows are free.

    Raises:
      ValueError: the file does not fit the programs.
    """
    place_of = {one.problem.id: place for place, one in enumerate(batch)}
    search = load_snapshot(saved.path, programs.like)
    num_rows = search.request.nodes.shape[0]
    slots: list[Slot | None] = [None] * num_rows
    for row, name, seconds in saved.rows:
        if name in place_of and 0 <= row < num_rows:
            slots[row] = Slot(place_of[name], seconds)
    # A row whose record was written since is not to be searched once more.
    free = jnp.asarray([slot is None for slot in slots])
    nodes = jnp.where(free[:, None], NO_NODE, search.request.nodes)
    search = dataclasses.replace(search, request=dataclasses.replace(search.request, nodes=nodes))
    search = jax.tree.map(
        lambda array, like: jax.device_put(array, like.sharding), search, programs.like
    )
    taken = {slot.place for slot in slots if slot is not None}
    waiting = tuple(place for place in range(len(batch)) if place not in taken)
    return Running(search, tuple(slots), waiting)


def _digest(problems: Sequence[Problem]) -> dict[str, str]:
    return {one.id: hashlib.sha256(one.question.encode()).hexdigest()[:16] for one in problems}
