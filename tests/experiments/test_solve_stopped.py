"""experiments/solve.py stopped by signals: what it keeps, and how it goes on."""

import json
import os
import re
import shutil
import signal
import time
import zipfile

import numpy as np
import pytest
from solving import SMOKE, assert_refused, assert_same_search, records_of, start, write_problems

from rlm_jax.core.snapshot import read_about
from rlm_jax.data.records import RecordWriter, read_records
from rlm_jax.evaluation import build

SAVED = "records.jsonl.{}.search.npz"


@pytest.mark.parametrize("num_signals", [1, 2])
def test_an_interruption_between_records_keeps_them(
    solve, undisturbed, tmp_path, monkeypatch, num_signals
):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    write = RecordWriter.write

    def write_and_stop(self, record):
        write(self, record)
        if len(records_of(tmp_path)) == 3:
            for _ in range(num_signals):
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RecordWriter, "write", write_and_stop)
    flags = (*SMOKE, f"--problems={undisturbed}/p.jsonl", f"--out={tmp_path}")
    done = solve(*flags)
    assert (done.status, done.err) == (130, "\nsolve.py: stopped\n")
    found = list(records_of(tmp_path))
    # The first lets the chunk of rounds come to its end, the second does not.
    assert len(found) >= 3 if num_signals == 1 else len(found) == 3
    assert found == list(records_of(undisturbed))[: len(found)]
    assert (tmp_path / SAVED.format("gumbel")).exists() == (num_signals == 1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    monkeypatch.undo()
    assert solve(*flags).status == 0
    assert not (tmp_path / SAVED.format("gumbel")).exists()
    for name, record in records_of(tmp_path).items():
        assert_same_search(record, records_of(undisturbed)[name])


@pytest.mark.slow
def test_signals_in_the_middle_of_searches_lose_nothing(solve, cache, tmp_path, monkeypatch):
    """Two processes of their own, ended by Ctrl-C and SIGTERM, and a third run to the end."""
    problems = [{"id": f"q{i}", "question": f"What is {i} + 1?"} for i in range(20)]
    out = tmp_path / "out"
    longer = ("--strategy=puct", "--budget_tokens=240", "--config.puct.num_nodes=65")
    flags = (*SMOKE, *longer, write_problems(tmp_path / "p.jsonl", problems))
    written = b""
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(*flags, f"--out={out}", f"--compilation_cache={cache}/own")
        wait_for_growth(process, out / "records.jsonl", len(written))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert re.fullmatch(
            r"(\nsolve\.py: saving the running searches; once more to leave at once\n)?"
            r"\nsolve\.py: stopped; what is done is kept, the same command goes on\n",
            err,
        )
        after = (out / "records.jsonl").read_bytes()
        assert after.startswith(written)
        assert len(after) > len(written)
        written = after
        running = saved_sizes(out / SAVED.format("puct"))
        assert running
        assert not set(running) & set(records_of(out))
        assert any(size > 1 for size in running.values())
    assert 0 < len(records_of(out)) < len(problems)
    with monkeypatch.context() as patch:
        patch.setattr(build, "load_policy", None)
        refuse_other_runs(solve, flags, problems, out, tmp_path / "other", next(iter(running)))
    assert solve(*flags, f"--out={out}").status == 0
    assert (out / "records.jsonl").read_bytes().startswith(written)
    assert [path.name for path in out.iterdir()] == ["records.jsonl"]

    assert solve(*flags, f"--out={tmp_path}/whole").status == 0
    found, expected = records_of(out), records_of(tmp_path / "whole")
    assert len(list(read_records(out / "records.jsonl"))) == len(found) == len(problems)
    for name in expected:
        assert_same_search(found[name], expected[name])


def saved_sizes(path):
    """Nodes of each saved search, by problem."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name, _ in json.loads(archive.read("names.json"))]
    sizes = np.load(path)[f"a{names.index('.structure.num_nodes')}"]
    return {name: int(sizes[row]) for row, name, _ in read_about(path)["rows"]}


def refuse_other_runs(solve, flags, problems, out, other, running):
    """Each change is named, before a model is loaded; without records too."""
    other.mkdir()
    shutil.copy(out / SAVED.format("puct"), other)
    changed = [p | {"question": "Why?"} if p["id"] == running else p for p in problems]
    for more, message in (
        (["--seed=1"], r"seed=0 \(now 1\)"),
        (["--config.puct.exploration=3.0"], r"exploration=1\.25 \(now 3\.0\)"),
        (["--config.batch_size=1"], r"batch_size=2 \(now 1\)"),
        (["--stop_value=0.9"], r"stop_value=None \(now 0\.9\)"),
        (["--trace"], r"trace=False \(now True\)"),
        ([write_problems(other / "c.jsonl", changed)], f"another question of problem '{running}'"),
        (["--limit=1"], r"problem 'q1' \(now gone\)"),
    ):
        done = solve(*flags, f"--out={other}", *more)
        assert_refused(done, rf"{SAVED.format('puct')} holds running searches with [^\n]*{message}")


def wait_for_growth(process, path, size, timeout_seconds=600):
    deadline = time.monotonic() + timeout_seconds
    while not path.exists() or path.stat().st_size <= size:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.002)
