"""Five minutes of each kind of training, on two cores: held-out problems are solved more often.

The networks and the demonstrations are few (`configs/countdown.py:scarce`). Accuracies are of 200
held-out problems of four numbers: of one greedy chain, and of PUCT within 1,024 tokens. A network
that has learned nothing solves none by either: it writes no line that follows. Searches teach the
same networks with the rules known (`:scarce_legal`): theirs are accuracies over legal lines.
"""

import json

import pytest
from running import run_program

from rlm_jax.learning.metrics_writer import read_metrics

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")
pytestmark = pytest.mark.slow


def train(workdir, phase, *changes, variant="scarce"):
    """What the evaluation at a phase's end says, and the means of its last updates."""
    done = run_program(
        "train.py",
        f"--config=configs/countdown.py:{variant}",
        f"--workdir={workdir}",
        "--notensorboard",
        "--config.train.eval_problems=200",
        *(f"--config.train.{change}" for change in changes),
    )
    assert done.status == 0, done.err[-2000:]
    points = read_metrics(workdir / phase / "metrics.jsonl")
    (scores,) = [point for point in points if "greedy_accuracy" in point]
    return scores, [point for point in points if "loss" in point]


def solve_by_puct(model, out):
    """The accuracy of PUCT over legal lines."""
    done = run_program(
        "evaluate.py",
        "--config=configs/countdown.py:scarce_legal",
        f"--model={model}",
        f"--out={out}",
        "--split=countdown4-inputs",
        "--limit=200",
        "--strategy=puct",
    )
    assert done.status == 0, done.err[-2000:]
    (row,) = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return row["accuracy"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("taught")
    return workdir, *train(workdir, "supervised", "search.num_steps=0")


def test_demonstrations_teach_moves_and_values(taught):
    _, scores, points = taught
    assert scores["puct_accuracy"] > 0.25
    first, last = points[0], points[-1]
    assert last["choice_accuracy"] > first["choice_accuracy"] + 0.5
    assert last["value_loss"] < 0.6 * first["value_loss"]


def test_searches_teach_what_demonstrations_did_not(taught, tmp_path):
    """The rules are known, which line leads on is not: searches find out, without a solution."""
    workdir, *_ = taught
    before = solve_by_puct(workdir / "policy", tmp_path / "before")
    _, points = train(
        tmp_path,
        "search",
        f"begin_with={workdir / 'policy'}",
        "num_steps=0",
        "search.num_steps=32",
        variant="scarce_legal",
    )
    assert solve_by_puct(tmp_path / "policy", tmp_path / "after") > before + 0.2
    solved = [point["search_solved"] for point in points]
    half = len(solved) // 2
    assert sum(solved[half:]) > sum(solved[:half])


def test_corrected_walks_teach_one_chain(taught, tmp_path):
    workdir, before, _ = taught
    start = f"begin_with={workdir / 'policy'}"
    after, _ = train(
        tmp_path, "walking", start, "num_steps=0", "search.num_steps=0", "walks.num_steps=300"
    )
    assert after["greedy_accuracy"] > before["greedy_accuracy"] + 0.03
