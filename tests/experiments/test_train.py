"""train.py and evaluate.py as a user runs them, at smoke size."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from running import Done, run_program

from rlm_jax.learning.metrics_writer import read_metrics
from rlm_jax.models.load import load_model

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "--config=configs/countdown.py:smoke"


def _command(program: str, *flags: str) -> list[str]:
    return [sys.executable, f"experiments/{program}.py", *flags]


def _environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "150"}


def _train(workdir: pathlib.Path, *flags: str) -> Done:
    return run_program("train.py", CONFIG, f"--workdir={workdir}", "--notensorboard", *flags)


def _start(workdir: pathlib.Path) -> subprocess.Popen[str]:
    """A run in a process of its own, to be disturbed."""
    return subprocess.Popen(
        _command("train", CONFIG, f"--workdir={workdir}", "--notensorboard"),
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _weights(workdir: pathlib.Path) -> list[bytes]:
    folder = workdir / "policy"
    return [(folder / n).read_bytes() for n in ("model.safetensors", "value_head.safetensors")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("run")
    done = _train(workdir)
    assert done.status == 0, done.err[-2000:]
    return workdir


def test_a_run_learns_by_demonstration_and_by_search(trained):
    points = read_metrics(trained / "supervised" / "metrics.jsonl")
    assert [p["step"] for p in points if "loss" in p] == [2, 4, 6]
    assert any("greedy_accuracy" in point for point in points)
    searched = read_metrics(trained / "search" / "metrics.jsonl")
    assert searched[0]["search_expansions"] > 1
    model = load_model(str(trained / "policy"))
    assert model.value_head is not None
    assert model.metadata["rlm_jax"]["train"]["num_steps"] == 6
    assert np.isfinite(np.asarray(model.params.embed)).all()


def test_a_finished_run_is_left_alone_and_another_config_is_refused(trained):
    before = _weights(trained)
    assert _train(trained).status == 0
    assert _weights(trained) == before
    other = _train(trained, "--config.train.seed=1")
    assert other.status != 0
    assert "seed=0" in other.err


@pytest.mark.slow
def test_a_stopped_run_ends_on_the_same_networks(trained, tmp_path):
    process = _start(tmp_path)
    folder = tmp_path / "checkpoints" / "supervised"
    while process.poll() is None and not any(folder.glob("[0-9]*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert "goes on" in output
    assert not (tmp_path / "policy").exists()
    assert _train(tmp_path).status == 0
    assert _weights(tmp_path) == _weights(trained)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(5))
def test_a_killed_run_ends_on_the_same_networks(trained, tmp_path, moment):
    """kill -9 at a random moment: the parameters at the end are the same, bit for bit."""
    rough = random.Random(moment)
    for _ in range(rough.randint(1, 2)):
        process = _start(tmp_path)
        time.sleep(rough.uniform(3, 25))
        process.kill()
        process.wait()
    assert _train(tmp_path).status == 0
    assert _weights(tmp_path) == _weights(trained)


def test_evaluation_gives_intervals_and_is_not_done_twice(trained, tmp_path):
    flags = (
        CONFIG,
        f"--model={trained / 'policy'}",
        "--split=game24",
        "--strategy=greedy,best_first",
        "--max_expansions=2",
        "--limit=5",
        "--blind",
        f"--out={tmp_path}",
    )
    done = run_program("evaluate.py", *flags)
    assert done.status == 0, done.err[-2000:]
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["split"], r["strategy"], r["blind"]) for r in results] == [
        ("game24", strategy, blind)
        for strategy, blind in (("greedy", False), ("best_first", False), ("best_first", True))
    ]
    for result in results:
        low, high = result["interval_95"]
        assert low <= result["accuracy"] <= high
        assert result["n"] == 5
        if result["max_expansions"] is not None:
            assert result["expansions"] <= result["max_expansions"] == 2
    records = (tmp_path / "game24" / "best_first-2-64-0.jsonl").read_text().splitlines()
    assert len(records) == 5
    again = run_program("evaluate.py", *flags)
    assert again.status == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(results)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--workdir=DIR is missing"),
        (("--config=configs/smollm2.py",), "no `train`"),
    ],
)
def test_wrong_flags_are_named(flags, message, tmp_path):
    extra = (f"--workdir={tmp_path}",) if flags else ()
    done = run_program("train.py", *(flags or (CONFIG,)), *extra)
    assert done.status != 0
    assert message in done.err


def test_wrong_evaluations_are_named(tmp_path):
    for flags, message in (
        (("--split=gsm",), "'gsm'"),
        ((), "--split or --problems"),
        (("--split=game24", "--max_expansions=x"), "--max_expansions=x"),
        (("--split=game24", "--model=nowhere"), "nowhere"),
    ):
        done = run_program("evaluate.py", CONFIG, f"--out={tmp_path}", *flags)
        assert done.status != 0
        assert message in done.err
