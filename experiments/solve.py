"""Answers questions by search: a chain, best-of-N, a tree, or all of them side by side.

    python experiments/solve.py --config=configs/smollm2.py --question="..."
    python experiments/solve.py --config=configs/smollm2.py --problems=FILE.jsonl --out=DIR

One question prints its reasoning tree; a file of problems (one JSON object a line: `question`,
optional `answer`, optional `id`) gets one record a problem in DIR/records.jsonl. Records are
written as they are finished. Ctrl-C or SIGTERM saves the searches that are running, in
DIR/records.jsonl.STRATEGY.search.npz, and the same command goes on where it stopped; a second one
leaves at once. With --trace, DIR/trace.jsonl tells every operator call of each search.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import launching
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags
from rich.console import Console
from watching import Watch, say

from rlm_jax.core.stopping import catch_stop
from rlm_jax.data.problems import read_problems
from rlm_jax.data.records import RecordWriter, read_records
from rlm_jax.evaluation import build, pause, solver
from rlm_jax.evaluation.resume import read_finished
from rlm_jax.reasoning.drive import Limits
from rlm_jax.reasoning.sharding import count_shards
from rlm_jax.reasoning.structure import Structure
from rlm_jax.tasks.base import Example, Gold, Problem, Task
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
_REQUESTS_IN_FLIGHT = flags.DEFINE_integer(
    "requests_in_flight",
    None,
    "With --driver=host: problems that wait for the model at once, each at its own pace (default: "
    "all of a batch, in step). Stopping then loses the searches that are running.",
    lower_bound=1,
)
_MESH = flags.DEFINE_string(
    "mesh", None, "Devices, as data=8 or replica=2,data=2,model=2 (default: the first one)."
)
_STOP_VALUE = flags.DEFINE_float(
    "stop_value", None, "End a search with the first solution worth at least that."
)
_STOP_SHARE = flags.DEFINE_float(
    "stop_share", None, "End a search when one answer has this share of the votes."
)
_STOP_SOLUTIONS = flags.DEFINE_integer(
    "stop_solutions", 3, "Solutions that --stop_share waits for.", lower_bound=1
)
_STOP_PROVEN = flags.DEFINE_bool(
    "stop_proven", True, "End a search with the first answer that its task proves right."
)
_TRACE = flags.DEFINE_bool("trace", False, "Write every operator call to trace.jsonl.")
_OUT = flags.DEFINE_string("out", None, "Folder for records.jsonl.")
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Take only the first problems of the file.", lower_bound=1
)
_WATCH = flags.DEFINE_bool("watch", False, "Show each round of the running searches.")
_MAX_LINES = flags.DEFINE_integer(
    "max_lines", 40, "Lines a drawn tree may take; the rest is folded.", lower_bound=4
)
flags.adopt_module_key_flags(launching)

# Rounds between two looks at a running search, each of which it may be stopped at.
CHUNK_ROUNDS = 4


class Job(NamedTuple):
    """A strategy, what is left for it to do, and the searches it was in the middle of.

    path: where those are saved; None without a folder. settings: what they depend on.
    """

    name: str
    plan: build.Plan
    examples: list[Example]
    path: pathlib.Path | None
    settings: dict[str, Any]
    saved: pause.Saved | None


class Files(NamedTuple):
    """What a run writes: its records, and its operator log where one is wanted."""

    records: RecordWriter
    trace: RecordWriter | None


def main() -> None:
    """Checks the flags, loads the model, solves, prints."""
    console = Console()
    config = launching.read_config(_CONFIG)
    if _BUDGET_TOKENS.value is not None:
        config["budget_tokens"] = _BUDGET_TOKENS.value
    _check_in_flight()
    limits = _read_limits()
    plans = _plan_strategies(config, limits)
    examples = _read_examples(console, build.TASKS[config["task"]])
    mesh = launching.read_mesh(_MESH.value)
    # Of the file, not of what is left of it: a restart computes what an undisturbed run would have
    # computed, in batches of the same size.
    batch_size = _choose_batch_size(config["batch_size"], len(examples), mesh)
    with _open_files() as files:
        jobs = [
            _plan_job(config, name, plan, examples, files, batch_size)
            for name, plan in plans.items()
        ]
        if files is not None and not any(job.examples for job in jobs):
            say(
                console,
                f"nothing left to do: {files.records.path} has all {len(examples)} problems",
            )
        else:
            launching.use_compilation_cache()
            started = time.monotonic()
            policy = build.load_policy(config["model"], config["dtype"], config["quantize"])
            say(
                console,
                f"loaded {policy.version} in {time.monotonic() - started:.1f} s "
                f"({jax.default_backend()}, {config['dtype']})",
            )

            def make_solver(plan: build.Plan) -> solver.Solver:
                return _make_solver(config, plan, policy, batch_size, limits, mesh)

            problems = [problem for problem, _ in examples]
            _solve_all(console, jobs, make_solver, files, problems)
        if files is not None:
            _print_file_summary(console, files.records, plans)


def _check_in_flight() -> None:
    if _REQUESTS_IN_FLIGHT.value is None:
        return
    others = {
        f"--driver={_DRIVER.value}": _DRIVER.value != "host",
        f"--mesh={_MESH.value}": _MESH.value is not None,
        "--trace": _TRACE.value,
        "--watch": _WATCH.value,
    }
    for flag, is_given in others.items():
        if is_given:
            raise ValueError(
                f"--requests_in_flight={_REQUESTS_IN_FLIGHT.value} with {flag}: accepted is "
                "--driver=host, without --mesh, --trace and --watch"
            )


def _read_limits() -> Limits:
    value, share = _STOP_VALUE.value, _STOP_SHARE.value
    if value is not None and not math.isfinite(value):
        raise ValueError(f"--stop_value={value}: accepted are finite numbers")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"--stop_share={share}: accepted is above 0 and at most 1")
    return Limits(
        proven=_STOP_PROVEN.value,
        min_value=value,
        min_share=share,
        min_solutions=_STOP_SOLUTIONS.value,
    )


def _plan_strategies(config: dict[str, Any], limits: Limits) -> dict[str, build.Plan]:
    names = [name.strip() for name in _STRATEGY.value if name.strip()]
    if not names:
        raise ValueError(f"--strategy is empty: accepted are {', '.join(build.STRATEGIES)}")
    stops = {
        "stop_value": limits.min_value,
        "stop_share": limits.min_share,
        "stop_solutions": limits.min_solutions,
        "stop_proven": limits.proven,
    }
    plans = {name: build.plan_strategy(config, name) for name in dict.fromkeys(names)}
    return {name: plan._replace(settings=plan.settings | stops) for name, plan in plans.items()}


def _choose_batch_size(most: int, num_problems: int, mesh: Mesh | None) -> int:
    """As many rows as the problems need, in equal parts for the shards of a mesh."""
    shards = 1 if mesh is None else count_shards(mesh)
    if most % shards:
        raise ValueError(
            f"batch_size={most} cannot be split over --mesh={_MESH.value}: accepted are multiples "
            f"of replica * data = {shards}"
        )
    return min(most, -(-num_problems // shards) * shards)


def _read_examples(console: Console, task: Task) -> list[Example]:
    """The problems of either flag, and what was wrong with the file's other lines."""
    question, path = _QUESTION.value, _PROBLEMS.value
    if question is not None and path is not None:
        raise ValueError("--question and --problems are given: accepted is one of them")
    if question is not None:
        return [_read_question(task, question.strip())]
    if path is None:
        raise ValueError("no problem given: accepted is --question=TEXT or --problems=FILE.jsonl")
    if _ANSWER.value is not None:
        raise ValueError("--answer belongs to --question; a file holds its own answers")
    found = read_problems(path, task)
    for line in found.malformed:
        say(console, f"{path}: line {line.line} skipped: {line.reason}")
    if found.malformed:
        count = len(found.malformed)
        say(console, f"{count} malformed {'line' if count == 1 else 'lines'} skipped")
    if not found.examples:
        raise ValueError(f"--problems={path} holds no problem")
    return found.examples[: _LIMIT.value]


