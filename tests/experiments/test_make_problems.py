"""make_problems.py: files of any task that generates, and one clear line for what is none."""

import functools
import json

import pytest
from running import run_program

make = functools.partial(run_program, "make_problems.py")


def test_a_file_is_written_and_solved(solve, tmp_path):
    path = tmp_path / "made" / "sorting.jsonl"
    done = make("--task=sorting", "--num_problems=3", "--seed=5", f"--out={path}")
    assert (done.status, done.out) == (0, f"3 problems: {path}\n")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"sorting-0-5-{i}" for i in range(3)]
    flags = ("--config=configs/smollm2.py:smoke", "--config.task=sorting", "--strategy=greedy")
    done = solve(*flags, f"--problems={path}", f"--out={tmp_path}")
    assert done.status == 0, done.err
    assert "greedy: 3 records, 0/3 correct" in done.out


def test_problems_of_reasoning_gym(tmp_path):
    pytest.importorskip("reasoning_gym")
    path = tmp_path / "legs.jsonl"
    done = make("--task=reasoning_gym:leg_counting", "--num_problems=2", f"--out={path}")
    assert done.status == 0, done.err
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [json.loads(row["answer"])["dataset"] for row in rows] == ["leg_counting"] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--task=sat",), "--out is missing"),
        (("--out=x.jsonl",), "--task is missing"),
        (("--task=sums", "--out=x.jsonl"), "--task=sums: accepted are arithmetic, countdown"),
        (("--task=game24", "--out=x.jsonl"), "--task=game24: accepted are"),
        (("--task=sat", "--out=configs"), "--out=configs is a folder; accepted is a file"),
        (("--task=sat", "--difficulty=2", "--out=x.jsonl"), "difficulty must be in [0, 1]"),
        (("--task=sat", "--num_problems=0", "--out=x.jsonl"), "num_problems"),
        (
            ("--task=reasoning_gym:leg_counting", "--difficulty=0.5", "--out=x.jsonl"),
            "--difficulty: data sets of reasoning-gym have settings of their own",
        ),
    ],
)
def test_what_is_no_task_is_refused(flags, message):
    done = make(*flags)
    assert done.status == 2
    assert message in done.err
