"""The programs, run in this process, with one folder of compiled programs for all tests."""

import functools

import pytest
from running import run_program

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