def _read_question(task: Task, question: str) -> Example:
    if not question:
        raise ValueError("--question is empty")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise ValueError("--question is not UTF-8") from None
    problem = Problem(question, id="question") if task.read is None else task.read(question)
    gold, answer = Gold(_ANSWER.value), _ANSWER.value
    if answer is not None:
        try:
            # Says now, and not behind a search, that it can grade nothing by the answer.
            task.verify(problem, gold, "")
        except ValueError as error:
            raise ValueError(
                f"--answer={answer!r:.60}: accepted is what task {task.name!r} grades by ({error})"
            ) from None
    return problem, gold


@contextlib.contextmanager
def _open_files() -> Iterator[Files | None]:
    """The files of a run's folder; none for a single question without --out."""
    if _OUT.value is None and _PROBLEMS.value is None:
        if _TRACE.value:
            raise ValueError("--trace needs a folder: name one by --out")
        yield None
        return
    default = pathlib.Path("runs") / f"solve-{pathlib.Path(_PROBLEMS.value or 'question').stem}"
    folder = pathlib.Path(_OUT.value) if _OUT.value else default
    launching.require_folder("out", folder)
    with contextlib.ExitStack() as stack:
        records = stack.enter_context(RecordWriter(folder / "records.jsonl"))
        trace = None
        if _TRACE.value:
            trace = stack.enter_context(RecordWriter(folder / "trace.jsonl", lambda line: None))
        yield Files(records, trace)


