"""Trees as text: legible at any width, without colour, and deaf to what model text says."""

import io
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from rlm_jax.data.records import BUDGET_FIELDS, NodeColumns, make_record
from rlm_jax.viz.text import TIMES, clean_text, render_summary, render_tree

PARENTS = [-1, 0, 1, 2, 3, 2, 5, 0, 0]
TEXTS = ["", "3 * 4 = 12", "12 + 1 = 13\n", "13 * 2 = 26", "#### 26", "13 * 3 = 39", "#### 39",
         "3 + 4 = 7", "3 * 4 = 11"]  # fmt: skip


def make_tree(
    parents=PARENTS, texts=TEXTS, terminal=(4, 6), dead=(8,), chosen=(0, 1, 2, 3, 4), **kw
):
    num_nodes = len(parents)
    depth = [0] * num_nodes
    for node in range(1, num_nodes):
        depth[node] = depth[parents[node]] + 1
    index = np.arange(num_nodes)
    nodes = NodeColumns(
        parents=np.array(parents)[:, None],
        op=["root"] + ["generate"] * (num_nodes - 1),
        owner=index * 0 - 1,
        depth=depth,
        text=texts,
        tokens=[[1]] * num_nodes,
        logprob=-index / 7,
        visits=num_nodes - index,
        value={"model": index / 100, "search": index / 50},
        prior=1 / (1.0 + index),
        reward=index * 0.0,
        terminal=np.isin(index, terminal),
        alive=~np.isin(index, dead),
        budget=index,
    )
    fields = {
        "id": "p", "question": "How many?", "answer": "26", "correct": True, "strategy": "puct",
        "config": {}, "seed": 0, "policy_version": "m", "value_version": None,
        "budget": dict.fromkeys(BUDGET_FIELDS, 1200), "seconds": 10.0,
    }  # fmt: skip
    return make_record(nodes=nodes._replace(**kw.pop("nodes", {})), chosen=chosen, **(fields | kw))


