"""A training run on the terminal and in a log: true rates, few lines, plain text in a file."""

import io
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from test_viz_text import make_random_record, make_tree

from rlm_jax.viz.training import (
    Pace,
    TrainingProgress,
    draw_trees,
    format_training,
    render_training,
    seconds_left,
    watch_training,
)


def make_progress(**kw):
    fields = {
        "step": 1200,
        "num_steps": 5000,
        "steps_per_second": 2.5,
        "tokens_per_second": 12345.6,
        "metrics": {"loss": 0.512345, "accuracy": 0.75, "tokens": 123456.0},
    }
    return TrainingProgress(**(fields | kw))


def test_a_log_gets_one_plain_line():
    assert format_training(make_progress()) == (
        "step 1,200/5,000 (24%), 2.5 steps/s, 12,346 tokens/s, 0:25:20 left, "
        "loss 0.5123, accuracy 0.75, tokens 123,456"
    )


def test_what_is_unknown_is_left_open():
    start = make_progress(
        step=0,
        steps_per_second=None,
        tokens_per_second=None,
        metrics={"a": None, "b": float("nan"), "c": float("-inf")},
    )
    assert seconds_left(start) is None
    assert format_training(start) == "step 0/5,000 (0%), - left, a -, b nan, c -inf"
    # A run that stands still has no end in sight, and almost done is not done.
    assert seconds_left(make_progress(steps_per_second=0.0)) is None
    assert "(99%)" in format_training(make_progress(step=4999))
    done = make_progress(step=5000, steps_per_second=None)
    assert seconds_left(done) == 0
    assert "(100%)" in format_training(done)
    assert "0:00:00 left" in format_training(done)
    assert "2 days, 2:00:00 left" in format_training(make_progress(step=0, steps_per_second=1 / 36))


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 9), st.integers(0, 99)), min_size=2))
def test_pace_is_that_of_the_last_minutes(parts):
    """Held against sums over a list of all marks."""
    window, pace = 60.0, Pace(60.0)
    times = list(itertools.accumulate(part[0] for part in parts))
    steps = list(itertools.accumulate(part[1] for part in parts))
    tokens = list(itertools.accumulate(part[2] for part in parts))
    for mark in zip(times, steps, tokens, strict=True):
        pace.note(*mark)
    early = [i for i in range(len(times) - 1) if times[i] <= times[-1] - window]
    first = early[-1] if early else 0
    duration = times[-1] - times[first]
    expected = [(column[-1] - column[first]) / duration for column in (steps, tokens)]
    assert pace.rates() == pytest.approx(expected)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def watch(num_steps, step_seconds, *, first=0, compile_seconds=0.0, stop=None, **options):
    """The text that a run of equal steps leaves on a console."""
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, width=options.pop("width", 100), **options)
    with watch_training(num_steps, console=console, clock=clock) as display:
        clock.now += compile_seconds
        for step in range(first + 1, (stop or num_steps) + 1):
            clock.now += step_seconds
            display.update(step, num_tokens=50, metrics={"loss": 1 / step})
    return file.getvalue()


def test_a_file_gets_two_lines_a_minute():
    text = watch(1000, 0.5, compile_seconds=100.0)
    lines = text.splitlines()
    # 500 seconds: the first step, then one line each half minute, then the last step.
    assert len(lines) == 1 + 16 + 1
    assert lines[0] == "step 1/1,000 (0%), - left, loss 1"
    assert lines[1] == "step 61/1,000 (6%), 2 steps/s, 100 tokens/s, 0:07:50 left, loss 0.01639"
    assert lines[-1] == "step 1,000/1,000 (100%), 2 steps/s, 100 tokens/s, 0:00:00 left, loss 0.001"
    assert all(char.isprintable() for char in text.replace("\n", ""))


def test_a_resumed_run_counts_its_own_steps_for_the_pace():
    lines = watch(100, 10.0, first=90).splitlines()
    assert lines[0] == "step 91/100 (91%), - left, loss 0.01099"
    assert lines[1].startswith("step 94/100 (94%), 0.1 steps/s, 5 tokens/s, 0:01:00 left")


def test_a_stopped_run_says_where():
    lines = watch(100, 1.0, stop=40).splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "step 1/100 (1%)",
        "step 31/100 (31%)",
        "step 40/100 (40%)",
    ]
    assert watch(100, 1.0, first=100) == ""


def test_a_long_line_stays_one_line():
    file, clock = io.StringIO(), Clock()
    with watch_training(9, console=Console(file=file, width=20), clock=clock) as display:
        display.update(1, metrics={f"a long name {n}": n for n in range(9)})
        display.print("[bold]first\x1b tree " * 3)
    first, second = file.getvalue().splitlines()
    assert first.endswith("a long name 8 8")
    assert second.startswith("[bold]first")


def test_a_terminal_gets_a_bar():
    text = watch(100, 0.25, force_terminal=True, color_system=None)
    assert "\x1b[" in text
    assert "step 100/100" in text
    assert "━" in text
    # Not redrawn oftener than the eye follows.
    assert watch(100, 0.02, force_terminal=True, color_system=None).count("step ") < 20


def draw(renderable, width):
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system=None).print(renderable)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_the_bar_shows_all_there_is():
    bar, metrics = draw(render_training(make_progress()), 100)
    assert bar.startswith("step 1,200/5,000  ━━━━━╸ ")
    assert bar.endswith("24%   2.5 steps/s   12,346 tokens/s   0:25:20 left")
    assert metrics == "loss 0.5123   accuracy 0.75   tokens 123,456"
    (bar,) = draw(render_training(make_progress(metrics={})), 100)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=60), st.floats(), max_size=9), st.integers(40, 150))
def test_any_metrics_fit_and_cannot_drive_a_terminal(metrics, width):
    progress = make_progress(metrics=metrics)
    lines = draw(render_training(progress), width)
    assert all(cell_len(line) <= width and line.isprintable() for line in lines)
    assert format_training(progress).isprintable()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps must be >= 1, not 0"),
        ({"num_steps": 1, "seconds_between_lines": 1.0}, "must be >= 10, not 1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message), watch_training(**arguments):
        pass


def test_trees_are_plain_text():
    records = [
        make_tree(id="countdown-1"),
        make_tree(id="countdown-2", answer=None, correct=None),
        make_tree(id="countdown-3"),
    ]
    lines = draw_trees(iter(records), max_trees=2).splitlines()
    assert lines[0] == "countdown-1: 26 ✔ (puct, 1,200 tokens)"
    assert lines[1].startswith("▶ How many?")
    assert lines[2].split()[:4] == ["▶", "├─", "3", "*"]
    (second,) = (n for n, line in enumerate(lines) if line.startswith("countdown-2"))
    assert lines[second] == "countdown-2: - (puct, 1,200 tokens)"
    assert lines[second - 1] == ""
    assert not any("countdown-3" in line for line in lines)
    assert draw_trees([]) == ""


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 200),
    st.sampled_from(["any", "late", "wide", "chain"]),
    st.integers(4, 20),
    st.integers(20, 120),
)
def test_any_trees_fit_a_log(seed, num_nodes, kind, max_lines, width):
    record = make_random_record(seed, num_nodes, kind)
    lines = draw_trees([record, record], max_lines=max_lines, width=width).splitlines()
    assert len(lines) <= 2 * (max_lines + 1) + 1
    assert all(cell_len(line) <= width and line.isprintable() for line in lines)
