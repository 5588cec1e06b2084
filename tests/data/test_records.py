"""Records: round trips, every broken field named, and files that survive what happens to files."""

import copy
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_jax.data import records

BUDGET = dict.fromkeys(records.BUDGET_FIELDS, 3)


def make_columns(num_nodes=3, **changes):
    """A chain of `num_nodes` nodes as the arrays that a structure holds."""
    index = np.arange(num_nodes)
    columns = records.NodeColumns(
        parents=(index - 1)[:, None],
        op=["root"] + ["generate"] * (num_nodes - 1),
        owner=np.full(num_nodes, -1),
        depth=index,
        text=[f"step {i}" for i in index],
        tokens=[np.arange(i, dtype=np.int32) for i in index],
        logprob=np.linspace(0, -1, num_nodes, dtype=np.float32),
        visits=np.full(num_nodes, 2.0, np.float32),
        value={"model": np.full(num_nodes, 0.1, np.float32), "search": [math.nan] * num_nodes},
        prior=np.ones(num_nodes, np.float32),
        reward=np.zeros(num_nodes, np.float32),
        terminal=index == num_nodes - 1,
        alive=np.ones(num_nodes, bool),
        budget=index * 4,
    )
    return columns._replace(**changes)


def make_record(id="p", nodes=None, chosen=(0, 1, 2), **changes):
    fields = {
        "id": id,
        "question": "How many?",
        "answer": "18",
        "correct": True,
        "strategy": "puct",
        "config": {"temperature": np.float32(0.7), "num_children": np.int64(4), "name": "x"},
        "seed": 0,
        "policy_version": "smollm2",
        "value_version": None,
        "budget": BUDGET | {"expansions": np.int32(5)},
        "seconds": 1.5,
    }
    return records.make_record(nodes=nodes or make_columns(), chosen=chosen, **(fields | changes))


def test_a_record_of_arrays_is_plain_json():
    record = make_record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    node = record["nodes"][2]
    assert node["parents"] == [1]
    assert node["owner"] is None
    assert node["value"] == {"model": 0.1, "search": None}
    assert node["tokens"] == [0, 1]
    assert node["visits"] == 2
    assert record["budget"]["expansions"] == 5
    assert record["config"] == {"temperature": 0.7, "num_children": 4, "name": "x"}


@given(st.lists(st.floats(width=32), min_size=3, max_size=3))
def test_floats_come_back_exactly_and_never_as_nan(values):
    column = np.array(values, np.float32)
    text = json.dumps(make_record(nodes=make_columns(reward=column)), allow_nan=False)
    for node, value in zip(json.loads(text)["nodes"], column, strict=True):
        assert node["reward"] is None if not np.isfinite(value) else node["reward"] == value


def test_a_record_older_than_a_count_is_still_read(tmp_path):
    record = make_record()
    del record["budget"]["forwarded_tokens"]
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n")
    assert list(records.read_records(tmp_path / "r.jsonl")) == [record]


def test_graphs_and_nesting_are_kept():
    parents = np.array([[-1, -1], [0, -1], [0, -1], [1, 2]])
    nodes = make_columns(4, parents=parents, depth=[0, 1, 1, 2], owner=np.array([-1, -1, 1, -1]))
    record = make_record(nodes=nodes, chosen=[0, 2, 3])
    assert record["nodes"][3]["parents"] == [1, 2]
    assert record["nodes"][2]["owner"] == 1


