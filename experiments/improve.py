"""Does search teach the networks that search? Rounds of it, against more demonstrations.

    python experiments/improve.py --config=configs/countdown.py:scarce --out=DIR --seeds=0,1,2

For each seed, networks learn from the config's demonstrations. From there two arms go on, round by
round, each round a run of train.py that begins with the networks of the one before it:

    search  `train.search.num_steps` steps of search and learning, on problems without solutions
    more    updates on the same demonstrations, with the optimizer of the search phase, as many as
            take the time that the search took in that round (evaluation and compiling left out)

All networks are looked at by evaluate.py, on problems that no training sees. What was measured is
in DIR/improvement.jsonl, for report.py; what is done already is not done again. More seeds and
rounds may come to a course; what else it depends on is in DIR/settings.json and stays as it is.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import launching
from absl import flags
from ml_collections import config_flags

from rlm_jax.core.files import write_whole
from rlm_jax.data.splits import SPLITS
from rlm_jax.evaluation.improvement import write_improvement
from rlm_jax.evaluation.results import read_results
from rlm_jax.evaluation.resume import require_same
from rlm_jax.learning.metrics_writer import read_metrics

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_OUT = flags.DEFINE_string("out", None, "Folder of all runs and of the table.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the whole course.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of each arm.", lower_bound=1)
_SPLIT = flags.DEFINE_enum("split", "countdown4-inputs", list(SPLITS), "The test set.")
_LIMIT = flags.DEFINE_integer("limit", 300, "Only its first problems.", lower_bound=1)
_MAX_EXPANSIONS = flags.DEFINE_integer(
    "max_expansions", 8, "Of the searches that test.", lower_bound=1
)
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
    """Trains and evaluates what is missing, and shows the table."""
    config = launching.read_config(_CONFIG)
    if not _OUT.value:
        raise ValueError("--out=DIR is missing: the folder of all runs and of the table")
    if not all(seed.isdigit() for seed in _SEEDS.value) or not _SEEDS.value:
        raise ValueError(f"--seeds={','.join(_SEEDS.value)}: accepted are whole numbers")
    least = _least_steps(config["train"])
    for name, steps in (("", config["train"]), ("search.", config["train"]["search"])):
        if steps["num_steps"] < least:
            raise ValueError(
                f"train.{name}num_steps={steps['num_steps']}: accepted is >= {least}, twice "
                "train.log_steps, or the time of a step is not known"
            )
    out = pathlib.Path(_OUT.value).expanduser()
    launching.require_folder("out", out)
    _keep_settings(out, config)
    points = []
    for seed in map(int, _SEEDS.value):
        for point in _run_seed(config["train"], out / f"seed{seed}", seed):
            _evaluate(point)
            points.append(_describe(point))
    with write_whole(out / "improvement.jsonl") as beside:
        beside.write_text("".join(json.dumps(point) + "\n" for point in points), encoding="utf-8")
    print(write_improvement(points))


def _keep_settings(out: pathlib.Path, config: dict[str, Any]) -> None:
    """Writes down what every figure of a course depends on, once.

    Raises:
      ValueError: the folder holds a course where some of that was otherwise.
    """
    now = {flag.name: flag.value for flag in (_SPLIT, _LIMIT, _MAX_EXPANSIONS)}
    now = json.loads(json.dumps(now | dict(_flatten(config))))
    path = out / "settings.json"
    if path.exists():
        then = json.loads(path.read_text())
        require_same(f"--out={out} holds a course", then, {**dict.fromkeys(then), **now})
        return
    out.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as beside:
        beside.write_text(json.dumps(now, indent=1) + "\n")


def _flatten(config: dict[str, Any], above: str = "config") -> Iterator[tuple[str, Any]]:
    """The settings of a nested config by their flags."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{above}.{name}")
        else:
            yield f"{above}.{name}", value


