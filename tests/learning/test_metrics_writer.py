"""Curves are read back as they were written: every point once, also after a restart."""

import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.learning.metrics_writer import (
    open_jsonl,
    open_metrics,
    open_tensorboard,
    read_metrics,
)


def read_events(folder):
    """All events of a folder's files in the order of writing, by tensorboardX's own messages."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.glob("events.*"), key=lambda path: int(path.name.split(".")[-1])):
        data, place = path.read_bytes(), 0
        while place < len(data):
            # TFRecord: length, its checksum, the message, its checksum.
            (size,) = struct.unpack("<Q", data[place : place + 8])
            events.append(Event.FromString(data[place + 12 : place + 12 + size]))
            place += size + 16
    return events


def read_curves(folder):
    """Name -> [(step, value)] as TensorBoard shows them: a session takes later points back."""
    curves, texts = {}, {}
    for event in read_events(folder):
        if event.HasField("session_log"):
            for points in (*curves.values(), *texts.values()):
                points[:] = [point for point in points if point[0] < event.step]
        for value in event.summary.value:
            if value.HasField("tensor"):
                text = value.tensor.string_val[0].decode()
                texts.setdefault(value.tag, []).append((event.step, text))
            else:
                curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves, texts


def test_both_files_hold_every_point(tmp_path):
    with open_metrics(tmp_path / "run") as write:
        write(1, {"loss": jnp.float32(0.5), "train/tokens": np.int64(2**40), "solved": True})
        write(2, {"loss": np.float64(0.25), "é": jnp.bfloat16(3)}, {"tree": "a\n└─ b"})
        write(3, {"loss": math.nan, "é": -math.inf})
    points = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [point.pop("seconds") >= 0 for point in points] == [True] * 3
    assert points == [
        {"step": 1, "loss": 0.5, "train/tokens": 2**40, "solved": 1},
        {"step": 2, "loss": 0.25, "é": 3.0},
        {"step": 3, "loss": None, "é": None},
    ]
    curves, texts = read_curves(tmp_path / "run")
    assert curves["loss"] == [(1, 0.5), (2, 0.25)]
    assert curves["train/tokens"] == [(1, 2.0**40)]
    assert texts == {"tree/text_summary": [(2, "    a\n    └─ b")]}


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with open_jsonl(tmp_path / "m.jsonl") as write:
        write(1, {"a": 1})
        assert [point["a"] for point in read_metrics(tmp_path / "m.jsonl")] == [1]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=6))
def test_restarted_runs_have_each_point_once(tmp_path_factory, parts):
    """Each process goes back some steps before it goes on; the curve is that of the last ones."""
    folder, expected = tmp_path_factory.mktemp("run"), {}
    for process, (steps_back, num_steps) in enumerate(parts):
        last = max(expected, default=0)
        restored = last - steps_back if expected else None
        restored = restored if restored is not None and restored > 0 else None
        first = 1 if restored is None else restored + 1
        expected = {step: value for step, value in expected.items() if step < first}
        with open_metrics(folder, restored_step=restored) as write:
            for step in range(first, first + num_steps):
                expected[step] = process
                write(step, {"process": process})
    points = read_metrics(folder / "metrics.jsonl")
    assert {point["step"]: point["process"] for point in points} == expected
    assert [point["step"] for point in points] == sorted(expected)
    seconds = [point["seconds"] for point in points]
    assert seconds == sorted(seconds)
    assert read_curves(folder)[0]["process"] == sorted(expected.items())


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "seconds": 7.5, "loss": 1.0}\n'
    path.write_text(whole + '{"step": 2, "seco')
    assert [point["step"] for point in read_metrics(path)] == [1]
    with open_jsonl(path, restored_step=5) as write:
        write(6, {"loss": 0.5})
    first, second = path.read_text().splitlines()
    assert first + "\n" == whole
    assert json.loads(second)["step"] == 6
    assert json.loads(second)["seconds"] >= 7.5
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "text", ["notes\n", "notes", '{"step": 1}\n', '{"step": 1, "seconds": 1}\n[]\n']
)
def test_another_file_is_left_alone(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with (
        pytest.raises(ValueError, match=r"metrics\.jsonl:[12]: not a line"),
        open_metrics(tmp_path),
    ):
        pass
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({"step": 1}, "no metric can be called 'step'"),
        ({"seconds": 1}, "no metric can be called 'seconds'"),
        ({"loss": jnp.zeros(2)}, "metric loss is .*: accepted is one number"),
        ({"loss": "0.5"}, "metric loss is '0.5'"),
        ({"loss": None}, "metric loss is None"),
    ],
)
def test_what_is_no_number_is_refused(tmp_path, scalars, message):
    for opened in (open_jsonl(tmp_path / "m.jsonl"), open_tensorboard(tmp_path / "events")):
        with opened as write, pytest.raises(ValueError, match=message):
            write(1, scalars)
    assert read_metrics(tmp_path / "m.jsonl") == []


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "none.jsonl")
