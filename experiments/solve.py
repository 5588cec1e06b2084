"""Answers questions by search: a chain, best-of-N, a tree, or all of them side by side.

    python experiments/solve.py --config=configs/smollm2.py --question="..." --strategy=puct
    python experiments/solve.py --config=configs/smollm2.py --problems=FILE.jsonl --out=DIR

One question prints its reasoning tree; a file of problems (one JSON object a line: `question`,
optional `answer`, optional `id`) gets one record a problem in DIR/records.jsonl. Records are
written as they are finished; the same command started again goes on where it stopped.
"""

import contextlib
import logging
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlm_jax.data.problems import read_problems
from rlm_jax.data.records import Record, RecordWriter, read_records
from rlm_jax.evaluation import build, solver
from rlm_jax.tasks.base import Example, Gold, Problem
from rlm_jax.viz.text import render_summary, render_tree

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_QUESTION = flags.DEFINE_string("question", None, "A question to answer.")
_ANSWER = flags.DEFINE_string("answer", None, "Its answer, for grading after the search only.")
_PROBLEMS = flags.DEFINE_string("problems", None, "A JSONL file of problems.")
_STRATEGY = flags.DEFINE_list(
    "strategy", ["puct"], f"One or more of {', '.join(build.STRATEGIES)}, separated by commas."
)
_BUDGET_TOKENS = flags.DEFINE_integer(
    "budget_tokens", None, "Tokens each strategy may generate per problem (default: the config's)."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
_OUT = flags.DEFINE_string("out", None, "Folder for records.jsonl.")
_LIMIT = flags.DEFINE_integer("limit", None, "Take only the first problems of the file.")
_CACHE = flags.DEFINE_string(
    "compilation_cache", "~/.cache/rlm_jax/xla", "Folder of compiled programs; empty for none."
)

Job = tuple[str, build.Plan, list[Example]]


def main(argv: Sequence[str]) -> None:
    """Checks the flags, loads the model, solves, prints."""
    if len(argv) > 1:
        raise ValueError(f"not a flag: {argv[1]!r}")
    console = Console(stderr=False)
    config = _read_config()
    plans = {name: build.plan_strategy(config, name) for name in dict.fromkeys(_STRATEGY.value)}
    examples = _read_examples(console)
    with _open_records() as writer:
        jobs = [
            (name, plan, _unfinished(writer, name, plan, examples)) for name, plan in plans.items()
        ]
        if not any(todo for _, _, todo in jobs):
            console.print(f"all {len(examples)} problems are in {writer.path if writer else ''}")
        else:
            _use_compilation_cache()
            started = time.monotonic()
            policy = build.load_policy(config.model, config.dtype)
            console.print(
                f"loaded {policy.version} in {time.monotonic() - started:.1f} s "
                f"({jax.default_backend()}, {config.dtype})",
                highlight=False,
            )
            _solve_all(console, config, jobs, policy, writer)
        if writer is not None:
            _print_file_summary(console, writer, plans)


def _read_config() -> Any:
    if _CONFIG.value is None:
        raise ValueError("--config is missing: name a file of configs/, as configs/smollm2.py")
    config = _CONFIG.value.copy_and_resolve_references()
    with config.unlocked():
        if _BUDGET_TOKENS.value is not None:
            config.budget_tokens = _BUDGET_TOKENS.value
    return config


def _read_examples(console: Console) -> list[Example]:
    """The problems of either flag, and what was wrong with the file's other lines."""
    if (_QUESTION.value is None) == (_PROBLEMS.value is None):
        raise ValueError("give either --question or --problems")
    if _QUESTION.value is not None:
        if not _QUESTION.value.strip():
            raise ValueError("--question is empty")
        return [(Problem(_QUESTION.value.strip(), id="question"), Gold(_ANSWER.value))]
    found = read_problems(_PROBLEMS.value)
    for line in found.malformed:
        console.print(f"{_PROBLEMS.value}: line {line.line} skipped: {line.reason}", markup=False)
    if found.malformed:
        console.print(f"{len(found.malformed)} malformed lines skipped", markup=False)
    if not found.examples:
        raise ValueError(f"--problems={_PROBLEMS.value} holds no problem")
    return found.examples[: _LIMIT.value]


@contextlib.contextmanager
def _open_records() -> Iterator[RecordWriter | None]:
    """The writer of records.jsonl; none for a single question without --out."""
    if _OUT.value is None and _PROBLEMS.value is None:
        yield None
        return
    default = pathlib.Path("runs") / f"solve-{pathlib.Path(_PROBLEMS.value or 'question').stem}"
    folder = pathlib.Path(_OUT.value) if _OUT.value else default
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out={folder} is a file; accepted is a folder")
    with RecordWriter(folder / "records.jsonl") as writer:
        yield writer


def _unfinished(
    writer: RecordWriter | None, name: str, plan: build.Plan, examples: list[Example]
) -> list[Example]:
    """Problems without a record of this strategy yet.

    Raises:
      ValueError: the file holds records of the strategy under other settings or another seed.
    """
    if writer is None:
        return examples
    done = set()
    for record in read_records(writer.path):
        if record["strategy"] != name:
            continue
        other = {k for k in plan.settings if record["config"].get(k) != plan.settings[k]}
        if other or record["seed"] != _SEED.value:
            what = sorted(other) or ["seed"]
            raise ValueError(
                f"{writer.path} holds records of {name} with another {', '.join(what)}; "
                "name another --out, or go on with the same settings"
            )
        done.add(record["id"])
    return [example for example in examples if example[0].id not in done]


def _solve_all(
    console: Console,
    config: Any,
    jobs: Sequence[Job],
    policy: build.Policy,
    writer: RecordWriter | None,
) -> None:
    shown = []
    for name, plan, examples in jobs:
        if not examples:
            continue
        batch_size = min(config.batch_size, len(examples))
        one = build.build_solver(config, plan, policy, seed=_SEED.value, batch_size=batch_size)
        for record in _solve_examples(console, name, one, examples):
            if writer is not None:
                writer.write(record)
            if _QUESTION.value is not None:
                shown.append(record)
                console.rule(f"[bold]{name}", align="left")
                console.print(render_tree(record))
    if shown:
        console.rule("[bold]compared", align="left")
        console.print(render_summary(shown))


def _solve_examples(
    console: Console, name: str, one: solver.Solver, examples: list[Example]
) -> Iterator[Record]:
    """Records in the order they are finished: problems of one prompt bucket go together."""
    encoded = []
    for problem, gold in examples:
        try:
            encoded.append((solver.encode(one, problem), gold))
        except ValueError as error:
            if len(examples) == 1:
                raise
            console.print(f"problem {problem.id} skipped: {error}", markup=False)
    encoded.sort(key=lambda pair: solver.bucket_width(one, pair[0]))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(name, total=len(encoded), status="")
        for batch in _batches(one, encoded):
            progress.update(bar, status="searching" if one.programs else "compiling")
            for record in solver.solve_batch(
                one, [item for item, _ in batch], [gold for _, gold in batch], _wait
            ):
                yield record
                progress.advance(bar)


def _batches(one: solver.Solver, encoded: list) -> Iterator[list]:
    """Runs of at most batch_size problems that share a bucket."""
    batch = []
    for pair in encoded:
        width = solver.bucket_width(one, pair[0])
        if batch and (
            len(batch) == one.batch_size or solver.bucket_width(one, batch[0][0]) != width
        ):
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def _print_file_summary(console: Console, writer: RecordWriter, names: Any) -> None:
    for name in names:
        records = [r for r in read_records(writer.path) if r["strategy"] == name]
        graded = [r["correct"] for r in records if r["correct"] is not None]
        tokens = sum(r["budget"]["generated_tokens"] for r in records)
        right = f", {sum(graded)}/{len(graded)} correct" if graded else ""
        console.print(
            f"{name}: {len(records)} records{right}, {tokens} tokens generated", highlight=False
        )
    console.print(f"records: {writer.path}", highlight=False)


def _wait(tree: Any) -> None:
    """Waits for a running program in short naps, so that Ctrl-C gets through at once."""
    for array in jax.tree.leaves(tree):
        while not array.is_ready():
            time.sleep(0.01)


def _use_compilation_cache() -> None:
    """Keeps compiled programs on disk, apart by version and machine."""
    if not _CACHE.value:
        return
    folder = pathlib.Path(_CACHE.value).expanduser() / f"jax-{jax.__version__}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _stop(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _run() -> None:
    """Runs `main`; a user's mistake is one line, an interruption keeps what is written."""
    signal.signal(signal.SIGTERM, _stop)
    logging.getLogger("jax").setLevel(logging.WARNING)  # It tells of every backend not there.
    status = 0
    try:
        app.run(main)
    except (ValueError, FileNotFoundError) as error:
        print(f"solve.py: {error}", file=sys.stderr)
        status = 2
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        print("\nstopped; finished records are kept, the same command goes on", file=sys.stderr)
        status = 130
    sys.stdout.flush()
    sys.stderr.flush()
    # A search still running on the device would hold up an ordinary exit.
    os._exit(status)


if __name__ == "__main__":
    _run()
