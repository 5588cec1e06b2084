"""Answers questions by search: a chain, best-of-N, a tree, or all of them side by side.

    python experiments/solve.py --config=configs/smollm2.py --question="..."
    python experiments/solve.py --config=configs/smollm2.py --problems=FILE.jsonl --out=DIR

One question prints its reasoning tree; a file of problems (one JSON object a line: `question`,
optional `answer`, optional `id`) gets one record a problem in DIR/records.jsonl. Records are
written as they are finished; the same command started again goes on where it stopped.
"""

import contextlib
import functools
import itertools
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import launching
import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.live import Live
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
from rlm_jax.viz import progress
from rlm_jax.viz.text import render_summary, render_tree

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_QUESTION = flags.DEFINE_string("question", None, "A question to answer.")
_ANSWER = flags.DEFINE_string("answer", None, "Its answer, for grading after the search only.")
_PROBLEMS = flags.DEFINE_string("problems", None, "A JSONL file of problems.")
_STRATEGY = flags.DEFINE_list(
    "strategy", ["gumbel"], f"One or more of {', '.join(build.STRATEGIES)}, separated by commas."
)
_BUDGET_TOKENS = flags.DEFINE_integer(
    "budget_tokens", None, "Tokens each strategy may generate per problem (default: the config's)."
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the sampling.", lower_bound=0, upper_bound=2**32 - 1
)
_DRIVER = flags.DEFINE_enum(
    "driver", "compiled", ["compiled", "host"], "Loop on the device, or on the host round by round."
)
_OUT = flags.DEFINE_string("out", None, "Folder for records.jsonl.")
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Take only the first problems of the file.", lower_bound=1
)
_WATCH = flags.DEFINE_bool("watch", False, "Show each round of the running searches.")
_MAX_LINES = flags.DEFINE_integer(
    "max_lines", 40, "Lines a drawn tree may take; the rest is folded.", lower_bound=4
)
flags.adopt_module_key_flags(launching)

# Rounds between two looks at a running search.
CHUNK_ROUNDS = 16

Job = tuple[str, build.Plan, list[Example]]


def main() -> None:
    """Checks the flags, loads the model, solves, prints."""
    console = Console()
    config = launching.read_config(_CONFIG)
    if _BUDGET_TOKENS.value is not None:
        config["budget_tokens"] = _BUDGET_TOKENS.value
    plans = _plan_strategies(config)
    examples = _read_examples(console)
    with _open_records() as writer:
        jobs = [
            (name, plan, _unfinished(writer, name, plan, examples)) for name, plan in plans.items()
        ]
        if writer is not None and not any(todo for _, _, todo in jobs):
            _say(console, f"nothing left to do: {writer.path} has all {len(examples)} problems")
        else:
            launching.use_compilation_cache()
            started = time.monotonic()
            policy = build.load_policy(config["model"], config["dtype"], config["quantize"])
            _say(
                console,
                f"loaded {policy.version} in {time.monotonic() - started:.1f} s "
                f"({jax.default_backend()}, {config['dtype']})",
            )
            # Of the file, not of what is left of it: a restart computes what an undisturbed run
            # would have computed, in batches of the same size.
            batch_size = min(config["batch_size"], len(examples))
            _solve_all(console, config, jobs, policy, writer, batch_size)
        if writer is not None:
            _print_file_summary(console, writer, plans)


def _plan_strategies(config: dict[str, Any]) -> dict[str, build.Plan]:
    names = [name.strip() for name in _STRATEGY.value if name.strip()]
    if not names:
        raise ValueError(f"--strategy is empty: accepted are {', '.join(build.STRATEGIES)}")
    return {name: build.plan_strategy(config, name) for name in dict.fromkeys(names)}


def _read_examples(console: Console) -> list[Example]:
    """The problems of either flag, and what was wrong with the file's other lines."""
    question, path = _QUESTION.value, _PROBLEMS.value
    if question is not None and path is not None:
        raise ValueError("--question and --problems are given: accepted is one of them")
    if question is not None:
        return [_read_question(question.strip())]
    if path is None:
        raise ValueError("no problem given: accepted is --question=TEXT or --problems=FILE.jsonl")
    if _ANSWER.value is not None:
        raise ValueError("--answer belongs to --question; a file holds its own answers")
    found = read_problems(path)
    for line in found.malformed:
        _say(console, f"{path}: line {line.line} skipped: {line.reason}")
    if found.malformed:
        count = len(found.malformed)
        _say(console, f"{count} malformed {'line' if count == 1 else 'lines'} skipped")
    if not found.examples:
        raise ValueError(f"--problems={path} holds no problem")
    return found.examples[: _LIMIT.value]


