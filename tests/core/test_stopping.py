"""Signals as a flag: the first is noted, the second does what it did before."""

import os
import signal
import subprocess
import sys

import pytest

from rlm_jax.core.stopping import catch_stop

LOOP = """
from rlm_jax.core.stopping import catch_stop
import time
with catch_stop() as is_stopped:
    print("ready", flush=True)
    while not is_stopped():
        time.sleep(0.01)
    print("saved", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_flag_and_the_next_is_itself_again(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append(number))
    try:
        with catch_stop() as is_stopped:
            assert not is_stopped()
            os.kill(os.getpid(), number)
            assert is_stopped()
            assert heard == []
            os.kill(os.getpid(), number)
            assert heard == [number]
        os.kill(os.getpid(), number)
        assert heard == [number] * 2
    finally:
        signal.signal(number, before)


def test_handlers_are_put_back_without_a_signal():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyError), catch_stop() as is_stopped:
        raise KeyError
    assert not is_stopped()
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_a_second_sigterm_ends_a_program_that_would_not_stop(root):
    child = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, cwd=root)
    try:
        for line in (b"ready\n", b"saved\n"):
            assert child.stdout.readline() == line
            child.terminate()
        assert child.wait(30) == -signal.SIGTERM
    finally:
        child.kill()
        child.communicate()
