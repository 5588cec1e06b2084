"""evaluate.py with the shipped network: budgets, chains, blind rows, calibration, then the page."""

import json

import pytest
from running import run_program

from rlm_jax.data.records import read_records
from rlm_jax.evaluation import solver
from rlm_jax.evaluation.chains import read_chains

CONFIG = "--config=configs/countdown.py:smoke"
FLAGS = (
    CONFIG,
    "--model=package:countdown",
    "--split=game24",
    "--strategy=greedy,best_first",
    "--max_expansions=1,2",
    "--best_of=3",
    "--limit=6",
    "--blind",
    "--calibration",
)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, cache):
    """A folder of results, and how many programs were compiled for them."""
    out = tmp_path_factory.mktemp("results")
    compiled, compile_programs = [], solver.compile_programs

    def count(lm, shape):
        compiled.append(shape.strategy.name)
        return compile_programs(lm, shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "compile_programs", count)
        done = run_program("evaluate.py", *FLAGS, f"--out={out}", cache=cache)
    assert done.status == 0, done.err[-2000:]
    return out, compiled


def test_all_budgets_of_a_strategy_are_compiled_once(evaluated):
    assert evaluated[1] == ["greedy", "best_first", "best_of_n"]


def test_every_row_has_its_blind_one(evaluated):
    results = read_lines(evaluated[0] / "results.jsonl")
    rows = [(r["strategy"], r["max_expansions"], r["num_chains"], r["blind"]) for r in results]
    limited = [("best_first", 1, None), ("best_first", 2, None), ("best_of_n", None, 3)]
    wanted = [(*row, blind) for row in limited for blind in (False, True)]
    assert rows == [("greedy", None, None, False), *wanted]
    for result in results:
        low, high = result["interval_95"]
        assert low <= result["accuracy"] <= high
        assert result["n"] == 6
        if result["max_expansions"] is not None:
            assert 0 < result["expansions"] <= result["max_expansions"]
        assert (result["generated_tokens"] == 0) == result["blind"]


def test_chains_are_drawn_to_their_ends_and_counted_both_ways(evaluated):
    out = evaluated[0]
    (row,) = (r for r in read_lines(out / "results.jsonl") if r["num_chains"] and not r["blind"])
    assert 0 < row["tokens_in_turn"] <= row["generated_tokens"]
    records = list(read_records(out / "game24" / "best_of_3-all-64-0.jsonl"))
    assert len(records) == 6
    for record in records:
        assert record["config"]["num_chains"] == 3
        assert record["config"]["stop_proven"] is False
        chains = read_chains(record)
        assert len(chains) == 3
        assert sum(chain.tokens for chain in chains) == record["budget"]["generated_tokens"]


def test_values_are_held_against_the_solver(evaluated):
    out = evaluated[0]
    summaries = read_lines(out / "calibration.jsonl")
    for name, expansions in (("best_first-1-64-0", 1), ("best_first-2-64-0", 2)):
        states = read_lines(out / "game24" / f"{name}.states.jsonl")
        records = {r["id"]: r for r in read_records(out / "game24" / f"{name}.jsonl")}
        for state in states:
            node = records[state["problem"]]["nodes"][state["node"]]
            assert node["value"]["model"] == state["value"]
            assert node["depth"] == state["depth"]
        (whole,) = (
            s
            for s in summaries
            if (s["strategy"], s["max_expansions"], s["depth"]) == ("best_first", expansions, None)
        )
        assert whole["num_states"] == len(states) > 0
        assert whole["num_solvable"] == sum(state["solvable"] for state in states)
        value, low, high = whole["ece"]
        assert 0 <= low <= value <= high <= 1


def test_nothing_is_done_twice_and_the_page_has_it_all(evaluated, cache):
    out = evaluated[0]
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    assert run_program("evaluate.py", *FLAGS, f"--out={out}", cache=cache).status == 0
    assert {path: path.read_bytes() for path in out.rglob("*.jsonl")} == before
    page = out / "page.md"
    assert run_program("report.py", f"--results={out}/results.jsonl", f"--out={page}").status == 0
    text = page.read_text()
    for part in ("| best of 3 |", "| blind best of 3 |", "in turn", "## Value calibration"):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split=game24", "--best_of=0"), "--best_of=0: accepted are whole numbers >= 1"),
        (("--split=game24", "--budget_tokens=x"), "--budget_tokens=x"),
        (("--problems=p.jsonl", "--calibration", "--config.task=arithmetic"), "--calibration"),
        (("--split=game24", "--calibration", "--config.evaluator=none"), "gives no values"),
    ],
)
def test_wrong_flags_are_named(no_model, tmp_path, monkeypatch, flags, message):
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"question": "1 + 1"}\n')
    flags = [flag.replace("p.jsonl", str(problems)) for flag in flags]
    done = run_program("evaluate.py", CONFIG, f"--out={tmp_path}/out", *flags)
    assert done.status == 2
    assert message in done.err