def _read_question(question: str) -> Example:
    if not question:
        raise ValueError("--question is empty")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise ValueError("--question is not UTF-8") from None
    return Problem(question, id="question"), Gold(_ANSWER.value)


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
      ValueError: the file holds records of the strategy under other settings or another seed,
        or another question under the id of one of the examples.
    """
    if writer is None:
        return examples
    questions = {problem.id: problem.question for problem, _ in examples}
    done = set()
    for record in read_records(writer.path):
        if record["strategy"] != name:
            continue
        _check_same_run(writer.path, record, plan)
        if questions.get(record["id"], record["question"]) != record["question"]:
            raise ValueError(
                f"{writer.path} holds another question under the id {record['id']!r}; "
                "name another --out"
            )
        done.add(record["id"])
    return [example for example in examples if example[0].id not in done]


def _check_same_run(path: pathlib.Path, record: Record, plan: build.Plan) -> None:
    now = plan.settings | {"seed": _SEED.value}
    then = record["config"] | {"seed": record["seed"]}
    other = [
        f"{key}={then.get(key)!r} (now {value!r})"
        for key, value in now.items()
        if then.get(key) != value
    ]
    if other:
        raise ValueError(
            f"{path} holds records of {record['strategy']} with {', '.join(other)}; "
            "name another --out, or go on with the same settings"
        )


def _solve_all(
    console: Console,
    config: dict[str, Any],
    jobs: Sequence[Job],
    policy: build.Policy,
    writer: RecordWriter | None,
    batch_size: int,
) -> None:
    shown = []
    for name, plan, examples in jobs:
        if not examples:
            continue
        one = build.build_solver(
            config,
            plan,
            policy,
            seed=_SEED.value,
            batch_size=batch_size,
            driver=_DRIVER.value,
            chunk_rounds=1 if _WATCH.value else CHUNK_ROUNDS,
        )
        for record in _solve_examples(console, name, one, examples):
            if writer is not None:
                writer.write(record)
            if _QUESTION.value is not None:
                shown.append(record)
                console.rule(f"[bold]{name}", align="left")
                console.print(render_tree(record, max_lines=_MAX_LINES.value))
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
            if _QUESTION.value is not None:
                raise
            _say(console, f"problem {problem.id!r:.80} skipped: {error}")
    encoded.sort(key=lambda pair: solver.bucket_width(one, pair[0]))
    watch = _Watch(console, name, len(encoded))
    with watch.live:
        for _, group in itertools.groupby(encoded, lambda pair: solver.bucket_width(one, pair[0])):
            items, golds = zip(*group, strict=True)
            watch.say("compiling")
            solver.prepare(one, solver.bucket_width(one, items[0]))
            watch.start()
            stream = solver.solve_stream(
                one, items, golds, launching.wait, functools.partial(watch.look, items)
            )
            for _, record in stream:
                watch.count(record)
                yield record


class _Watch:
    """Shows how a search is getting on: a bar, or with --watch a table of what is running."""

    def __init__(self, console: Console, name: str, num_problems: int):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.console = console
        self.bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self.task = self.bar.add_task(name, total=num_problems, status="")
        self.table = Live(console=console, transient=True)
        self.in_table = _WATCH.value and console.is_terminal
        self.live = self.table if self.in_table else self.bar
        self.num_problems, self.num_done, self.tokens = num_problems, 0, 0
        self.started = 0.0

    def start(self) -> None:
        """The clock runs from here: compilation is not the search's pace."""
        self.say("searching")
        self.started = self.started or time.monotonic()

    def say(self, status: str) -> None:
        self.bar.update(self.task, status=status)

    def count(self, record: Record) -> None:
        self.num_done += 1
        self.tokens += record["budget"]["generated_tokens"]
        self.bar.advance(self.task)

    def look(self, items: Sequence[solver.Encoded], search: Any, places: Sequence[int]) -> None:
        """Called after each chunk of rounds."""
        rows = [row for row, place in enumerate(places) if place >= 0]
        now = progress.measure_progress(
            jax.tree.map(lambda array: np.asarray(array)[rows], search.structure),
            [items[places[row]].problem.id for row in rows],
            rounds=np.asarray(search.rounds)[rows],
            running=np.asarray(search.running)[rows],
            problems_done=self.num_done,
            num_problems=self.num_problems,
            earlier_tokens=self.tokens,
            seconds=time.monotonic() - self.started,
        )
        if self.in_table:
            self.table.update(progress.render_progress(now))
        elif _WATCH.value:
            _say(self.console, progress.format_progress(now))
        else:
            self.say(f"round {now.rounds.max()}, {now.total_tokens} tokens")


def _print_file_summary(console: Console, writer: RecordWriter, names: Iterable[str]) -> None:
    for name in names:
        records = [r for r in read_records(writer.path) if r["strategy"] == name]
        graded = [r["correct"] for r in records if r["correct"] is not None]
        tokens = sum(r["budget"]["generated_tokens"] for r in records)
        right = f", {sum(graded)}/{len(graded)} correct" if graded else ""
        _say(console, f"{name}: {len(records)} records{right}, {tokens} tokens generated")
    _say(console, f"records: {writer.path}")


def _say(console: Console, line: str) -> None:
    """Prints a line as it is: never styled, and never broken where a file takes the output."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    launching.launch(main, "stopped; finished records are kept, the same command goes on")
