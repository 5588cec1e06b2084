"""Many problems through few rows: whose record is whose, on a mesh and over a restart."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from replay import replay

from configs.smollm2 import get_config
from rlm_jax.core.mesh import make_mesh
from rlm_jax.core.snapshot import save_snapshot
from rlm_jax.evaluation import build, pause, solver
from rlm_jax.tasks.base import Gold, Problem

PROBLEMS = [Problem(f"What is {n} + {n}?", id=f"p{n}") for n in range(5)]
SETTINGS = {"seed": 0, "mesh": None}


class StoppedError(Exception):
    """The run was stopped between two chunks."""


def make_solver():
    config = get_config("smoke").to_dict()
    config["budget_tokens"], config["puct"]["num_nodes"] = 120, 41
    plan = build.plan_strategy(config, "puct")
    policy = build.load_policy(config["model"])
    one = build.build_solver(config, plan, policy, seed=0, batch_size=2, chunk_rounds=1)
    return dataclasses.replace(one, trace=True)


@pytest.fixture(scope="module")
def one():
    return make_solver()


@pytest.fixture(scope="module")
def split(one):
    return solver.spread_solver(one, make_mesh(data=2, devices=jax.devices()[:2]))


def stream(one, problems, **settings):
    encoded = [solver.encode(one, problem) for problem in problems]
    golds = [Gold(problem.id) for problem in problems]
    for done in solver.solve_stream(one, encoded, golds, **settings):
        yield done._replace(record={**done.record, "seconds": None})


def solve(one, problems):
    done = {solved.place: solved for solved in stream(one, problems)}
    return [done[place] for place in range(len(problems))]


@pytest.fixture(scope="module")
def together(one):
    return solve(one, PROBLEMS)


def test_a_long_list_keeps_its_order_and_every_record_is_as_if_alone(one, together):
    assert [solved.record["id"] for solved in together] == [problem.id for problem in PROBLEMS]
    for problem, solved in zip(PROBLEMS[1:4:2], together[1:4:2], strict=True):
        assert solved.record == solve(one, [problem])[0].record


def test_the_events_of_a_problem_rebuild_its_record(together):
    for solved in together:
        alive, parents = replay([(event.operator, event.nodes) for event in solved.events])
        nodes = solved.record["nodes"]
        assert alive == [node["alive"] for node in nodes]
        assert parents == [node["parents"] for node in nodes]


def test_shards_give_the_records_of_one_device(split, together):
    for ours, theirs in zip(solve(split, PROBLEMS), together, strict=True):
        assert ours.events == theirs.events
        for a, b in zip(ours.record["nodes"], theirs.record["nodes"], strict=True):
            assert a["tokens"] == b["tokens"]
            assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)
            assert a["value"] == pytest.approx(b["value"], abs=1e-4)


def count_compiles(run):
    """What `run()` gives, and how many programs XLA compiled for it, the reading of logs apart:
    its arrays are as long as a search had rounds."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("jax._src.dispatch")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            found = run()
    finally:
        logger.removeHandler(handler)
    compiled = [line for line in lines if line.startswith("Finished XLA compilation")]
    return found, sum("_backtracks" not in line for line in compiled)


def test_budgets_of_expansions_and_tokens_share_what_is_compiled(one, together):
    """A limit above what a search takes changes nothing; one below is kept exactly."""
    free = [solved.record["budget"] for solved in together]
    most = min(budget["expansions"] for budget in free)
    assert most > 2
    for expansions in (most - 1, 1, 10**6):
        limited = dataclasses.replace(one, max_expansions=expansions)
        found, compiles = count_compiles(lambda limited=limited: solve(limited, PROBLEMS))
        assert compiles == 0
        if expansions == 10**6:
            assert found == together
        else:
            assert {solved.record["budget"]["expansions"] for solved in found} == {expansions}
    few, compiles = count_compiles(
        lambda: solve(dataclasses.replace(one, budget_tokens=40), PROBLEMS)
    )
    assert compiles == 0
    for solved, budget in zip(few, free, strict=True):
        assert solved.record["budget"]["generated_tokens"] <= 40 < budget["generated_tokens"]
    # The count counts: another batch size is another program.
    _, compiles = count_compiles(
        lambda: solve(dataclasses.replace(one, batch_size=1, programs={}), PROBLEMS[:1])
    )
    assert compiles > 0
    with pytest.raises(ValueError, match="max_expansions must be >= 1 or None, got 0"):
        dataclasses.replace(one, max_expansions=0)


