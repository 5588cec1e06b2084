"""Accuracy of strategies at equal budgets, with its interval and what it cost.

    python experiments/evaluate.py --config=configs/countdown.py --model=DIR/policy \
        --split=countdown4-inputs --strategy=greedy,best_first --max_expansions=8,16 --out=RESULTS

Every cell - a strategy at a budget on a test set - writes its records to
RESULTS/SPLIT/STRATEGY-BUDGET-SEED.jsonl, in the form of solve.py's, and a line with its figures to
RESULTS/results.jsonl; a cell that is done is not run again, and one that was stopped goes on. With
`--blind` the same strategies run without the networks too, on legal moves drawn at random.
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import launching
import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from rlm_jax.data.problems import read_problems
from rlm_jax.data.records import Record, RecordWriter, list_changes, read_records
from rlm_jax.data.splits import SPLITS, Split, load_split
from rlm_jax.evaluation import build, solver
from rlm_jax.evaluation.blind import search_blindly
from rlm_jax.evaluation.intervals import wilson_interval
from rlm_jax.reasoning.drive import Limits
from rlm_jax.tasks.base import Example

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_MODEL = flags.DEFINE_string("model", None, "Model to evaluate (default: the config's).")
_SPLIT = flags.DEFINE_list("split", [], f"Test sets, of {', '.join(SPLITS)}.")
_PROBLEMS = flags.DEFINE_string("problems", None, "A file of problems instead of --split.")
_STRATEGY = flags.DEFINE_list("strategy", ["greedy"], f"Of {', '.join(build.STRATEGIES)}.")
_MAX_EXPANSIONS = flags.DEFINE_list(
    "max_expansions", [], "Budgets in expansions, separated by commas (default: none)."
)
_BUDGET_TOKENS = flags.DEFINE_integer(
    "budget_tokens", None, "Tokens each strategy may generate per problem (default: the config's)."
)
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first problems.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.", lower_bound=0)
_BLIND = flags.DEFINE_bool("blind", False, "Add rows without the networks (Countdown, Game of 24).")
_OUT = flags.DEFINE_string("out", None, "Folder for records and results.")
flags.adopt_module_key_flags(launching)

# A blind search goes deep: by breadth it would find nothing within a few expansions.
BLIND_DEPTH_BONUS = 1.0
_BLIND_BATCH = 100


@dataclasses.dataclass(frozen=True)
class Cell:
    """One strategy at one budget on one test set."""

    split: str
    strategy: str
    max_expansions: int | None
    budget_tokens: int
    seed: int
    blind: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        budget = "all" if self.max_expansions is None else str(self.max_expansions)
        return f"{self.strategy}-{budget}-{self.budget_tokens}-{self.seed}"


def main() -> None:
    """Checks the flags, runs the cells that are missing, prints all."""
    console = Console()
    config = launching.read_config(_CONFIG)
    if _MODEL.value is not None:
        config["model"] = _MODEL.value
    if _BUDGET_TOKENS.value is not None:
        config["budget_tokens"] = _BUDGET_TOKENS.value
    if not _OUT.value:
        raise ValueError("--out=DIR is missing: the folder for records and results")
    out = pathlib.Path(_OUT.value).expanduser()
    splits = _load_splits(config)
    budgets = _read_budgets()
    plans = {
        name: {
            split: build.plan_strategy({**config, "task": of.task}, name) for split, of in splits
        }
        for name in _STRATEGY.value
    }
    launching.use_compilation_cache()
    policy = build.load_policy(config["model"], config["dtype"], config["quantize"])
    results = _read_results(out / "results.jsonl")
    for split, problems in splits:
        for name in _STRATEGY.value:
            for budget in budgets if name in build.TREE_SEARCHES else [None]:
                cell = Cell(split, name, budget, config["budget_tokens"], _SEED.value)
                jobs = {cell: functools.partial(_solve, config, plans[name][split], policy, out)}
                if _BLIND.value and budget is not None:
                    blind = dataclasses.replace(cell, blind=True)
                    jobs[blind] = functools.partial(_solve_blindly, plans[name][split])
                for one, run in jobs.items():
                    if _key(one) not in results:
                        console.print(f"{split}: {'blind ' * one.blind}{one.name}")
                        result = _describe(one, config, list(run(one, problems)))
                        _append(out / "results.jsonl", result)
                        results[_key(one)] = result
    _print(console, results.values())


def _load_splits(config: dict[str, Any]) -> list[tuple[str, Split]]:
    if bool(_SPLIT.value) == (_PROBLEMS.value is not None):
        raise ValueError("give either --split or --problems")
    if _PROBLEMS.value is None:
        splits = [(name, load_split(name)) for name in _SPLIT.value]
    else:
        name = pathlib.Path(_PROBLEMS.value).stem
        splits = [(name, Split(config["task"], _read_file(config["task"], _PROBLEMS.value)))]
    return [
        (name, split._replace(examples=split.examples[: _LIMIT.value])) for name, split in splits
    ]


def _read_file(task: str, path: str) -> tuple[Example, ...]:
    """Problems in the task's own form where it has one, else as solve.py reads them."""
    load = build.TASKS[task].load
    return tuple(read_problems(path).examples if load is None else load(path))


def _read_budgets() -> list[int | None]:
    budgets: list[int | None] = []
    for text in _MAX_EXPANSIONS.value:
        if not text.strip().isdecimal() or int(text) < 1:
            raise ValueError(f"--max_expansions={text}: accepted are whole numbers >= 1")
        budgets.append(int(text))
    return budgets or [None]


