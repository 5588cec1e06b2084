"""Any data set by its name: `python -m rlm_jax.data.builders.build NAME DATA_DIR [options]`.

A name is "gsm8k", "countdown", or another task that generates problems ("arithmetic", ...): the
module of that name in `rlm_jax.tasks` says so by itself.
"""

import argparse
import importlib
import os
import pathlib
import pkgutil
from typing import Any

import rlm_jax.tasks
from rlm_jax.data.builders.countdown.countdown_dataset_builder import (
    CountdownSpec,
    build_countdown,
)
from rlm_jax.data.builders.gsm8k.gsm8k_dataset_builder import build_gsm8k
from rlm_jax.data.builders.puzzles.puzzles_dataset_builder import PuzzleSpec, build_puzzles
from rlm_jax.data.builders.reading import to_example
from rlm_jax.data.iterators import Source
from rlm_jax.data.problems import write_problems
from rlm_jax.tasks.base import Task


def build(name: str, data_dir: str | os.PathLike[str], **options: Any) -> dict[str, Source]:
    """Makes a data set where it is not yet and opens its splits.

    Args:
      name: "gsm8k", "countdown", or the name of another generating task.
      data_dir: where data sets are kept.
      **options: `manual_dir` for gsm8k; the fields of `CountdownSpec` for countdown, whose test
        problems are held out by rule; those of `PuzzleSpec` for other tasks.

    Raises:
      ValueError: no such data set; and what `build_gsm8k`, `build_countdown` and `build_puzzles`
        raise.
    """
    if name == "gsm8k":
        return build_gsm8k(data_dir, **options)
    if name == "countdown":
        return build_countdown(CountdownSpec(**options), data_dir)
    tasks = find_generating_tasks()
    if name not in tasks:
        raise ValueError(f"no data set {name!r}; accepted: gsm8k, {', '.join(sorted(tasks))}")
    return build_puzzles(PuzzleSpec(tasks[name], **options), data_dir)


def find_generating_tasks() -> dict[str, Task]:
    """The tasks that make problems of their own, by name."""
    tasks = {}
    for module in pkgutil.iter_modules(rlm_jax.tasks.__path__, "rlm_jax.tasks."):
        task = getattr(importlib.import_module(module.name), "TASK", None)
        if task is not None and task.generate is not None:
            tasks[task.name] = task
    return tasks


def main(arguments: list[str] | None = None) -> None:
    """Makes a data set, says how large its splits are, and writes those for tests if asked to."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name")
    parser.add_argument("data_dir")
    parser.add_argument("--manual_dir", help="gsm8k: folder with train.jsonl and test.jsonl")
    parser.add_argument("--size", type=int, help="countdown: numbers of a problem, 3 to 6")
    for flag in ("seed", "num_train", "num_validation", "num_test"):
        parser.add_argument(f"--{flag}", type=int)
    parser.add_argument("--difficulty", type=float)
    parser.add_argument(
        "--problems_dir", help="folder for files of its test problems (solve.py --problems)"
    )
    given = vars(parser.parse_args(arguments))
    name, data_dir, folder = (given.pop(key) for key in ("name", "data_dir", "problems_dir"))
    try:
        splits = build(name, data_dir, **{k: v for k, v in given.items() if v is not None})
    except (ValueError, FileNotFoundError, TypeError) as error:
        parser.error(str(error))
    for split, source in splits.items():
        print(f"{name}/{split}: {len(source)} problems")
        if folder is not None and split.startswith("test"):
            path = pathlib.Path(folder) / f"{name}-{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_problems(path, (to_example(source[row]) for row in range(len(source))))
            print(f"  written to {path}")


if __name__ == "__main__":
    main()
