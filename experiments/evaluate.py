"""Accuracy of strategies at equal budgets, with its interval and what it cost.

    python experiments/evaluate.py --config=configs/countdown.py --model=DIR/policy \
        --split=countdown4-inputs --strategy=greedy,best_first --max_expansions=8,16 \
        --best_of=8,32 --blind --out=RESULTS

Every cell - a strategy at a budget on a test set - writes its records to
RESULTS/SPLIT/STRATEGY-BUDGET-SEED.jsonl, in the form of solve.py's, and a line with its figures to
RESULTS/results.jsonl; a cell that is done is not run again, one that was stopped goes on, and one
with fewer problems than --limit now admits takes the others up. Budgets are separated by commas,
and compiled once for all of them.

`--best_of=8,32` adds best-of-N for each N: N chains, each drawn to its own end, and beside what
they cost together what they cost drawn in turn up to the first proven one. With `--blind` the same
strategies run without the networks too, on legal moves drawn at random. With `--calibration` the
values of all states that a search made are held against an exact solver, whose word no search ever
sees: each state in RESULTS/SPLIT/STRATEGY-BUDGET-SEED.states.jsonl, AUC and ECE by depth in
RESULTS/calibration.jsonl.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import launching
import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from rlm_jax.data.problems import read_problems
from rlm_jax.data.records import Record, RecordWriter, read_records
from rlm_jax.data.splits import SPLITS, Split, load_split
from rlm_jax.evaluation import build, solver
from rlm_jax.evaluation.blind import search_blindly
from rlm_jax.evaluation.calibration import Estimate, summarize
from rlm_jax.evaluation.chains import count_tokens_in_turn, read_chains
from rlm_jax.evaluation.intervals import wilson_interval
from rlm_jax.evaluation.results import Cell, Result, name_row, read_cells, write_cell
from rlm_jax.evaluation.resume import digest_problems, read_finished, require_same
from rlm_jax.evaluation.states import COUNTDOWN_TASKS, judge_states, read_puzzle
from rlm_jax.reasoning.drive import Limits
from rlm_jax.reasoning.protocol import Strategy
from rlm_jax.reasoning.strategies.best_of_n import make_best_of_n
from rlm_jax.tasks.base import Example, Gold, Problem

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_MODEL = flags.DEFINE_string("model", None, "Model to evaluate (default: the config's).")
_SPLIT = flags.DEFINE_list("split", [], f"Test sets, of {', '.join(SPLITS)}.")
_PROBLEMS = flags.DEFINE_string("problems", None, "A file of problems instead of --split.")
_STRATEGY = flags.DEFINE_list("strategy", ["greedy"], f"Of {', '.join(build.STRATEGIES)}.")
_MAX_EXPANSIONS = flags.DEFINE_list(
    "max_expansions", [], "Budgets in expansions, separated by commas (default: none)."
)
_BUDGET_TOKENS = flags.DEFINE_list(
    "budget_tokens", [], "Budgets in generated tokens per problem (default: the config's)."
)
_BEST_OF = flags.DEFINE_list("best_of", [], "Numbers of chains to add best-of-N rows for.")
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first problems.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.", lower_bound=0)
_BLIND = flags.DEFINE_bool("blind", False, "Add rows without the networks (Countdown, Game of 24).")
_CALIBRATION = flags.DEFINE_bool(
    "calibration", False, "Hold the values against an exact solver (Countdown, Game of 24)."
)
_OUT = flags.DEFINE_string("out", None, "Folder for records and results.")
flags.adopt_module_key_flags(launching)

# A blind search goes deep: by breadth it would find nothing within a few expansions.
BLIND_DEPTH_BONUS = 1.0
_BLIND_BATCH = 100
# Of a record's budget, what a row of results has the mean of.
_COSTS = ("generated_tokens", "scored_tokens", "expansions", "model_calls")
_TREE_SETTINGS = ("num_children", "num_lanes", "max_depth")
_CHAIN_SETTINGS = ("num_chains", "max_depth")
# Beside those of all trees.
_BLIND_SETTINGS = {
    "gumbel": ("num_simulations", "max_considered", "fit_budget"),
    "beam": ("beam_width",),
    "best_first_widening": ("widen", "prior_weight"),
    "best_first_widening_controlled": ("widen", "prior_weight"),
}
RESULTS, CALIBRATION = "results.jsonl", "calibration.jsonl"


class Budgets(NamedTuple):
    """What the flags ask for: expansions (None: as many as tokens allow), tokens, chains."""

    expansions: Sequence[int | None]
    tokens: Sequence[int]
    chains: Sequence[int]


class Bench(NamedTuple):
    """What all cells share.

    plans: by task, strategy and chains. solvers, blind: those made so far, by what they are
    compiled for.
    """

    config: dict[str, Any]
    budgets: Budgets
    plans: dict[tuple[str, str, int | None], build.Plan]
    policy: build.Policy
    out: pathlib.Path
    solvers: dict[Any, solver.Solver]
    blind: dict[Any, Strategy]


def main() -> None:
    """Checks the flags, runs the cells that are missing, prints all."""
    console = Console()
    config = launching.read_config(_CONFIG)
    if _MODEL.value is not None:
        config["model"] = _MODEL.value
    if not _OUT.value:
        raise ValueError("--out=DIR is missing: the folder for records and results")
    out = pathlib.Path(_OUT.value).expanduser()
    launching.require_folder("out", out)
    splits = _load_splits(config)
    _check_tasks(config, splits)
    budgets = Budgets(
        _read_numbers("max_expansions", _MAX_EXPANSIONS.value) or [None],
        _read_numbers("budget_tokens", _BUDGET_TOKENS.value) or [config["budget_tokens"]],
        _read_numbers("best_of", _BEST_OF.value),
    )
    config["budget_tokens"] = max(budgets.tokens)
    strategies = _read_strategies(budgets)
    cells = {
        cell: split for name, split in splits for cell in _list_cells(name, strategies, budgets)
    }
    plans = {
        (split.task, *cell.row): _plan(config, split.task, *cell.row)
        for cell, split in cells.items()
    }
    results = {cell: lines[-1] for cell, lines in read_cells(out / RESULTS, ("model", "n")).items()}
    calibrated = read_cells(out / CALIBRATION, ("model",))
    for cell, split in cells.items():
        settings = _settings(plans[split.task, *cell.row], cell)
        _check_cell(out, cell, split, config["model"], settings, results.get(cell))
        for line in calibrated.get(cell, []):
            holds = f"{out / CALIBRATION} holds {cell.split}/{cell.name}"
            require_same(holds, line, {"model": config["model"]})
    out.mkdir(parents=True, exist_ok=True)
    launching.use_compilation_cache()
    policy = build.load_policy(config["model"], config["dtype"], config["quantize"])
    bench = Bench(config, budgets, plans, policy, out, {}, {})
    for cell, split in cells.items():
        if cell not in results or results[cell]["n"] < len(split.examples):
            console.print(f"{cell.split}: {'blind ' * cell.blind}{cell.name}")
            solve = _solve_blindly if cell.blind else _solve
            results[cell] = _describe(bench, cell, split, solve(bench, cell, split))
            # Of other problems than those that the row is now of.
            if calibrated.pop(cell, None):
                write_cell(out / CALIBRATION, cell, [])
            write_cell(out / RESULTS, cell, [results[cell]])
        if _CALIBRATION.value and not cell.blind and cell not in calibrated:
            write_cell(out / CALIBRATION, cell, _calibrate(bench, cell, split))
    _print(console, results.values())


def _read_strategies(budgets: Budgets) -> list[str]:
    names = [name.strip() for name in _STRATEGY.value if name.strip()]
    if not names and not budgets.chains:
        raise ValueError(f"--strategy is empty: accepted are {', '.join(build.STRATEGIES)}")
    return names


def _list_cells(split: str, strategies: Sequence[str], budgets: Budgets) -> Iterator[Cell]:
    """The cells of a test set, each with its blind one behind it where expansions or chains are
    limited. (A blind greedy chain is a blind best of 1.)"""
    for tokens in budgets.tokens:
        cells = []
        for name in strategies:
            # Chains have no use for a limit of expansions: their own length is one.
            limits = budgets.expansions if name in build.TREE_SEARCHES else [None]
            cells += [Cell(split, name, most, tokens, _SEED.value) for most in limits]
        cells += [
            Cell(split, "best_of_n", None, tokens, _SEED.value, num_chains=number)
            for number in budgets.chains
        ]
        for cell in cells:
            yield cell
            limited = cell.max_expansions or cell.num_chains
            if _BLIND.value and limited and tokens == budgets.tokens[0]:
                yield dataclasses.replace(cell, blind=True)


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
    """All problems of a file: a share of what is to be measured would be another measurement."""
    if task not in build.TASKS:
        raise ValueError(f"task {task!r}: accepted are {', '.join(build.TASKS)}")
    found = read_problems(path, build.TASKS[task])
    for line, reason in found.malformed:
        raise ValueError(f"--problems={path}, line {line}: {reason}")
    if not found.examples:
        raise ValueError(f"--problems={path} holds no problem")
    return tuple(found.examples)


def _check_tasks(config: dict[str, Any], splits: list[tuple[str, Split]]) -> None:
    for flag in (_BLIND, _CALIBRATION):
        for _, split in splits:
            if flag.value and split.task not in COUNTDOWN_TASKS:
                raise ValueError(
                    f"--{flag.name}: accepted are {' and '.join(COUNTDOWN_TASKS)}, not {split.task}"
                )
    if _CALIBRATION.value and config["evaluator"] == "none":
        raise ValueError("--calibration: evaluator 'none' gives no values")


def _read_numbers(flag: str, texts: Sequence[str]) -> list[int]:
    for text in texts:
        if not text.strip().isdecimal() or int(text) < 1:
            raise ValueError(f"--{flag}={text}: accepted are whole numbers >= 1")
    return list(dict.fromkeys(map(int, texts)))


def _plan(config: dict[str, Any], task: str, strategy: str, num_chains: int | None) -> build.Plan:
    config = {**config, "task": task}
    if num_chains is not None:
        config[strategy] = {**config[strategy], "num_chains": num_chains}
    return build.plan_strategy(config, strategy)


def _settings(plan: build.Plan, cell: Cell) -> dict[str, Any]:
    """Of the records of a cell; of a blind one, which writes none, those of its strategy."""
    if cell.blind:
        names = _BLIND_SETTINGS.get(cell.strategy, ())
        names += _CHAIN_SETTINGS if cell.strategy == "best_of_n" else _TREE_SETTINGS
        own = {name: plan.settings[name] for name in names if name in plan.settings}
        deep = {"depth_bonus": BLIND_DEPTH_BONUS} if cell.strategy.startswith("best_first") else {}
        return own | deep
    own = {"max_expansions": cell.max_expansions, "budget_tokens": cell.budget_tokens}
    return plan.settings | own | ({} if cell.num_chains is None else {"stop_proven": False})


def _check_cell(
    out: pathlib.Path,
    cell: Cell,
    split: Split,
    model: str,
    settings: dict[str, Any],
    row: Result | None,
) -> None:
    """Refuses to go on with what is there of a cell where this run would find something else.

    Args:
      row: its line of results, where it is done; an earlier version's says less.

    Raises:
      ValueError: it, or a record, is of another model, other settings or other problems.
    """
    holds = f"{out / RESULTS} holds {'blind ' * cell.blind}{cell.split}/{cell.name}"
    first = split.examples
    if row is not None:
        # Problems may come to a cell, and none may go.
        first = first[: row["n"]]
        require_same(holds, row, {"n": len(first)} | ({} if cell.blind else {"model": model}))
        require_same(holds, row.get("settings", settings), settings)
    digest = digest_problems(first)
    same = row is None or row.get("problems", digest) == digest
    if not cell.blind and not (same and row and "settings" in row):
        path = _record_path(out, cell)
        found = {record["id"] for record in _read_done(path, cell, split, settings)}
        if row is not None and found:
            same = same and all(problem.id in found for problem, _ in first)
    if not same:
        raise ValueError(f"{holds} of other problems; name another --out")


def _read_done(
    path: pathlib.Path, cell: Cell, split: Split, settings: Mapping[str, Any]
) -> Iterator[Record]:
    problems = [problem for problem, _ in split.examples]
    return read_finished(path, cell.strategy, {**settings, "seed": cell.seed}, problems)


def _solve(bench: Bench, cell: Cell, split: Split) -> list[dict[str, Any]]:
    """Scores of all problems; those with a record are not solved again."""
    one = _find_solver(bench, cell, split)
    path = _record_path(bench.out, cell)
    with RecordWriter(path) as writer:
        done = {record["id"]: record for record in _read_done(path, cell, split, one.settings)}
        todo = [example for example in split.examples if example[0].id not in done]
        if todo:
            encoded = [solver.encode(one, problem) for problem, _ in todo]
            for solved in _solve_widths(one, encoded, [gold for _, gold in todo]):
                writer.write(solved.record)
                done[solved.record["id"]] = solved.record
    return [_score(cell, split, *example, done[example[0].id]) for example in split.examples]


def _find_solver(bench: Bench, cell: Cell, split: Split) -> solver.Solver:
    """The solver of a cell; those that differ in budgets share what is compiled."""
    batch_size = min(bench.config["batch_size"], len(split.examples))
    key = (split.task, *cell.row, batch_size)
    if key not in bench.solvers:
        bench.solvers[key] = build.build_solver(
            {**bench.config, "task": split.task},
            bench.plans[key[:3]],
            bench.policy,
            seed=cell.seed,
            batch_size=batch_size,
        )
    one = bench.solvers[key]
    return dataclasses.replace(
        one,
        limits=Limits(proven=cell.num_chains is None),
        max_expansions=cell.max_expansions,
        budget_tokens=cell.budget_tokens,
        settings=_settings(bench.plans[key[:3]], cell),
    )


def _record_path(out: pathlib.Path, cell: Cell) -> pathlib.Path:
    return out / cell.split / f"{cell.name}.jsonl"


def _solve_widths(
    one: solver.Solver, encoded: Sequence[solver.Encoded], golds: Sequence[Any]
) -> Iterator[solver.Solved]:
    """Problems of one prompt bucket go together."""
    widths = [solver.bucket_width(one, item) for item in encoded]
    for width in sorted(set(widths)):
        places = [place for place, other in enumerate(widths) if other == width]
        launching.return_memory()
        yield from solver.solve_stream(
            one, [encoded[i] for i in places], [golds[i] for i in places]
        )


def _solve_blindly(bench: Bench, cell: Cell, split: Split) -> list[dict[str, Any]]:
    settings = _settings(bench.plans[split.task, *cell.row], cell)
    if cell.row not in bench.blind:
        is_chains = cell.strategy == "best_of_n"
        make = make_best_of_n if is_chains else build.TREE_SEARCHES[cell.strategy]
        bench.blind[cell.row] = make(**settings)
    strategy = bench.blind[cell.row]
    if cell.max_expansions is None:
        num_nodes = 1 + strategy.num_lanes * settings["max_depth"]
    else:
        most = max(filter(None, bench.budgets.expansions))
        num_nodes = 1 + (most + strategy.num_lanes) * strategy.num_children
    problems = [read_puzzle(split.task, problem) for problem, _ in split.examples]
    scores = []
    for start in range(0, len(problems), _BLIND_BATCH):
        found = search_blindly(
            strategy,
            problems[start : start + _BLIND_BATCH],
            num_nodes=num_nodes,
            max_expansions=cell.max_expansions,
            seed=cell.seed + start,
        )
        for solved, expansions in zip(
            np.asarray(found.solved), np.asarray(found.expansions), strict=True
        ):
            spent = {**dict.fromkeys(_COSTS, 0), "expansions": int(expansions)}
            scores.append({"correct": bool(solved), **spent})
    return scores


def _calibrate(bench: Bench, cell: Cell, split: Split) -> list[dict[str, Any]]:
    """Writes the states of a cell's records; returns AUC and ECE depth by depth, then of all."""
    path = _record_path(bench.out, cell)
    problems = [problem for problem, _ in split.examples]
    wanted = {problem.id for problem in problems}
    records = (record for record in read_records(path) if record["id"] in wanted)
    judged = list(judge_states(split.task, problems, records))
    lines = (json.dumps({"node": node, **one._asdict()}) for node, one in judged)
    path.with_suffix(".states.jsonl").write_text("".join(line + "\n" for line in lines))
    return [
        {
            **dataclasses.asdict(cell),
            "model": bench.config["model"],
            "depth": part.depth,
            "num_states": part.num_states,
            "num_solvable": part.num_solvable,
            "num_problems": part.num_problems,
            "auc": _round(part.auc),
            "ece": _round(part.ece),
        }
        for part in summarize(one for _, one in judged)
    ]


