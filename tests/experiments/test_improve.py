"""improve.py: two arms from the same networks, and the table of both."""

import json
import subprocess

import pytest
from running import run_program

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

CONFIG = "--config=configs/countdown.py:smoke"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--out=DIR is missing"),
        (("--seeds=a",), "--seeds=a: accepted are whole numbers"),
        (("--max_expansions=0",), "--max_expansions=0: 0 is not a positive integer"),
        (("--config.train.num_steps=3",), "train.num_steps=3: accepted is >= 4, twice"),
        (("--config.train.search.num_steps=0",), "train.search.num_steps=0: accepted is >= 4"),
    ],
)
def test_wrong_flags_are_named(flags, message, tmp_path):
    out = (f"--out={tmp_path / 'out'}",) if flags else ()
    done = run_program("improve.py", CONFIG, *flags, *out)
    assert done.status == 2
    assert message in done.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), None),
        (("--seeds=5", "--rounds=2"), None),
        (("--limit=5",), "limit=4 (now 5)"),
        (("--max_expansions=9", "--split=game24"), "max_expansions=8 (now 9)"),
        (("--max_expansions=9", "--split=game24"), "split='countdown4-inputs' (now 'game24')"),
        (
            ("--config.train.search.num_steps=99",),
            "holds a course with config.train.search.num_steps=2 (now 99); name another --out",
        ),
    ],
)
def test_a_course_goes_on_under_its_own_settings_alone(flags, message, tmp_path, monkeypatch):
    started = []

    def stop(command, check):
        started.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", stop)
    first = (CONFIG, f"--out={tmp_path}", "--limit=4", "--config.train.log_steps=1")
    assert run_program("improve.py", *first).status == 3
    done = run_program("improve.py", *first, *flags)
    assert len(started) == (2 if message is None else 1)
    assert done.status == (3 if message is None else 2)
    assert (message or "") in done.err
    assert done.err.count("\n") == (message is not None)


@pytest.mark.slow
def test_both_arms_begin_with_the_same_networks_and_are_not_run_twice(tmp_path):
    config = CONFIG.split("=")  # As two words, which flags may be, too.
    flags = (*config, "--seeds=0,1", "--rounds=1", "--limit=4", "--config.train.log_steps", "1")
    done = run_program("improve.py", *flags, f"--out={tmp_path}")
    assert done.status == 0, done.err[-2000:]
    lines = (tmp_path / "improvement.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    assert [(point["seed"], point["arm"], point["round"]) for point in points] == [
        (seed, *rest) for seed in (0, 1) for rest in (("start", 0), ("search", 1), ("more", 1))
    ]
    for start, search, more in (points[:3], points[3:]):
        seconds = start["seconds"] / start["steps"]
        assert more["steps"] == max(2, round(search["seconds"] / seconds))
        assert all(result["n"] == 4 for result in more["results"])
    for arm, phase in (("search1", "search"), ("more1", "supervised")):
        folder = tmp_path / "seed1" / arm
        about = json.loads((folder / "policy" / "config.json").read_text())["rlm_jax"]
        assert about["train"]["begin_with"] == str(tmp_path / "seed1" / "start" / "policy")
        assert [path.name for path in (folder / "checkpoints").iterdir()] == [phase]
    again = run_program("improve.py", *flags, f"--out={tmp_path}")
    assert again.status == 0
    assert (tmp_path / "improvement.jsonl").read_text().splitlines() == lines
