"""The process that makes data ahead: signals to the whole group, and a parent that is killed."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import signal, sys
from rlm_jax.data.generated import make_ahead
from rlm_jax.core.stopping import catch_stop

if __name__ == "__main__":
    with catch_stop() as is_stopped, make_ahead(abs, -9, num_ahead=2) as numbers:
        print(next(numbers), flush=True)
        sys.stdin.readline()
        # What was made before the signal is used up; these are made behind it.
        print([next(numbers) for _ in range(5)], is_stopped(), flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def group(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    root = str(pathlib.Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        start_new_session=True,
    ) as child:
        assert child.stdout.readline() == "9\n"
        yield child
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_is_the_parents_to_answer(group, number):
    os.killpg(group.pid, number)
    out, error = group.communicate("\n\n", timeout=60)
    assert out == "[8, 7, 6, 5, 4] True\n"
    assert (error, group.returncode) == ("", 0)


def test_it_ends_with_a_parent_that_is_killed(group):
    os.kill(group.pid, signal.SIGKILL)
    # Output ends where no process is left that holds it.
    out, _ = group.communicate(timeout=60)
    assert out == ""