def make_random_record(seed, num_nodes, kind):
    """A graph with merged copies, dead steps, nodes of several parents and a random chosen path."""
    rng = random.Random(seed)
    lowest = {"any": lambda n: 0, "late": lambda n: n * 3 // 4, "chain": lambda n: max(n - 2, 0)}
    first = [-1]
    for node in range(1, num_nodes):
        low = lowest.get(kind, lambda n: 0)(node)
        first.append(rng.randrange(low, node) if kind != "wide" else rng.randrange(min(node, 3)))
    second = [-1] + [rng.choice([-1, rng.randrange(node)]) for node in range(1, num_nodes)]
    depth = [0] * num_nodes
    for node in range(1, num_nodes):
        depth[node] = depth[first[node]] + 1
    dead = [node for node in range(1, num_nodes) if rng.random() < 0.2]
    texts = [f"<{node}> 日本語 words" * rng.randint(1, 9) for node in range(num_nodes)]
    for node in dead[::2]:
        texts[node] = texts[rng.choice([n for n in range(num_nodes) if first[n] == first[node]])]
    chosen, node = [], rng.randrange(num_nodes)
    while node >= 0 and rng.random() > 1 / num_nodes**2:
        chosen.append(node)
        node = rng.choice([p for p in (first[node], second[node]) if p >= 0] or [-1])
    nodes = {
        "parents": np.array([first, second]).T,
        "depth": depth,
        "visits": [rng.randrange(5) for _ in first],
        "value": {"model": [rng.choice([None, rng.random()]) for _ in first]},
    }
    chosen = chosen[::-1] if node < 0 else []
    terminal = [node for node in range(num_nodes) if rng.random() < 0.2]
    return make_tree(first, texts, terminal, dead, chosen, nodes=nodes)


def check_counts(record, max_lines):
    """Drawn, merged and folded steps are all steps, and all of the chosen path is drawn."""
    lines = draw(render_tree(record, max_lines=max_lines), 4000)[:-1]
    drawn = [line for line in lines[1:] if re.search(r"<\d+>", line)]
    counts = [re.findall(r"(?:…|⋮) (\d+)(?: more)? step", line) for line in lines]
    copies = [re.findall(rf"  {TIMES}(\d+)  ", line + "  ") for line in lines]
    folded = sum(int(count) for found in counts for count in found)
    merged = sum(int(count) - 1 for found in copies for count in found)
    assert 1 + len(drawn) + merged + folded == len(record["nodes"])
    ends = [line for line in lines if line.startswith("▶")]
    gaps = [int(re.search(r"⋮ (\d+)", line)[1]) for line in ends if "⋮" in line]
    assert len(ends) - len(gaps) + sum(gaps) == len(record["chosen"])
    assert bool(gaps) == (len(record["chosen"]) > max_lines - 1)
    # Nothing stands above the chosen path but itself: it comes first everywhere.
    assert lines[: len(ends)] == ends


def draw(renderable, width=80, **options):
    file = io.StringIO()
    Console(file=file, width=width, **options).print(renderable)
    return file.getvalue().splitlines()


def test_branches_indent_and_chains_do_not():
    assert draw(render_tree(make_tree())) == [
        "▶ How many?          visits  model  search  prior",
        "▶ ├─ 3 * 4 = 12           8   0.01    0.02   0.50",
        "▶ │  12 + 1 = 13          7   0.02    0.04   0.33",
        "▶ │  ├─ 13 * 2 = 26       6   0.03    0.06   0.25",
        "▶ │  │  ✔ #### 26         5   0.04    0.08   0.20",
        "  │  └─ 13 * 3 = 39       4   0.05    0.10   0.17",
        "  │     ✔ #### 39         3   0.06    0.12   0.14",
        "  ├─ … 3 + 4 = 7          2   0.07    0.14   0.12",
        "  └─ ✂ 3 * 4 = 11         1   0.08    0.16   0.11",
        "▶ chosen path   ✔ finished   … unfinished   ✂ pruned",
    ]


def test_folds_the_worst_and_counts_them():
    def words(max_lines):
        lines = draw(render_tree(make_tree(), max_lines=max_lines), 120)
        assert len(lines) <= max_lines
        return [re.sub(r" +[0-9]+( +[0-9][.][0-9]{2}){3}$", "", line) for line in lines[1:-1]]

    best = ["▶ ├─ 3 * 4 = 12", "▶ │  12 + 1 = 13", "▶ │  ├─ 13 * 2 = 26", "▶ │  │  ✔ #### 26"]
    next_best = ["  │  └─ 13 * 3 = 39", "  │     ✔ #### 39"]
    full = [*best, *next_best, "  ├─ … 3 + 4 = 7", "  └─ ✂ 3 * 4 = 11"]
    assert words(40) == words(10) == full
    assert (
        words(9)
        == words(8)
        == [
            "▶ 3 * 4 = 12",
            "▶ 12 + 1 = 13",
            "▶ ├─ 13 * 2 = 26",
            "▶ │  ✔ #### 26",
            "  └─ 13 * 3 = 39",
            "     ✔ #### 39",
        ]
    )
    assert (
        words(7)
        == words(6)
        == [
            "▶ 3 * 4 = 12",
            "▶ 12 + 1 = 13  … 2 more steps, best 0.12, 1 solution",
            "▶ 13 * 2 = 26",
            "▶ ✔ #### 26",
        ]
    )
    assert words(5) == [
        "▶ 3 * 4 = 12",
        "▶ ⋮ 2 steps  … 2 more steps, best 0.12, 1 solution",
        "▶ ✔ #### 26",
    ]
    assert words(4) == ["▶ ⋮ 3 steps  … 2 more steps, best 0.12, 1 solution", "▶ ✔ #### 26"]
    lines = draw(render_tree(make_tree(), max_lines=8), 120)
    assert lines[0].startswith("▶ How many?  … 2 more steps, best 0.14, 1 pruned  ")


def test_a_branching_step_has_its_fold_on_a_line():
    num_leaves = 30
    parents = [-1, 0, 0, *[1] * num_leaves, 2, 2]
    texts = [f"<{node}>" for node in range(len(parents))]
    rising = {"visits": list(range(len(parents)))}
    record = make_tree(parents, texts, (3, 32), (), (0, 1, 3), nodes=rising)
    lines = draw(render_tree(record, max_lines=9))
    lines = [re.sub(r"  +[0-9]+( +[0-9][.][0-9]{2}){3}$", "", line) for line in lines]
    assert lines[1:-1] == [
        "▶ ├─ <1>",
        "▶ │  ├─ ✔ <3>",
        "  │  ├─ ✔ <32>",
        "  │  └─ … 28 more steps, best 0.62",
        "  └─ <2>",
        "     ├─ … <34>",
        "     └─ … <33>",
    ]


def test_narrow_lines_keep_the_count():
    record = make_tree([-1, *[0] * 40], [f"step {n}" for n in range(41)], range(41), (), (0, 1))
    facts = {120: " steps, best 0.80, 39 solutions", 80: " steps, best 0.80", 36: " steps", 20: ""}
    for width, fact in facts.items():
        first = draw(render_tree(record, max_lines=4), width)[0]
        more = "  … 39 more" if fact else "  … 39"
        assert re.search(re.escape(more + fact) + "($|  )", first)


# Drawn inside of a strategy, a random record would be hypothesis' own business.
RECORDS = st.tuples(
    st.integers(0, 2**32), st.integers(1, 250), st.sampled_from(["any", "late", "wide", "chain"])
)


@settings(max_examples=40, deadline=None)
@given(RECORDS, st.integers(4, 60), st.integers(8, 130))
def test_any_graph_fits_any_screen_and_no_node_is_lost(drawn, max_lines, width):
    record = make_random_record(*drawn)
    lines = draw(render_tree(record, max_lines=max_lines), width)
    assert len(lines) <= max_lines
    assert all(cell_len(line) <= width for line in lines)
    check_counts(record, max_lines)


@pytest.mark.parametrize("kind", ["any", "late", "wide", "chain"])
@pytest.mark.parametrize("num_nodes", [200, 500, 4096])
def test_large_graphs_fit_a_screen(kind, num_nodes):
    record = make_random_record(1, num_nodes, kind)
    check_counts(record, 40)
    assert len(draw(render_tree(record))) <= 40
    if kind != "wide":
        assert len(draw(render_tree(record))) >= 35


def test_a_chosen_path_deeper_than_the_screen_keeps_both_ends():
    parents = [*range(-1, 500), 0, 250]
    texts = [f"<{node}>" for node in range(len(parents))]
    record = make_tree(parents, texts, (500,), (), range(501))
    lines = draw(render_tree(record, max_lines=20))
    chosen = [line for line in lines if line.startswith("▶") and "⋮" not in line][1:-1]
    numbers = [int(line.split("<")[1].split(">")[0]) for line in chosen]
    assert numbers == [*range(1, 7), *range(494, 501)]
    (gap,) = (line for line in lines if "⋮" in line)
    assert "⋮ 487 steps  … 1 more step, best 10.04" in gap
    assert any("└─ … <501>" in line for line in lines)


def test_a_chosen_path_is_drawn_along_the_parents_it_used():
    parents = np.array([[-1, -1], [0, -1], [0, -1], [1, 2]])
    nodes = {"parents": parents, "depth": [0, 1, 1, 2]}
    record = make_tree([-1, 0, 0, 1], ["", "a", "b", "c"], (3,), (), (0, 2, 3), nodes=nodes)
    lines = [line.split("    ")[0] for line in draw(render_tree(record))]
    assert lines[1:-1] == ["▶ ├─ b", "▶ │  ✔ c", "  └─ … a"]


def test_merged_steps_are_counted_beside_their_twin():
    parents, texts = [-1, 0, 0, 0, 0, 1, 1, 1], ["", "a", "b", "a", "a", "c", "d", "c"]
    visits = {"visits": [5, 4, 2, 0, 0, 2, 1, 1]}
    record = make_tree(parents, texts, (5, 6, 7), (3, 4, 6, 7), (0, 1, 5), nodes=visits)
    lines = draw(render_tree(record, max_lines=5))
    assert [line.split("    ")[0] for line in lines[1:]] == [
        f"▶ ├─ a  {TIMES}3  … 1 more step, 1 pruned",
        f"▶ │  ✔ c  {TIMES}2",
        "  └─ … b",
        f"▶ chosen path   ✔ finished   … unfinished   {TIMES}n n equal steps, merged",
    ]
    (pruned,) = (line for line in draw(render_tree(record)) if "✂ d" in line)
    assert pruned.split()[:4] == ["│", "└─", "✂", "d"]


def test_equal_steps_that_are_all_dead_are_one_line():
    texts = ["", "a", "b", "", "", ""]
    record = make_tree([-1, 0, 0, 2, 2, 2], texts, (1,), (3, 4, 5), (0, 1))
    lines = draw(render_tree(record))
    assert len(lines) == 5
    assert lines[3].strip().startswith(f"✂ (empty step)  {TIMES}3")
    assert "… 4 more steps, best 0.04, 3 pruned" in draw(render_tree(record, max_lines=4))[0]
    for node in record["nodes"][3:]:
        node["tokens"] = []
    assert draw(render_tree(record))[3].strip().startswith(f"✂ (not written)  {TIMES}3")


def test_only_the_chosen_path_is_green():
    lines = draw(render_tree(make_tree()), force_terminal=True, color_system="standard")
    assert all(("32m" in line) == ("▶" in line) for line in lines[:-1])


def test_the_width_argument_caps_the_console():
    lines = draw(render_tree(make_tree(), width=40), 200)
    assert max(map(cell_len, lines)) <= 40


def test_text_of_a_model_stays_text():
    evil = (
        "[bold]b[/bold] \x1b[31mred\x1b]0;title\x07 \u202eright\u200b :smile: \x9b1m\r\nnext\ttab"
    )
    texts = [evil, evil, *TEXTS[2:]]
    record = make_tree(texts=texts, question=evil, answer=evil, strategy=evil)
    for renderable in (render_tree(record), render_summary([record])):
        printed = "\n".join(draw(renderable, 250, force_terminal=True, color_system=None))
        assert not set(printed) & set("\x07\x9b\x1b\r\t\u202e\u200b")
        assert "[bold]b[/bold]" in printed
    assert ":smile:" in "\n".join(draw(render_tree(record), 250))


@given(st.text(max_size=300))
def test_clean_text_is_one_printable_line(text):
    line = clean_text(text)
    assert "\n" not in line
    assert all(c.isprintable() or c == " " for c in line.replace("\xa0", " "))
    assert clean_text(line) == line


def test_clean_text_is_bounded():
    assert len(clean_text("e" + "\u0301" * 10**6)) == 500


def test_graph_nodes_say_how_they_were_made():
    record = make_tree(nodes={"op": ["root", "generate", "refine"] + ["generate"] * 6})
    assert any("refine: 12 + 1 = 13" in line for line in draw(render_tree(record)))
    parents = np.array([[-1, -1], [0, -1], [0, -1], [1, 2]])
    nodes = {"parents": parents, "depth": [0, 1, 1, 2]}
    nodes["op"] = ["root", "generate", "generate", "aggregate"]
    record = make_tree([-1, 0, 0, 1], TEXTS[:4], (), (), (), nodes=nodes)
    assert any("aggregate of 2: 13 * 2 = 26" in line for line in draw(render_tree(record)))


def test_statistics_that_say_nothing_are_left_out():
    same = {"visits": [1] * 9, "prior": [1.0] * 9, "value": {"model": [None] * 9}}
    lines = draw(render_tree(make_tree(nodes=same)))
    assert lines[0] == "▶ How many?"


def test_a_lone_root_is_drawn():
    record = make_tree([-1], [""], (), (), (), answer=None, correct=None)
    assert draw(render_tree(record))[0] == "  How many?"
    with pytest.raises(ValueError, match="max_lines must be >= 4, not 3"):
        render_tree(record, max_lines=3)


def test_summary_of_one_problem():
    records = [
        make_tree(strategy="greedy", correct=False, answer="9" * 90),
        make_tree(strategy="best_of_n", correct=None, answer=None, seconds=0.0),
        make_tree(strategy="puct"),
    ]
    title, header, greedy, *others = (line.split() for line in draw(render_summary(records)))
    assert title == ["generated", "model"]
    assert header == ["strategy", "answer", "correct", "tokens", "calls", "seconds", "tokens/s"]
    assert greedy[1].startswith("99999")
    assert greedy[1].endswith("…")
    assert [greedy[0], *greedy[2:]] == ["greedy", "✘", "no", "1,200", "1,200", "10.0", "120.0"]
    assert others == [
        ["best_of_n", "-", "-", "1,200", "1,200", "0.0", "-"],
        ["puct", "26", "✔", "yes", "1,200", "1,200", "10.0", "120.0"],
    ]
    assert max(map(cell_len, draw(render_summary(records)))) <= 80


def test_summary_of_many_problems():
    records = [make_tree(), make_tree(correct=False), make_tree(correct=None, answer=None)]
    lines = draw(render_summary([*records, make_tree(strategy="greedy")]))
    assert lines[1].split()[1] == "answered"
    assert lines[2].split() == ["puct", "2", "of", "3", "1", "of", "2", "3,600", "3,600", "30.0",
                                "120.0"]  # fmt: skip
    assert lines[3].split()[:4] == ["greedy", "1", "of", "1"]