def _plan_job(
    config: dict[str, Any],
    name: str,
    plan: build.Plan,
    examples: list[Example],
    files: Files | None,
    batch_size: int,
) -> Job:
    """What is left of the examples, and what a run before was in the middle of.

    Raises:
      ValueError: records or running searches of that run do not go with this one.
    """
    settings = plan.settings | {
        "seed": _SEED.value,
        "batch_size": batch_size,
        "bucket_tokens": config["bucket_tokens"],
        "mesh": _MESH.value,
        "trace": _TRACE.value,
        "requests_in_flight": _REQUESTS_IN_FLIGHT.value,
    }
    if files is None:
        return Job(name, plan, examples, None, settings, None)
    left = _unfinished(files.records, name, plan, examples)
    path = files.records.path.with_name(f"{files.records.path.name}.{name}.search.npz")
    problems = [problem for problem, _ in examples]
    saved = pause.find_saved(path, settings, problems)
    return Job(name, plan, left, path, settings, saved)


def _unfinished(
    writer: RecordWriter, name: str, plan: build.Plan, examples: list[Example]
) -> list[Example]:
    """Problems without a record of this strategy yet.

    Raises:
      ValueError: the file holds records of the strategy under other settings or another seed,
        or another question under the id of one of the examples.
    """
    settings = plan.settings | {"seed": _SEED.value}
    problems = [problem for problem, _ in examples]
    done = {record["id"] for record in read_finished(writer.path, name, settings, problems)}
    return [example for example in examples if example[0].id not in done]


def _make_solver(
    config: dict[str, Any],
    plan: build.Plan,
    policy: build.Policy,
    batch_size: int,
    limits: Limits,
    mesh: Mesh | None,
) -> solver.Solver:
    one = build.build_solver(
        config,
        plan,
        policy,
        seed=_SEED.value,
        batch_size=batch_size,
        driver=_DRIVER.value,
        chunk_rounds=1 if _WATCH.value else CHUNK_ROUNDS,
    )
    one = dataclasses.replace(one, limits=limits, trace=_TRACE.value)
    return one if mesh is None else solver.spread_solver(one, mesh)


def _solve_all(
    console: Console,
    jobs: Sequence[Job],
    make_solver: Callable[[build.Plan], solver.Solver],
    files: Files | None,
    problems: Sequence[Problem],
) -> None:
    shown = []
    for job in jobs:
        if job.examples:
            one = make_solver(job.plan)
            for solved in _solve_examples(console, one, job, problems):
                if files is not None:
                    _write(files, solved)
                if _QUESTION.value is not None:
                    shown.append(solved.record)
                    console.rule(f"[bold]{job.name}", align="left")
                    console.print(render_tree(solved.record, max_lines=_MAX_LINES.value))
        if job.path is not None:
            job.path.unlink(missing_ok=True)
    if shown:
        console.rule("[bold]compared", align="left")
        console.print(render_summary(shown))


