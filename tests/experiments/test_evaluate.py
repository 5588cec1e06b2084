"""evaluate.py with the shipped network: budgets, chains, blind rows, calibration, then the page."""

import dataclasses
import json
import re
import shutil

import pytest
from running import run_program

from rlm_jax.data.problems import write_problems
from rlm_jax.data.records import read_records
from rlm_jax.data.splits import load_split
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


LATER_FIELDS = ("problems", "settings")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit_lines(path, edit):
    """Puts `edit(line)` in place of each line, and nothing where that is None."""
    write_lines(path, filter(None, map(edit, read_lines(path))))


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


@pytest.fixture
def copied(evaluated, tmp_path):
    """A folder of results of one's own."""
    return shutil.copytree(evaluated[0], tmp_path / "out")


def forget(line):
    """A line as earlier versions wrote it."""
    return {name: value for name, value in line.items() if name not in LATER_FIELDS}


def only_blind(line):
    return line if line["blind"] else None


def assert_refused(done, message):
    assert done.status == 2
    assert re.fullmatch(rf"evaluate\.py: [^\n]*{message}[^\n]*\n", done.err), done.err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("edit", "flags", "message"),
    [
        (None, ["--model=m"], r"game24/greedy-all-64-0 with model='package:countdown' \(now 'm'\)"),
        (forget, ["--model=m"], r"with model='package:countdown' \(now 'm'\); name another --out"),
        (None, ["--limit=5"], r"results\.jsonl holds game24/greedy-all-64-0 with n=6 \(now 5\)"),
        (
            None,
            ["--config.best_first.prior_weight=0.5"],
            r"holds game24/best_first-1-64-0 with prior_weight=0\.7 \(now 0\.5\); name another",
        ),
        (
            forget,
            ["--config.best_first.prior_weight=0.5"],
            r"best_first-1-64-0\.jsonl holds records of best_first with prior_weight=0\.7",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_figures_of_another_run_are_refused(copied, edit, flags, message):
    if edit is not None:
        edit_lines(copied / "results.jsonl", edit)
    assert_refused(run_program("evaluate.py", *FLAGS, *flags, f"--out={copied}"), message)


@pytest.mark.usefixtures("no_model")
def test_blind_figures_are_of_their_settings_and_calibration_of_its_model(copied):
    edit_lines(copied / "calibration.jsonl", lambda line: line | {"model": "m"})
    done = run_program("evaluate.py", *FLAGS, f"--out={copied}")
    assert_refused(done, r"calibration\.jsonl holds game24/greedy-all-64-0 with model='m' \(now 'p")
    shutil.rmtree(copied / "game24")
    (copied / "calibration.jsonl").unlink()
    edit_lines(copied / "results.jsonl", only_blind)
    flags = (*FLAGS, "--model=m", f"--out={copied}")
    done = run_program("evaluate.py", *flags, "--config.best_first.num_lanes=2")
    assert_refused(done, r"holds blind game24/best_first-1-64-0 with num_lanes=1 \(now 2\)")
    # Which model stands beside them is nothing to them.
    with pytest.raises(AssertionError, match="a model was loaded"):
        run_program("evaluate.py", *flags)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("edit", [dict, forget])
def test_figures_of_other_problems_are_refused(copied, tmp_path, edit):
    edit_lines(copied / "results.jsonl", edit)
    flags = (*FLAGS, "--split=", "--config.task=game24", f"--problems={tmp_path}/game24.jsonl")
    problems, golds = zip(*load_split("game24").examples[:12], strict=True)
    ids = [problem.id for problem in problems]
    for names, message in (
        (ids[:6], f"greedy-all-64-0.jsonl holds another question under the id '{ids[0]}'"),
        ([name + "x" for name in ids[:6]], "holds game24/greedy-all-64-0 of other problems; name"),
    ):
        others = [dataclasses.replace(p, id=i) for p, i in zip(problems[6:], names, strict=True)]
        write_problems(tmp_path / "game24.jsonl", zip(others, golds[6:], strict=True))
        assert_refused(run_program("evaluate.py", *flags, f"--out={copied}"), message)
    # The same ones from a file are the same.
    write_problems(tmp_path / "game24.jsonl", zip(problems, golds, strict=True))
    with pytest.raises(AssertionError, match="a model was loaded"):
        run_program("evaluate.py", *flags, f"--out={copied}")


@pytest.mark.usefixtures("no_model")
def test_figures_of_earlier_versions_stand(copied):
    edit_lines(copied / "results.jsonl", forget)
    for _ in range(2):
        with pytest.raises(AssertionError, match="a model was loaded"):
            run_program("evaluate.py", *FLAGS, f"--out={copied}")
        shutil.rmtree(copied / "game24", ignore_errors=True)


@pytest.mark.usefixtures("no_model")
def test_chains_alone_need_no_strategy(copied):
    with pytest.raises(AssertionError, match="a model was loaded"):
        run_program("evaluate.py", *FLAGS, "--strategy=", f"--out={copied}")


def test_a_cell_takes_up_what_a_larger_limit_admits(copied, cache):
    before = read_lines(copied / "results.jsonl")
    calibrated = read_lines(copied / "calibration.jsonl")
    records = (copied / "game24" / "greedy-all-64-0.jsonl").read_bytes()
    flags = (*FLAGS, "--strategy=greedy", "--best_of=", "--limit=8", f"--out={copied}")
    done = run_program("evaluate.py", *flags, cache=cache)
    assert done.status == 0, done.err[-2000:]
    *kept, greedy = read_lines(copied / "results.jsonl")
    assert kept == before[1:]
    assert (greedy["strategy"], greedy["n"]) == ("greedy", 8)
    after = (copied / "game24" / "greedy-all-64-0.jsonl").read_bytes()
    assert after.startswith(records)
    assert after.count(b"\n") == 8
    others = [one for one in calibrated if one["strategy"] != "greedy"]
    *kept, whole = read_lines(copied / "calibration.jsonl")
    assert kept[: len(others)] == others
    assert {one["strategy"] for one in (*kept[len(others) :], whole)} == {"greedy"}
    states = read_lines(copied / "game24" / "greedy-all-64-0.states.jsonl")
    assert whole["num_states"] == len(states)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split=game24", "--strategy="), "--strategy is empty: accepted are greedy, "),
        (("--split=game24", "--strategy=,"), "--strategy is empty: accepted are greedy, "),
        (("--problems=empty.jsonl",), "empty.jsonl holds no problem"),
        (("--problems=p.jsonl", "--config.task=sums"), "task 'sums': accepted are free, "),
        (("--split=game24", "--out=README.md"), "--out=README.md is a file; accepted is a folder"),
        (("--split=game24", "--best_of=0"), "--best_of=0: accepted are whole numbers >= 1"),
        (("--split=game24", "--budget_tokens=x"), "--budget_tokens=x"),
        (("--problems=p.jsonl", "--calibration", "--config.task=arithmetic"), "--calibration"),
        (("--split=game24", "--calibration", "--config.evaluator=none"), "gives no values"),
    ],
)
def test_wrong_flags_are_named(no_model, tmp_path, monkeypatch, flags, message):
    (tmp_path / "p.jsonl").write_text('{"question": "1 + 1"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    flags = [flag.replace("--problems=", f"--problems={tmp_path}/") for flag in flags]
    done = run_program("evaluate.py", CONFIG, f"--out={tmp_path}/out", *flags)
    assert_refused(done, re.escape(message))
    assert not (tmp_path / "out").exists()
