"""A run's curves, as lines of JSON and for TensorBoard (without TensorFlow).

The one idea: a writer is a function of a step and its numbers. A run that goes on from a checkpoint
names the step it restored, and what an earlier process wrote of later steps is taken back: no point
of a curve is there twice, and none is there of a step that was lost.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from rlm_jax.core.files import write_whole

METRICS_FILE = "metrics.jsonl"
RESERVED = ("step", "seconds")
_FLUSH_SECONDS = 10

Scalar = Any  # A Python, numpy or jax number.


class WriteMetrics(Protocol):
    """Writes one point of each curve; `texts` are plain text by name, such as drawn trees."""

    def __call__(
        self, step: int, scalars: Mapping[str, Scalar], texts: Mapping[str, str] | None = None
    ) -> None: ...


@contextlib.contextmanager
def open_metrics(
    folder: str | os.PathLike[str], *, restored_step: int | None = None, tensorboard: bool = True
) -> Iterator[WriteMetrics]:
    """Writes to metrics.jsonl in `folder`, and to TensorBoard's files beside it.

    Args:
      restored_step: the step a run goes on from; None starts anew.
      tensorboard: off to do without tensorboardX.

    Raises:
      ValueError: metrics.jsonl is another kind of file, or tensorboardX is not installed.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        writers: list[WriteMetrics] = []
        if tensorboard:
            writers.append(stack.enter_context(open_tensorboard(folder, restored_step)))
        writers.append(stack.enter_context(open_jsonl(folder / METRICS_FILE, restored_step)))

        def write(
            step: int, scalars: Mapping[str, Scalar], texts: Mapping[str, str] | None = None
        ) -> None:
            for writer in writers:
                writer(step, scalars, texts)

        yield write


@contextlib.contextmanager
def open_jsonl(
    path: str | os.PathLike[str], restored_step: int | None = None
) -> Iterator[WriteMetrics]:
    """Writes a line {"step": 30, "seconds": 1.5, name: number, ...} a call, at once.

    What is NaN or infinite is null. Seconds are those the run has been going, pauses apart. Texts
    have no place here.

    Raises:
      ValueError: a file of that name holds something else; it is left as it is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = _take_back(path, -1 if restored_step is None else restored_step)
    start = time.monotonic() - earlier
    with path.open("a", encoding="utf-8") as file:

        def write(
            step: int, scalars: Mapping[str, Scalar], texts: Mapping[str, str] | None = None
        ) -> None:
            seconds = round(time.monotonic() - start, 3)
            _write_line(file, {"step": int(step), "seconds": seconds, **_check_names(scalars)})

        yield write


@contextlib.contextmanager
def open_tensorboard(
    folder: str | os.PathLike[str], restored_step: int | None = None
) -> Iterator[WriteMetrics]:
    """Writes event files, a new one a process; TensorBoard hides points of steps taken back.

    What is NaN or infinite is left out. A kill loses the last seconds of a curve.

    Raises:
      ValueError: tensorboardX is not installed.
    """
    try:
        import tensorboardX
    except ImportError as error:
        raise ValueError(
            "TensorBoard files need tensorboardX: pip install 'rlm_jax[train]'"
        ) from error
    writer = tensorboardX.SummaryWriter(
        str(folder),
        purge_step=0 if restored_step is None else restored_step + 1,
        flush_secs=_FLUSH_SECONDS,
        # The name has seconds alone, and a file of the same name would be replaced.
        filename_suffix=f".{os.getpid()}.{time.time_ns()}",
    )

    def write(
        step: int, scalars: Mapping[str, Scalar], texts: Mapping[str, str] | None = None
    ) -> None:
        for name, value in _check_names(scalars).items():
            if value is not None:
                writer.add_scalar(name, value, int(step))
        for name, text in (texts or {}).items():
            # Markdown shows what is indented as it is.
            indented = "\n".join("    " + line for line in text.splitlines())
            writer.add_text(name, indented, int(step))

    try:
        yield write
    finally:
        writer.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file in order, without one that was cut off while it was written.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a metrics file; names the line.
    """
    path = Path(path)
    text = path.read_bytes()
    lines = text.split(b"\n")[:-1]  # Behind the last newline there is nothing, or half a line.
    points = []
    for number, line in enumerate(lines, start=1):
        try:
            point = json.loads(line)
            known = isinstance(point["step"], int) and isinstance(point["seconds"], int | float)
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            raise ValueError(f"{path}:{number}: not a line of metrics")
        points.append(point)
    if not points and text.strip():
        raise ValueError(f"{path}:1: not a line of metrics")
    return points


def _take_back(path: Path, last_step: int) -> float:
    """Leaves the points up to a step, whole or not at all; returns the seconds they took."""
    if not path.exists():
        return 0.0
    kept = [point for point in read_metrics(path) if point["step"] <= last_step]
    with write_whole(path) as beside, beside.open("w", encoding="utf-8") as file:
        for point in kept:
            _write_line(file, point)
    return float(kept[-1]["seconds"]) if kept else 0.0


def _write_line(file: TextIO, point: Mapping[str, Any]) -> None:
    file.write(json.dumps(point, ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()


def _check_names(scalars: Mapping[str, Scalar]) -> dict[str, int | float | None]:
    """Plain numbers by name; None for what is not finite."""
    taken = [name for name in scalars if name in RESERVED]
    if taken:
        raise ValueError(f"no metric can be called {taken[0]!r}: every line has that of its own")
    return {name: _as_number(name, value) for name, value in scalars.items()}


def _as_number(name: str, value: Scalar) -> int | float | None:
    array = np.asarray(value)
    if array.shape or not (array.dtype.kind in "biuf" or array.dtype.name == "bfloat16"):
        raise ValueError(f"metric {name} is {value!r}: accepted is one number")
    if array.dtype.kind in "biu":
        return int(array)
    number = float(array)
    return number if math.isfinite(number) else None