def stop_and_go(one, path):
    """Every chunk in a run of its own: what all of them wrote, and the first file saved."""
    done, first, num_stops = {}, None, 0
    while True:
        left = [problem for problem in PROBLEMS if problem.id not in done]
        encoded = [solver.encode(one, problem) for problem in left]
        width = solver.bucket_width(one, encoded[0])
        saved = pause.find_saved(path, SETTINGS, PROBLEMS)
        assert (saved is None) == (num_stops == 0)
        resume = saved and pause.load_running(saved, solver.prepare(one, width), encoded)

        def stop(running, encoded=encoded, width=width):
            pause.save_running(path, running, encoded, width, SETTINGS, PROBLEMS)
            raise StoppedError

        try:
            for solved in stream(one, left, on_pause=stop, resume=resume):
                done[solved.record["id"]] = solved
        except StoppedError:
            num_stops += 1
            first = first or path.read_bytes()
        else:
            assert num_stops > 2 * len(PROBLEMS)
            return done, first


@pytest.mark.parametrize("where", ["one", "split"])
def test_a_run_stopped_after_every_chunk_is_the_undisturbed_run(where, request, tmp_path):
    solver_ = request.getfixturevalue(where)
    done, first = stop_and_go(solver_, tmp_path / "s.npz")
    whole = solve(solver_, PROBLEMS)
    assert [done[p.id].record for p in PROBLEMS] == [solved.record for solved in whole]
    assert [done[p.id].events for p in PROBLEMS] == [solved.events for solved in whole]
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]

    # An old file: the record of one of its rows was written since.
    (tmp_path / "s.npz").write_bytes(first)
    saved = pause.find_saved(tmp_path / "s.npz", SETTINGS, PROBLEMS)
    assert {name for _, name, _ in saved.rows} == {"p0", "p1"}
    encoded = [solver.encode(solver_, problem) for problem in PROBLEMS[1:3]]
    resume = pause.load_running(saved, solver.prepare(solver_, saved.width), encoded)
    rest = {s.record["id"]: s for s in stream(solver_, PROBLEMS[1:3], resume=resume)}
    assert set(rest) == {"p1", "p2"}
    for name, solved in rest.items():
        assert solved.events == done[name].events


@pytest.mark.parametrize(
    ("settings", "problems", "message"),
    [
        ({"seed": 1}, PROBLEMS, r"with seed=0 \(now 1\); go on as before, name another --out, or"),
        ({"mesh": "data=2"}, PROBLEMS, r"with mesh=None \(now 'data=2'\);"),
        ({"new": 3}, PROBLEMS, r"with new=None \(now 3\);"),
        ({}, PROBLEMS[1:], r"with problem 'p0' \(now gone\);"),
        ({}, [Problem("Why?", id="p0"), *PROBLEMS[1:]], "with another question of problem 'p0';"),
        (
            {"seed": 1, "mesh": "data=2"},
            PROBLEMS[:4],
            r"with seed=0 \(now 1\), mesh=None .*, problem 'p4' \(now gone\);",
        ),
    ],
)
def test_a_saved_search_of_another_run_is_refused(tmp_path, settings, problems, message):
    path = tmp_path / "s.npz"
    running = solver.Running({"a": np.zeros(2)}, (solver.Slot(0, 1.5), None), ())
    pause.save_running(path, running, [solver.Encoded(PROBLEMS[0], (1,))], 8, SETTINGS, PROBLEMS)
    found = pause.find_saved(path, SETTINGS, [*PROBLEMS, Problem("New?", id="new")])
    assert found == pause.Saved(path, 8, ((0, "p0", 1.5),))
    with pytest.raises(ValueError, match=message):
        pause.find_saved(path, SETTINGS | settings, problems)


def test_what_is_no_saved_search_is_named(tmp_path):
    path = tmp_path / "s.npz"
    save_snapshot(path, {"a": np.zeros(2)})
    with pytest.raises(ValueError, match=r"s\.npz holds no search of this program"):
        pause.find_saved(path, SETTINGS, PROBLEMS)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"s\.npz is no snapshot"):
        pause.find_saved(path, SETTINGS, PROBLEMS)


def test_a_batch_that_the_shards_do_not_divide_is_refused(one):
    with pytest.raises(ValueError, match=r"batch_size=2 cannot be split over .*multiples of 8"):
        solver.spread_solver(one, make_mesh())
