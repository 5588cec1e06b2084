"""Does search teach the networks that search? Rounds of it, against more demonstrations.

    python experiments/improve.py --config=configs/countdown.py:scarce --out=DIR --seeds=0,1,2

For each seed, networks learn from the config's demonstrations. From there two arms go on, round by
round, each round a run of train.py that begins with the networks of the one before it:

    search  `train.search.num_steps` steps of search and learning, on problems without solutions
    more    updates on the same demonstrations, with the optimizer of the search phase, as many as
            take the time that the search took in that round (evaluation and compiling left out)

All networks are looked at by evaluate.py, on problems that no training sees. DIR/improvement.md is
the table; what is done already is not done again.
"""

import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import launching
from absl import flags
from ml_collections import config_flags

from rlm_jax.data.splits import SPLITS
from rlm_jax.evaluation.intervals import wilson_interval
from rlm_jax.evaluation.results import name_row, read_results
from rlm_jax.learning.metrics_writer import read_metrics

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_OUT = flags.DEFINE_string("out", None, "Folder of all runs and of the table.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the whole course.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of each arm.", lower_bound=1)
_SPLIT = flags.DEFINE_enum("split", "countdown4-inputs", list(SPLITS), "The test set.")
_LIMIT = flags.DEFINE_integer("limit", 300, "Only its first problems.", lower_bound=1)
_MAX_EXPANSIONS = flags.DEFINE_integer("max_expansions", 8, "Of the searches that test.")
flags.adopt_module_key_flags(launching)

ARMS = ("search", "more")
_NEVER = 10**9
_FOLDER = pathlib.Path(__file__).parent


class Point(NamedTuple):
    """Networks to look at: an arm's, behind a round; round 0 is before both. folder: of its run."""

    seed: int
    arm: str
    round: int
    folder: pathlib.Path


def main() -> None:
    """Trains and evaluates what is missing, and writes the table."""
    config = launching.read_config(_CONFIG)
    if not _OUT.value:
        raise ValueError("--out=DIR is missing: the folder of all runs and of the table")
    if not all(seed.isdigit() for seed in _SEEDS.value) or not _SEEDS.value:
        raise ValueError(f"--seeds={','.join(_SEEDS.value)}: accepted are whole numbers")
    for name, steps in (("", config["train"]), ("search.", config["train"]["search"])):
        if steps["num_steps"] < 2:
            raise ValueError(f"train.{name}num_steps={steps['num_steps']}: accepted is >= 2")
    out = pathlib.Path(_OUT.value).expanduser()
    points = []
    for seed in map(int, _SEEDS.value):
        for point in _run_seed(config["train"], out / f"seed{seed}", seed):
            _evaluate(point)
            points.append(point)
    table = _write_table(points)
    (out / "improvement.md").write_text(table, encoding="utf-8")
    print(table)


def _run_seed(train: dict[str, Any], folder: pathlib.Path, seed: int) -> Iterator[Point]:
    """Both arms, interleaved: a machine that gets busy is busy for both."""
    start = Point(seed, "start", 0, folder / "start")
    _train(start, {"search.num_steps": 0})
    yield start
    before = dict.fromkeys(ARMS, start)
    update_seconds = _seconds_per_step(start.folder / "supervised")
    for number in range(1, _ROUNDS.value + 1):
        for arm in ARMS:
            point = Point(seed, arm, number, folder / f"{arm}{number}")
            settings: dict[str, Any] = {"begin_with": before[arm].folder / "policy"}
            if arm == "search":
                # Every round has problems of its own.
                settings |= {"num_steps": 0, "seed": 1000 * number + seed}
            else:
                seconds = _seconds_per_step(folder / f"search{number}" / "search")
                steps = round(train["search"]["num_steps"] * seconds / update_seconds)
                settings |= {"num_steps": max(2, steps), "search.num_steps": 0}
                own = train["search"]["optimizer"]
                settings |= {f"optimizer.{name}": value for name, value in own.items()}
            _train(point, settings)
            yield point
            before[arm] = point


def _train(point: Point, settings: dict[str, Any]) -> None:
    """One run of train.py, evaluated in the end alone, and there as little as it can be."""
    settings = {"seed": point.seed, "eval_steps": _NEVER, "eval_problems": 1} | settings
    settings |= {"walks.num_steps": 0}
    changes = [f"--config.train.{name}={value}" for name, value in settings.items()]
    _run("train.py", *_overrides(), *changes, f"--workdir={point.folder}", "--notensorboard")


def _evaluate(point: Point) -> None:
    _run(
        "evaluate.py",
        *_overrides(),
        f"--model={point.folder / 'policy'}",
        f"--split={_SPLIT.value}",
        f"--limit={_LIMIT.value}",
        "--strategy=greedy,best_first",
        f"--max_expansions={_MAX_EXPANSIONS.value}",
        "--calibration",
        f"--out={point.folder / 'results'}",
    )


def _overrides() -> list[str]:
    """The config of this run and its changes, for the others."""
    return [arg for arg in sys.argv[1:] if arg.lstrip("-").startswith(("config=", "config."))]


def _run(program: str, *args: str) -> None:
    print(f"{program} {' '.join(args)}", flush=True)
    done = subprocess.run([sys.executable, str(_FOLDER / program), *args], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def _seconds_per_step(folder: pathlib.Path) -> float:
    """Of a phase, by its logged metrics; what comes before the first of them is left out."""
    points = [point for point in read_metrics(folder / "metrics.jsonl") if "loss" in point]
    if len(points) < 2:
        raise ValueError(f"{folder} has logged {len(points)} times: train.log_steps is too large")
    first, last = points[0], points[-1]
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def _write_table(points: Sequence[Point]) -> str:
    """Means over the seeds, and each seed's own figure."""
    lines = []
    for arm, number in sorted({(p.arm, p.round) for p in points}, key=lambda key: key[::-1]):
        same = [point for point in points if (point.arm, point.round) == (arm, number)]
        lines.append([str(number), arm, *_describe(same)])
    heads = ["round", "arm", "greedy", "best first", "AUC, value after 1 move", "ECE"]
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _describe(points: Sequence[Point]) -> Iterator[str]:
    results = [read_results(point.folder / "results" / "results.jsonl") for point in points]
    for strategy in ("greedy", "best_first"):
        rows = [row for rows in results for row in rows if name_row(row) == strategy]
        counts = [round(row["accuracy"] * row["n"]) for row in rows]
        low, high = wilson_interval(sum(counts), sum(row["n"] for row in rows))
        seeds = ", ".join(f"{100 * row['accuracy']:.1f}" for row in rows)
        mean = 100 * sum(counts) / sum(row["n"] for row in rows)
        yield f"{mean:.1f} ({100 * low:.1f}-{100 * high:.1f}; {seeds})"
    calibrations = [read_results(p.folder / "results" / "calibration.jsonl") for p in points]
    after_one = [
        row
        for rows in calibrations
        for row in rows
        if row["strategy"] == "best_first" and row["depth"] == 1
    ]
    for name in ("auc", "ece"):
        values = [row[name][0] for row in after_one if row[name] is not None]
        mean = sum(values) / len(values) if values else float("nan")
        yield f"{mean:.3f} ({', '.join(f'{value:.3f}' for value in values)})"


if __name__ == "__main__":
    launching.launch(main, "stopped; the same command goes on where it was")
