"""Answers questions by search: a chain, best-of-N, a tree, or all of them side by side.

    python experiments/solve.py --config=configs/smollm2.py --question="..." --strategy=puct
    python experiments/solve.py --config=configs/smollm2.py --problems=FILE.jsonl --out=DIR

One question prints its reasoning tree; a file of problems (one JSON object a line: `question`,
optional `answer`, optional `id`) gets one record a problem in DIR/records.jsonl. Records are
written as they are finished; the same command started again goes on where it stopped.
"""

import contextlib
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import launching
from absl import flags
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
flags.adopt_module_key_flags(launching)

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
        )
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
            if _QUESTION.value is not None:
                raise
            _say(console, f"problem {problem.id!r:.80} skipped: {error}")
    encoded.sort(key=lambda pair: solver.bucket_width(one, pair[0]))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        bar = progress.add_task(name, total=len(encoded), status="")
        for batch in _batches(one, encoded):
            progress.update(bar, status="compiling")
            solver.prepare(one, solver.bucket_width(one, batch[0][0]))
            progress.update(bar, status="searching")
            for record in solver.solve_batch(
                one, [item for item, _ in batch], [gold for _, gold in batch], launching.wait
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
