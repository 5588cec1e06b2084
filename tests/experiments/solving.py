"""What the tests of experiments/solve.py share: problems, runs, and how records are compared."""

import json
import re
import subprocess
import sys

import pytest
from running import ROOT

from rlm_jax.data.records import read_records

# Wide buckets: all short questions share one compiled program.
SMOKE = ("--config=configs/smollm2.py:smoke", "--config.bucket_tokens=256")
NUM_PROBLEMS = 6
PROBLEMS = [{"id": f"p{i}", "question": f"What is {i} + {3 * i}?"} for i in range(NUM_PROBLEMS)]


def write_problems(path, problems):
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return f"--problems={path}"


def records_of(folder):
    return {record["id"]: record for record in read_records(folder / "records.jsonl")}


def without(record, *fields):
    return {name: value for name, value in record.items() if name not in ("seconds", *fields)}


def assert_same_search(one, other, tolerance=1e-5):
    """Equal records but for the clock; floats within `tolerance`."""

    def compare(a, b, name):
        if isinstance(a, dict):
            assert a.keys() == b.keys(), name
            for key in a:
                compare(a[key], b[key], f"{name}.{key}")
        elif isinstance(a, list):
            assert len(a) == len(b), name
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                compare(x, y, f"{name}[{i}]")
        elif isinstance(a, float) and isinstance(b, float):
            assert a == pytest.approx(b, abs=tolerance), name
        else:
            assert a == b, name

    compare(without(one), without(other), "record")


def start(*flags):
    return subprocess.Popen(
        [sys.executable, ROOT / "experiments/solve.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_refused(done, message):
    """Status 2, nothing printed but one line that says what is wrong."""
    assert done.status == 2
    assert re.fullmatch(rf"solve\.py: [^\n]*{message}[^\n]*\n", done.err), done.err
    assert done.out == ""
