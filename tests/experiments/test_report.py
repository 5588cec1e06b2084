"""report.py on results written by hand: which row says what."""

import json
import re

import pytest
from running import run_program

CELL = {
    "split": "countdown4-inputs", "max_expansions": None, "budget_tokens": 2000, "seed": 0,
    "blind": False, "num_chains": None, "model": "m",
}  # fmt: skip
FIGURES = {
    "n": 1000, "interval_95": [0.5, 0.9], "expansions": 3.0, "model_calls": 9.0,
    "command": "evaluate.py --out=R",
}  # fmt: skip
RESULTS = [
    {**CELL, **FIGURES, "strategy": "greedy", "accuracy": 0.4, "generated_tokens": 12.0},
    {**CELL, **FIGURES, "strategy": "best_first", "max_expansions": 8, "accuracy": 0.75,
     "generated_tokens": 50.0, "scored_tokens": 30.4},
    {**CELL, **FIGURES, "strategy": "best_first", "max_expansions": 8, "accuracy": 0.2,
     "generated_tokens": 0.0, "blind": True},
    {**CELL, **FIGURES, "strategy": "best_of_n", "num_chains": 32, "accuracy": 0.9,
     "generated_tokens": 400.0, "tokens_in_turn": 80.0},
    {**CELL, **FIGURES, "strategy": "best_of_n", "num_chains": 8, "accuracy": 0.6,
     "generated_tokens": 100.0, "tokens_in_turn": 50.0},
]  # fmt: skip
CALIBRATIONS = [
    {**CELL, "strategy": "best_first", "max_expansions": 8, "depth": depth, "num_states": 40,
     "num_solvable": 10, "num_problems": 7, "auc": auc, "ece": [0.1, 0.05, 0.2]}
    for depth, auc in ((1, [0.8125, 0.7, 0.9]), (2, None), (None, [0.75, 0.7, 0.8]))
]  # fmt: skip


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_tables(page):
    """The rows of every table, as cells."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [re.split(r" *\| *", line)[1:-1] for line in lines]


def report(tmp_path, *results, flags=()):
    write(tmp_path / "results.jsonl", results)
    done = run_program(
        "report.py", f"--results={tmp_path}/results.jsonl", f"--out={tmp_path}/page.md", *flags
    )
    assert done.status == 0, done.err
    return (tmp_path / "page.md").read_text()


def test_chains_stand_beside_searches_with_their_price(tmp_path):
    page = report(tmp_path, *RESULTS)
    assert page.count("## countdown4-inputs\n") == 1
    assert "Value calibration" not in page
    head, _, *rows = read_tables(page)
    assert {len(row) for row in rows} == {len(head)}
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(found) == ["best of 8", "best of 32", "greedy", "best_first", "blind best_first"]
    assert found["best of 32"]["tokens"] == "400; in turn 80"
    search = found["best_first"]
    assert (search["accuracy"], search["95%"], search["tokens"]) == ("75.0", "50.0-90.0", "50")
    # Halfway in accuracy is the geometric mean in tokens.
    assert search["best of N needs"] == "200 (4.0x); in turn 63 (1.3x)"
    assert [found[name]["read"] for name in ("best_first", "greedy")] == ["30", "-"]
    assert (search["expansions at most"], search["tokens at most"]) == ("8", "2000")
    for name in ("greedy", "best of 8", "blind best_first"):
        assert found[name]["best of N needs"] == "-"
    assert found["blind best_first"]["tokens"] == "-"
    assert page.endswith("## Commands\n\n    python evaluate.py --out=R\n")


def test_what_was_not_reached_is_a_bound(tmp_path):
    strong = {**RESULTS[1], "accuracy": 0.95}
    row = read_tables(report(tmp_path, strong, *RESULTS[3:]))[-1]
    assert row[-2] == ">400 (>8.0x); in turn >80 (>1.6x)"


def test_calibration_stands_by_depth(tmp_path):
    write(tmp_path / "calibration.jsonl", CALIBRATIONS)
    page = report(tmp_path, *RESULTS)
    (head, _, *rows) = read_tables(page[page.index("## Value calibration") :])
    assert head[3] == "moves"
    assert [row[3] for row in rows] == ["1", "2", "all"]
    assert [row[7] for row in rows] == ["0.812 (0.700-0.900)", "-", "0.750 (0.700-0.800)"]
    assert {row[5] for row in rows} == {"25%"}
    assert {row[8] for row in rows} == {"0.100 (0.050-0.200)"}


def test_two_models_have_tables_of_their_own(tmp_path):
    old = {name: value for name, value in RESULTS[0].items() if name != "num_chains"}
    page = report(tmp_path, old, {**RESULTS[1], "model": "other"}, *RESULTS[3:])
    assert page.count("\n## countdown4-inputs, ") == 2
    row = next(row for row in read_tables(page) if row[0] == "best_first")
    # Nobody measured the chains of this model.
    assert row[-2] == "-"


def test_missing_files_are_named(tmp_path):
    done = run_program("report.py", f"--out={tmp_path}/page.md")
    assert done.status == 2
    assert "--results=FILE and --out=FILE are both needed" in done.err
    done = run_program("report.py", f"--results={tmp_path}/none", f"--out={tmp_path}/page.md")
    assert done.status == 2
    assert "there is no such file" in done.err


@pytest.mark.parametrize(
    ("flag", "line", "message"),
    [
        ("results", b"# Results", "line 2: not JSON"),
        ("results", b"\xff\xfe", "line 2: not JSON"),
        ("results", b"[1]", "line 2: not a JSON object"),
        ("results", json.dumps(CALIBRATIONS[0]).encode(), "line 2: lacks n, accuracy, interv"),
        ("improvement", json.dumps(RESULTS[0]).encode(), "line 2: lacks arm, round, steps"),
    ],
)
def test_a_broken_file_is_named(tmp_path, flag, line, message):
    write(tmp_path / "results.jsonl", RESULTS)
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(b"\n" + line + b"\n")
    flags = (f"--results={tmp_path}/results.jsonl", f"--{flag}={broken}")
    done = run_program("report.py", *flags, f"--out={tmp_path}/page.md")
    assert done.status == 2
    assert done.err.startswith(f"report.py: --{flag}={broken}: {message}")
    assert not (tmp_path / "page.md").exists()


def test_self_improvement_stands_beside_it(tmp_path):
    point = {
        "seed": 0, "arm": "start", "round": 0, "steps": 4, "seconds": 1.0,
        "results": RESULTS[:2], "calibration": CALIBRATIONS, "command": "improve.py --out=I",
    }  # fmt: skip
    write(tmp_path / "one.jsonl", [point])
    write(tmp_path / "other.jsonl", [point | {"command": "improve.py --out=J"}])
    files = f"{tmp_path}/one.jsonl,{tmp_path}/other.jsonl"
    page = report(tmp_path, *RESULTS, flags=[f"--improvement={files}"])
    assert page.count("## Self-improvement") == 1
    assert page.index("    python improve.py --out=I\n") < page.index(
        "    python improve.py --out=J\n"
    )
    # Written anew without the measurements, the page keeps what it says of them.
    again = report(tmp_path, *RESULTS, *RESULTS[1:2])
    begin, end = "## Self-improvement", "## Commands"
    assert again != page
    assert again[again.index(begin) : again.index(end)] == page[page.index(begin) : page.index(end)]