def test_columns_must_be_equally_long():
    with pytest.raises(ValueError, match=r"differ in length.*'depth': 2"):
        make_record(nodes=make_columns(depth=[0, 1]))


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(record):
        for step in path:
            record = record[step]
        record[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda r: r.pop("question"), r"record\.question: missing"),
        (_set("extra", 1), r"record\.extra: unknown"),
        (_set("version", 2), r"record\.version: 2 is not 1"),
        (_set("version", True), r"record\.version"),
        (_set("id", 5), r"record\.id"),
        (_set("answer", 5), r"record\.answer"),
        (_set("correct", 1), r"record\.correct"),
        (_set("seconds", -1.0), r"record\.seconds"),
        (_set("seconds", math.inf), r"record\.seconds"),
        (_set("seconds", None), r"record\.seconds"),
        (_set("config", "x", [1]), r"record\.config\.x"),
        (_set("budget", "model_calls", -1), r"record\.budget\.model_calls"),
        (_set("budget", "model_calls", 1.0), r"record\.budget\.model_calls"),
        (lambda r: r["budget"].pop("model_calls"), r"record\.budget\.model_calls: missing"),
        (_set("budget", "iterations", 1), r"record\.budget\.iterations: unknown"),
        (_set("nodes", {}), r"record\.nodes"),
        (_set("nodes", 1, "depth", 2), r"record\.nodes\[1\]\.depth"),
        (_set("nodes", 1, "parents", []), r"record\.nodes\[1\]\.parents"),
        (_set("nodes", 1, "parents", [2]), r"record\.nodes\[1\]\.parents\[0\]"),
        (_set("nodes", 1, "parents", ["0"]), r"record\.nodes\[1\]\.parents\[0\]"),
        (_set("nodes", 0, "parents", [0]), r"record\.nodes\[0\]\.parents\[0\]"),
        (_set("nodes", 2, "id", 1), r"record\.nodes\[2\]\.id"),
        (_set("nodes", 2, "tokens", [1, -1]), r"record\.nodes\[2\]\.tokens\[1\]"),
        (_set("nodes", 2, "value", "model", math.nan), r"record\.nodes\[2\]\.value\.model"),
        (_set("nodes", 2, "logprob", "x"), r"record\.nodes\[2\]\.logprob"),
        (_set("nodes", 2, "visits", 1.5), r"record\.nodes\[2\]\.visits"),
        (_set("nodes", 2, "terminal", 0), r"record\.nodes\[2\]\.terminal"),
        (_set("nodes", 2, "owner", -1), r"record\.nodes\[2\]\.owner"),
        (_set("chosen", [0, 2]), r"record\.chosen\[1\]: node 2 is not a child of 0"),
        (_set("chosen", [1, 2]), r"record\.chosen\[0\]"),
        (_set("chosen", [0, 9]), r"record\.chosen\[1\]: no node"),
        (_set("chosen", ["0"]), r"record\.chosen\[0\]"),
    ],
)
def test_a_wrong_field_is_named(change, name):
    record = copy.deepcopy(make_record())
    change(record)
    with pytest.raises(ValueError, match=name):
        records.validate_record(record)


@pytest.mark.parametrize("value", [None, [], "x", 3, {}])
def test_what_is_no_record_is_refused(value):
    with pytest.raises(ValueError, match=r"record"):
        records.validate_record(value)


def test_writes_and_reads_back(tmp_path):
    path = tmp_path / "runs" / "records.jsonl"
    written = [make_record(f"p{i}", question=f"π {i}\n\ud800") for i in range(3)]
    with records.RecordWriter(path) as writer:
        for record in written:
            writer.write(record)
    assert list(records.read_records(path)) == written
    assert records.finished_ids(path) == {"p0", "p1", "p2"}


def test_no_file_means_nothing_finished(tmp_path):
    assert records.finished_ids(tmp_path / "none.jsonl") == set()
    with pytest.raises(FileNotFoundError):
        list(records.read_records(tmp_path / "none.jsonl"))


def test_every_torn_end_is_cut_away_and_the_rest_kept(tmp_path):
    path = tmp_path / "records.jsonl"
    with records.RecordWriter(path) as writer:
        writer.write(make_record("first"))
        whole = path.read_bytes()
        writer.write(make_record("second"))
    both = path.read_bytes()
    for length in (*range(len(whole), len(both), 97), len(both) - 2, len(both) - 1):
        path.write_bytes(both[:length])
        # Only the newline is missing: the record itself is whole, and is kept.
        kept = {"first", "second"} if length == len(both) - 1 else {"first"}
        assert records.finished_ids(path) == kept
        with records.RecordWriter(path) as writer:
            writer.write(make_record("third"))
        assert [r["id"] for r in records.read_records(path)] == [*sorted(kept), "third"]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    line = json.dumps(make_record())
    for broken, message in (("{", "line 2: not JSON"), ("{}", r"line 2: record\.version")):
        path.write_text(f"{line}\n{broken}\n{line}\n")
        with pytest.raises(ValueError, match=message):
            records.finished_ids(path)


def test_an_invalid_record_is_not_written(tmp_path):
    path = tmp_path / "records.jsonl"
    with records.RecordWriter(path) as writer:
        writer.write(make_record("good"))
        with pytest.raises(ValueError, match=r"record\.seed"):
            writer.write(make_record("bad") | {"seed": None})
    assert records.finished_ids(path) == {"good"}


def test_a_short_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    write = os.write
    with records.RecordWriter(path) as writer:
        writer.write(make_record("good"))
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:50]))
        with pytest.raises(OSError, match="only 50 of"):
            writer.write(make_record("lost"))
        assert path.read_bytes() == before
        monkeypatch.undo()
        writer.write(make_record("again"))
    assert records.finished_ids(path) == {"good", "again"}


def test_each_record_is_on_disk_once_written(tmp_path):
    path = tmp_path / "records.jsonl"
    writer = records.RecordWriter(path)
    writer.write(make_record("p"))
    assert records.finished_ids(path) == {"p"}
    writer.close()
    writer.close()
