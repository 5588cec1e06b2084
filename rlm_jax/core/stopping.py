"""Being told to stop: a signal becomes a flag that a loop looks at between two steps.

So a preempted or interrupted run ends at the end of a step, with its state saved. Whoever sends a
second signal does not want to wait: it does what it did before the block.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def catch_stop() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM or SIGINT (Ctrl-C) has come in the block.

    The main thread alone can use it.
    """
    came = False
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def hand_back() -> None:
        for number, handler in before.items():
            # None is a handler that was not set from Python, and cannot be.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        hand_back()

    for number in STOP_SIGNALS:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        hand_back()