def _solve(
    config: dict[str, Any],
    plan: build.Plan,
    policy: build.Policy,
    out: pathlib.Path,
    cell: Cell,
    split: Split,
) -> list[dict[str, Any]]:
    """Scores of all problems; those with a record are not solved again."""
    one = build.build_solver(
        {**config, "task": split.task},
        plan,
        policy,
        seed=cell.seed,
        batch_size=min(config["batch_size"], len(split.examples)),
    )
    limits = Limits(max_expansions=cell.max_expansions)
    settings = {**one.settings, "max_expansions": cell.max_expansions}
    one = dataclasses.replace(one, limits=limits, settings=settings)
    path = out / cell.split / f"{cell.name}.jsonl"
    with RecordWriter(path) as writer:
        done = {record["id"]: record for record in read_records(path)}
        for record in done.values():
            _check_record(path, record, settings, cell)
        todo = [example for example in split.examples if example[0].id not in done]
        if todo:
            encoded = [solver.encode(one, problem) for problem, _ in todo]
            for solved in _solve_widths(one, encoded, [gold for _, gold in todo]):
                writer.write(solved.record)
                done[solved.record["id"]] = solved.record
    return [_score(done[problem.id]) for problem, _ in split.examples]


def _solve_widths(
    one: solver.Solver, encoded: Sequence[solver.Encoded], golds: Sequence[Any]
) -> Iterator[solver.Solved]:
    """Problems of one prompt bucket go together."""
    widths = [solver.bucket_width(one, item) for item in encoded]
    for width in sorted(set(widths)):
        places = [place for place, other in enumerate(widths) if other == width]
        yield from solver.solve_stream(
            one, [encoded[i] for i in places], [golds[i] for i in places]
        )


def _solve_blindly(plan: build.Plan, cell: Cell, split: Split) -> list[dict[str, Any]]:
    if split.task not in ("countdown", "game24"):
        raise ValueError(f"--blind: accepted are countdown and game24, not {split.task}")
    settings = {
        name: plan.settings[name]
        for name in ("num_children", "num_lanes", "max_depth")
        if name in plan.settings
    }
    if cell.strategy == "best_first":
        settings["depth_bonus"] = BLIND_DEPTH_BONUS
    strategy = build.TREE_SEARCHES[cell.strategy](**settings)
    most = cell.max_expansions or 1
    num_nodes = 1 + (most + strategy.num_lanes) * strategy.num_children
    problems = [
        problem.data if split.task == "countdown" else (problem.data, 24)
        for problem, _ in split.examples
    ]
    scores = []
    for start in range(0, len(problems), _BLIND_BATCH):
        found = search_blindly(
            strategy,
            problems[start : start + _BLIND_BATCH],
            num_nodes=num_nodes,
            max_expansions=most,
            seed=cell.seed + start,
        )
        for solved, expansions in zip(
            np.asarray(found.solved), np.asarray(found.expansions), strict=True
        ):
            budget = {"expansions": int(expansions), "generated_tokens": 0, "model_calls": 0}
            scores.append({"correct": bool(solved), **budget})
    return scores


def _score(record: Record) -> dict[str, Any]:
    names = ("generated_tokens", "expansions", "model_calls")
    return {"correct": record["correct"] is True, **{n: record["budget"][n] for n in names}}


def _check_record(path: pathlib.Path, record: Record, settings: dict[str, Any], cell: Cell) -> None:
    now = {**settings, "seed": cell.seed}
    then = {**record["config"], "seed": record["seed"]}
    other = list_changes(then, now)
    if other:
        raise ValueError(f"{path} holds records with {', '.join(other)}; name another --out")


def _describe(cell: Cell, config: dict[str, Any], scores: list[dict[str, Any]]) -> dict[str, Any]:
    right = sum(score["correct"] for score in scores)
    low, high = wilson_interval(right, len(scores))

    def mean(name: str) -> float:
        return round(math.fsum(score[name] for score in scores) / len(scores), 2)

    return {
        **dataclasses.asdict(cell),
        "model": config["model"],
        "n": len(scores),
        "accuracy": round(right / len(scores), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "generated_tokens": mean("generated_tokens"),
        "expansions": mean("expansions"),
        "model_calls": mean("model_calls"),
        "command": " ".join(sys.argv),
    }


def _key(cell: Cell) -> str:
    return json.dumps(dataclasses.asdict(cell), sort_keys=True)


def _read_results(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    names = [field.name for field in dataclasses.fields(Cell)]
    results = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {_key(Cell(**{name: one[name] for name in names})): one for one in results}


def _append(path: pathlib.Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def _print(console: Console, results: Any) -> None:
    table = Table("test set", "strategy", "expansions <=", "n", "accuracy", "95%", "tokens", "exp.")
    for one in results:
        low, high = one["interval_95"]
        table.add_row(
            one["split"],
            ("blind " if one["blind"] else "") + one["strategy"],
            str(one["max_expansions"] or "-"),
            str(one["n"]),
            f"{100 * one['accuracy']:.1f}",
            f"{100 * low:.1f}-{100 * high:.1f}",
            f"{one['generated_tokens']:.0f}",
            f"{one['expansions']:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    launching.launch(main, "stopped; the same command goes on with the problems that are left")