def _run_seed(train: dict[str, Any], folder: pathlib.Path, seed: int) -> Iterator[Point]:
    """Both arms, interleaved: a machine that gets busy is busy for both."""
    start = Point(seed, "start", 0, folder / "start")
    _train(start, {"search.num_steps": 0})
    yield start
    before = dict.fromkeys(ARMS, start)
    update_seconds = _seconds_per_step(start)
    for number in range(1, _ROUNDS.value + 1):
        for arm in ARMS:
            point = Point(seed, arm, number, folder / f"{arm}{number}")
            # The network for states is of the start; both arms keep it as it is.
            settings: dict[str, Any] = {"state_value.num_steps": 0}
            settings |= {"begin_with": before[arm].folder / "policy"}
            if arm == "search":
                # Every round has problems of its own.
                settings |= {"num_steps": 0, "seed": 1000 * number + seed}
                settings |= {"records.paths": (), "records.share": 0.0}
            else:
                seconds = train["search"]["num_steps"] * _seconds_per_step(before["search"])
                steps = max(_least_steps(train), round(seconds / update_seconds))
                settings |= {"num_steps": steps, "search.num_steps": 0}
                own = train["search"]["optimizer"]
                settings |= {f"optimizer.{name}": value for name, value in own.items()}
            _train(point, settings)
            yield point
            before[arm] = point


def _train(point: Point, settings: dict[str, Any]) -> None:
    """One run of train.py, evaluated in the end alone, and there as little as it can be."""
    if (point.folder / "policy").exists():
        return
    settings = {"seed": point.seed, "eval_steps": _NEVER, "eval_problems": 1} | settings
    settings |= {"walks.num_steps": 0}
    changes = [f"--config.train.{name}={value}" for name, value in settings.items()]
    _run("train.py", *_overrides(), *changes, f"--workdir={point.folder}", "--notensorboard")


def _evaluate(point: Point) -> None:
    results = point.folder / "results"
    # What evaluate.py writes last.
    if any(row["strategy"] == "best_first" for row in read_results(results / "calibration.jsonl")):
        return
    _run(
        "evaluate.py",
        *_overrides(),
        f"--model={point.folder / 'policy'}",
        f"--split={_SPLIT.value}",
        f"--limit={_LIMIT.value}",
        "--strategy=greedy,best_first",
        f"--max_expansions={_MAX_EXPANSIONS.value}",
        "--calibration",
        f"--out={results}",
    )


def _overrides() -> list[str]:
    """The config of this run and its changes, for the others."""
    flag = flags.FLAGS[_CONFIG.name]
    changes = config_flags.get_override_values(flag)
    return [
        f"--config={config_flags.get_config_filename(flag)}",
        *(f"--config.{name}={value}" for name, value in changes.items()),
    ]


def _run(program: str, *args: str) -> None:
    print(f"{program} {' '.join(args)}", flush=True)
    done = subprocess.run([sys.executable, str(_FOLDER / program), *args], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def _seconds_per_step(point: Point) -> float:
    """By the logged metrics; what comes before the first of them, compiling, is left out."""
    first, *_, last = _read_losses(_phase(point))
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def _phase(point: Point) -> pathlib.Path:
    return point.folder / ("search" if point.arm == "search" else "supervised")


def _read_losses(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [point for point in read_metrics(folder / "metrics.jsonl") if "loss" in point]


def _least_steps(train: dict[str, Any]) -> int:
    return 2 * train["log_steps"]


def _describe(point: Point) -> dict[str, Any]:
    """What `rlm_jax.evaluation.improvement` reads."""
    metrics = _read_losses(_phase(point))
    results = point.folder / "results"
    return {
        "seed": point.seed,
        "arm": point.arm,
        "round": point.round,
        "steps": metrics[-1]["step"],
        "seconds": metrics[-1]["step"] * _seconds_per_step(point),
        "results": read_results(results / "results.jsonl"),
        "calibration": read_results(results / "calibration.jsonl"),
        "command": " ".join(sys.argv),
    }


if __name__ == "__main__":
    launching.launch(main, "stopped; the same command goes on where it was")