def _round(estimate: Estimate) -> list[float] | None:
    """Value and both ends of its interval; None where it is not defined."""
    return None if math.isnan(estimate.value) else [round(number, 4) for number in estimate]


def _score(
    cell: Cell, split: Split, problem: Problem, gold: Gold, record: Record
) -> dict[str, Any]:
    spent = {name: record["budget"][name] for name in _COSTS}
    score = {"correct": record["correct"] is True, **spent}
    task = build.TASKS[split.task]
    if cell.num_chains is not None and task.self_verifying:

        def is_right(text: str) -> bool:
            text = task.keep_sound(problem, text, record["config"].get("may_err", False))
            return task.verify(problem, gold, text).correct is True

        score["tokens_in_turn"] = count_tokens_in_turn(read_chains(record), is_right)
    return score


def _describe(bench: Bench, cell: Cell, split: Split, scores: list[dict[str, Any]]) -> Result:
    right = sum(score["correct"] for score in scores)
    low, high = wilson_interval(right, len(scores))

    def mean(name: str) -> float:
        return round(math.fsum(score[name] for score in scores) / len(scores), 2)

    in_turn = {"tokens_in_turn": mean("tokens_in_turn")} if "tokens_in_turn" in scores[0] else {}
    return {
        **dataclasses.asdict(cell),
        "model": bench.config["model"],
        "n": len(scores),
        "accuracy": round(right / len(scores), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        **{name: mean(name) for name in _COSTS},
        **in_turn,
        "command": " ".join(sys.argv),
        "problems": digest_problems(split.examples),
        "settings": _settings(bench.plans[split.task, *cell.row], cell),
    }


def _print(console: Console, results: Any) -> None:
    table = Table("test set", "strategy", "expansions <=", "n", "accuracy", "95%", "tokens", "exp.")
    for one in results:
        low, high = one["interval_95"]
        table.add_row(
            one["split"],
            name_row(one),
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