def _write(files: Files, solved: solver.Solved) -> None:
    """The events first: a record says that all of its problem is written."""
    if files.trace is not None and solved.events is not None:
        events = [
            {"round": event.round, "op": event.operator, "nodes": list(event.nodes)}
            for event in solved.events
        ]
        about = {name: solved.record[name] for name in ("id", "strategy", "seed")}
        files.trace.write({**about, "events": events})
    files.records.write(solved.record)


def _solve_examples(
    console: Console, one: solver.Solver, job: Job, problems: Sequence[Problem]
) -> Iterator[solver.Solved]:
    """Records in the order they are finished: problems of one prompt bucket go together."""
    encoded = []
    for problem, gold in job.examples:
        try:
            encoded.append((solver.encode(one, problem), gold))
        except ValueError as error:
            if _QUESTION.value is not None:
                raise
            say(console, f"problem {problem.id!r:.80} skipped: {error}")
    # Searches that were stopped go on before others begin.
    first = job.saved.width if job.saved is not None else 0

    def order(pair: tuple[solver.Encoded, Gold]) -> tuple[bool, int]:
        width = solver.bucket_width(one, pair[0])
        return width != first, width

    watch = Watch(console, job.name, len(encoded), rounds=_WATCH.value)
    with watch.live:
        for (_, width), group in itertools.groupby(sorted(encoded, key=order), order):
            items, golds = zip(*group, strict=True)
            launching.return_memory()
            in_flight = _REQUESTS_IN_FLIGHT.value
            if in_flight is not None:
                found = _solve_apart(one, items, golds, watch, in_flight)
            else:
                watch.say("compiling")
                programs = solver.prepare(one, width)
                watch.start()
                resume = None
                if job.saved is not None and job.saved.width == width:
                    resume = pause.load_running(job.saved, programs, items)
                look = functools.partial(watch.look, items)
                found = _solve_bucket(one, job, items, golds, look, resume, problems)
            for solved in found:
                watch.count(solved.record)
                yield solved


def _solve_bucket(
    one: solver.Solver,
    job: Job,
    items: Sequence[solver.Encoded],
    golds: Sequence[Gold],
    look: solver.OnChunk,
    resume: solver.Running | None,
    problems: Sequence[Problem],
) -> Iterator[solver.Solved]:
    """The problems of one bucket. Where there is a file for it, stopping saves what is running."""
    path = job.path
    if path is None:
        yield from solver.solve_stream(one, items, golds, launching.wait, look)
        return
    name = pathlib.Path(__file__).name
    notice = f"{name}: saving the running searches; once more to leave at once"
    with catch_stop() as is_stopped:
        wait = functools.partial(launching.wait, nap_fn=launching.say_when(is_stopped, notice))

        def save_if_asked(running: solver.Running) -> None:
            if is_stopped():
                width = solver.bucket_width(one, items[0])
                pause.save_running(path, running, items, width, job.settings, problems)
                raise KeyboardInterrupt

        yield from solver.solve_stream(one, items, golds, wait, look, save_if_asked, resume)
        if is_stopped():
            raise KeyboardInterrupt


def _solve_apart(
    one: solver.Solver,
    items: Sequence[solver.Encoded],
    golds: Sequence[Gold],
    watch: Watch,
    in_flight: int,
) -> Iterator[solver.Solved]:
    """The problems of one bucket, each at its own pace. Stopping ends the running ones."""
    watch.start()
    with catch_stop() as is_stopped:

        def leave_if_asked(structure: Structure) -> None:
            if is_stopped():
                raise KeyboardInterrupt

        yield from solver.solve_apart(
            one, items, golds, in_flight=in_flight, on_round=leave_if_asked
        )
        if is_stopped():
            raise KeyboardInterrupt


def _print_file_summary(console: Console, writer: RecordWriter, names: Iterable[str]) -> None:
    for name in names:
        records = [r for r in read_records(writer.path) if r["strategy"] == name]
        graded = [r["correct"] for r in records if r["correct"] is not None]
        tokens = sum(r["budget"]["generated_tokens"] for r in records)
        right = f", {sum(graded)}/{len(graded)} correct" if graded else ""
        say(console, f"{name}: {len(records)} records{right}, {tokens} tokens generated")
    say(console, f"records: {writer.path}")


if __name__ == "__main__":
    launching.launch(main, "stopped; what is done is kept, the same command goes on")
