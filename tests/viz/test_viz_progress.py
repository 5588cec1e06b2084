"""A running search on the terminal and in a log: true numbers, one line where it must be one."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live

from rlm_jax.core.budget import zero_budget
from rlm_jax.reasoning.drive import run_host
from rlm_jax.reasoning.protocol import Outcome
from rlm_jax.reasoning.strategies.greedy import make_greedy
from rlm_jax.reasoning.structure import UNLIMITED, make_structure
from rlm_jax.viz.progress import (
    Progress,
    format_progress,
    measure_progress,
    render_progress,
    seconds_left,
)


def make_progress(num_structures=3, **kw):
    index = np.arange(num_structures)
    fields = {
        "names": [f"gsm8k-{n}" for n in index],
        "rounds": index + 4,
        "num_nodes": 10 * (index + 1),
        "generated_tokens": 128 * (index + 1),
        "token_limit": np.full(num_structures, 512),
        "best_value": np.where(index == 0, np.nan, 0.3 + index / 10),
        "num_solutions": index,
        "running": index != 1,
        "capacity": 129,
        "problems_done": 7,
        "num_problems": 20,
        "total_tokens": 12345,
        "seconds": 10.0,
    }
    return Progress(**(fields | kw))


def draw(progress, width=80, terminal=True, **kw):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    console.print(render_progress(progress, **kw), soft_wrap=not terminal)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_one_row_per_structure_on_a_terminal():
    assert draw(make_progress()) == [
        "problem    round   nodes                tokens  best  solutions",
        "  gsm8k-0      4  10/129  ━━━╌╌╌╌╌╌╌╌╌ 128/512     -          0",
        "✔ gsm8k-1      5  20/129  ━━━━━━╌╌╌╌╌╌ 256/512  0.40          1",
        "  gsm8k-2      6  30/129  ━━━━━━━━━╌╌╌ 384/512  0.50          2",
        "7/20 problems (2 running)   12,345 tokens   1,234 tokens/s   0:15 left",
    ]


def test_many_structures_are_summed_up():
    lines = draw(make_progress(5), max_rows=4)
    assert [line.split() for line in lines[:-1]] == [
        ["5", "problems", "round", "nodes", "tokens", "best", "solutions"],
        ["least", "4", "10/129", "━━━╌╌╌╌╌╌╌╌╌", "128/512", "0.40", "0"],
        ["median", "6", "30/129", "━━━━━━━━━╌╌╌", "384/512", "0.55", "2"],
        ["most", "8", "50/129", "━━━━━━━━━━━━", "640/512", "0.70", "4"],
    ]


def test_a_log_gets_one_plain_line():
    (line,) = draw(make_progress(), terminal=False)
    assert line == format_progress(make_progress())
    assert line == (
        "7/20 problems (2 running), 12,345 tokens, 1,234 tokens/s, 0:15 left, round 5, "
        "20/129 nodes, 256/512 tokens, best 0.50, 3 solutions"
    )


def test_what_is_unknown_is_left_open():
    nothing = np.zeros(2, int)
    start = make_progress(
        2,
        rounds=nothing,
        num_nodes=nothing,
        generated_tokens=nothing,
        token_limit=np.full(2, UNLIMITED),
        best_value=np.full(2, np.nan),
        num_solutions=nothing,
        running=np.array([True, True]),
        problems_done=0,
        total_tokens=0,
        seconds=0.0,
    )
    assert seconds_left(start) is None
    assert format_progress(start) == (
        "0/20 problems (2 running), 0 tokens, - left, round 0, 0/129 nodes, 0 tokens, "
        "best -, 0 solutions"
    )
    assert draw(start)[1].split() == ["gsm8k-0", "0", "0/129", "0", "-", "0"]
    assert draw(make_progress(0))[-1].startswith("7/20 problems   ")
    done = make_progress(running=np.zeros(3, bool), problems_done=20)
    assert seconds_left(done) == 0
    assert "round" not in format_progress(done)


def test_time_left_counts_what_running_searches_have_used():
    # 7 problems, a quarter and three quarters of two others in 10 s; 12 are left.
    assert seconds_left(make_progress()) == pytest.approx(15.0)
    unlimited = make_progress(token_limit=np.full(3, UNLIMITED), num_nodes=np.array([43, 9, 86]))
    assert seconds_left(unlimited) == pytest.approx(10 * (20 - 8) / 8)
    (line,) = draw(make_progress(num_problems=100_000), terminal=False)
    assert "34:43:10 left" in line


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"differ in length.*'rounds': 2"):
        make_progress(rounds=np.zeros(2, int))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(max_size=60), max_size=40),
    st.integers(1, 30),
    st.integers(60, 150),
)
def test_any_name_and_batch_fit_the_terminal(names, max_rows, width):
    progress = make_progress(len(names), names=names)
    lines = draw(progress, width, max_rows=max_rows)
    num_rows = len(names) if len(names) <= max_rows else 3
    assert 2 + num_rows <= len(lines) <= 3 + num_rows
    assert all(cell_len(line) <= width and line.isprintable() for line in lines)


def test_names_cannot_drive_the_terminal():
    evil = "[bold]b[/bold]\x1b[31m:smile:\n\u202e"
    printed = "\n".join(draw(make_progress(1, names=[evil])))
    assert "[bold]b[/bold]\ufffd" in printed
    assert not set(printed) & set("\x1b\u202e")


def fill_structure():
    """Two structures: steps of value 0.9 and 0.2, the latter a solution; and a fresh one."""
    structure = make_structure(jnp.array([3, 3]), 5, token_limit=jnp.array([16, 16]))
    value = structure.value.at[0, 1:3].set(jnp.array([0.9, 0.2])).at[0, 3].set(0.99)
    return dataclasses.replace(
        structure,
        value=value.at[:, 0].set(7.0),
        alive=structure.alive.at[0, 1:3].set(True),
        terminal=structure.terminal.at[0, 2:4].set(True),
        num_nodes=jnp.array([4, 1]),
        budget=dataclasses.replace(structure.budget, generated_tokens=jnp.array([16, 0])),
    )


def test_a_structure_is_measured():
    structure = fill_structure()
    progress = measure_progress(structure, ["a", "b"], rounds=2, earlier_tokens=100, seconds=4.0)
    assert progress.best_value[0] == np.float32(0.2)
    assert np.isnan(progress.best_value[1])
    assert progress.num_solutions.tolist() == [1, 0]
    assert progress.running.tolist() == [False, True]
    assert progress.rounds.tolist() == [2, 2]
    assert (progress.total_tokens, progress.num_problems, progress.capacity) == (116, 2, 5)
    open_ended = dataclasses.replace(structure, terminal=structure.terminal & False)
    progress = measure_progress(open_ended, ["a"], rounds=np.array([2]))
    assert progress.best_value.tolist() == [np.float32(0.9)]


def expand(params, keys, world, structure, request):
    """Steps of two tokens, each a little better than the one before; they never end."""
    shape = (*request.nodes.shape, request.num_children)
    valid = jnp.broadcast_to(request.active[..., None], shape)
    length = jnp.where(valid, 2, 0)
    zeros = jnp.zeros(shape, jnp.float32)
    cost = zero_budget(structure.num_nodes)
    outcome = Outcome(
        valid=valid,
        duplicate=valid & False,
        length=length,
        logprob=zeros,
        value=zeros + structure.num_nodes[:, None, None] / 10,
        reward=zeros,
        terminal=valid & False,
        answer_key=zeros.astype(jnp.uint32),
        state_key=zeros.astype(jnp.uint32),
        proven=valid & False,
        node_value=zeros[..., 0],
        cost=dataclasses.replace(cost, generated_tokens=length.sum((1, 2))),
    )
    return outcome, world


def test_a_search_is_watched_round_by_round():
    """The host driver's callback feeds a live display and a log."""
    keys = jax.random.split(jax.random.key(0), 2)
    structure = make_structure(jnp.array([3, 3]), 9, token_limit=16)
    log, terminal = io.StringIO(), io.StringIO()
    plain = Console(file=log, width=80)
    console = Console(file=terminal, width=80, force_terminal=True)
    with Live(console=console, auto_refresh=False) as live:

        def on_round(num_rounds, structure):
            progress = measure_progress(structure, ["a", "b"], rounds=num_rounds, seconds=1.0)
            live.update(render_progress(progress), refresh=True)
            plain.print(render_progress(progress), soft_wrap=True)

        run_host(make_greedy(3), expand, None, keys, None, structure, on_round)
    tails = [line.split(", round ")[1] for line in log.getvalue().splitlines()]
    assert tails == [
        "1, 2/9 nodes, 2/16 tokens, best 0.10, 0 solutions",
        "2, 3/9 nodes, 4/16 tokens, best 0.20, 0 solutions",
        "3, 4/9 nodes, 6/16 tokens, best 0.30, 0 solutions",
    ]
    assert terminal.getvalue().count("solutions") == 4
