"""The programs, run in this process, with one folder of compiled programs for all tests."""

import functools

import pytest
from running import run_program
from solving import NUM_PROBLEMS, PROBLEMS, SMOKE, write_problems

from rlm_jax.evaluation import build


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Folder of compiled programs: the same search is compiled once, however often it is run."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="session")
def solve(cache):
    """solve(*flags) runs experiments/solve.py."""
    return functools.partial(run_program, "solve.py", cache=cache)


@pytest.fixture(scope="session")
def score(cache):
    """score(*flags) runs experiments/score.py."""
    return functools.partial(run_program, "score.py", cache=cache)


@pytest.fixture
def no_model(monkeypatch):
    """Makes it a failure of the test to load a model."""

    def load(*args):
        raise AssertionError(f"a model was loaded: {args}")

    monkeypatch.setattr(build, "load_policy", load)


@pytest.fixture(scope="session")
def undisturbed(solve, tmp_path_factory):
    """Six problems without answers, searched in one go: the folder of their records."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = solve(*SMOKE, write_problems(folder / "p.jsonl", PROBLEMS), f"--out={folder}")
    assert done.status == 0, done.err
    assert f"gumbel: {NUM_PROBLEMS} records, " in done.out
    assert f"records: {folder}/records.jsonl\n" in done.out
    assert "correct" not in done.out
    return folder
