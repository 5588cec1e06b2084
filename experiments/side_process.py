"""Both ends of a process that obeys: the other side of a benchmark, under a Python of its own.

One JSON object a line goes in, `{"do": NAME, ...arguments}`, and one answer a line comes back; the
process ends with its stdin. A process of its own keeps either side's threads, memory and packages
out of the other's way, and between commands it sleeps in a read. Only the standard library is
imported, so that both ends can be this file.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any


class SideProcess:
    """The parent's end."""

    def __init__(self, python: str, script: str):
        """Starts `script`, a file name of this folder, under the interpreter `python`.

        Raises:
          FileNotFoundError: there is no such interpreter.
        """
        path = pathlib.Path(__file__).with_name(script)
        self._process = subprocess.Popen(
            [python, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends one command; raises RuntimeError with the other side's own words."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or '{"error": "it has died"}')
        except BrokenPipeError:
            answer = {"error": "it has died"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def __enter__(self) -> "SideProcess":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:
            self._process.kill()  # It may be at work for minutes still.
        self.close()


def serve(commands: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """The obeying end: answers until stdin ends; a mistake is answered, not raised."""
    # Libraries that print must not break the protocol.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        try:
            command = json.loads(line)
            do = command.pop("do")
            if do not in commands:
                raise ValueError(f"do={do!r}: accepted are {', '.join(commands)}")
            answer = commands[do](**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
