"""improve.py: two arms from the same networks, and the table of both."""

import json

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
        (("--config.train.num_steps=1",), "train.num_steps=1: accepted is >= 2"),
        (("--config.train.search.num_steps=0",), "train.search.num_steps=0: accepted is >= 2"),
    ],
)
def test_wrong_flags_are_named(flags, message, tmp_path):
    out = (f"--out={tmp_path / 'out'}",) if flags else ()
    done = run_program("improve.py", CONFIG, *flags, *out)
    assert done.status == 2
    assert message in done.err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_both_arms_begin_with_the_same_networks_and_are_not_run_twice(tmp_path):
    flags = (CONFIG, "--seeds=0,1", "--rounds=1", "--limit=4", "--config.train.log_steps=1")
    done = run_program("improve.py", *flags, f"--out={tmp_path}")
    assert done.status == 0, done.err[-2000:]
    lines = (tmp_path / "improvement.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| 0", "start"], ["| 1", "more"], ["| 1", "search"],
    ]  # fmt: skip
    for arm, phase in (("search1", "search"), ("more1", "supervised")):
        folder = tmp_path / "seed1" / arm
        about = json.loads((folder / "policy" / "config.json").read_text())["rlm_jax"]
        assert about["train"]["begin_with"] == str(tmp_path / "seed1" / "start" / "policy")
        assert [path.name for path in (folder / "checkpoints").iterdir()] == [phase]
    again = run_program("improve.py", *flags, f"--out={tmp_path}")
    assert again.status == 0
    assert (tmp_path / "improvement.md").read_text().splitlines() == lines
