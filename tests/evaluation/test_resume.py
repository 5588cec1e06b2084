"""What was made in another way is refused by name, and what was not is kept."""

import dataclasses

import pytest

from rlm_jax.data.records import BUDGET_FIELDS, NodeColumns, RecordWriter, make_record
from rlm_jax.evaluation.resume import digest_problems, read_finished, require_same
from rlm_jax.tasks.base import Gold, Problem

PROBLEMS = [Problem(f"What is {i} + {i}?", id=f"p{i}") for i in range(3)]
SETTINGS = {"model": "m", "max_depth": 4}
ROOT = NodeColumns(
    parents=[[]], op=["root"], owner=[-1], depth=[0], text=["?"], tokens=[[1]], logprob=[None],
    visits=[1], value={}, prior=[None], reward=[None], terminal=[False], alive=[True], budget=[0],
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    """A file with a record of two problems, and one of another strategy and other settings."""
    path = tmp_path / "records.jsonl"
    with RecordWriter(path) as writer:
        for strategy, settings, problems in (
            ("greedy", SETTINGS, PROBLEMS[:2]),
            ("puct", SETTINGS | {"max_depth": 9}, PROBLEMS[:1]),
        ):
            for problem in problems:
                record = make_record(
                    id=problem.id, question=problem.question, answer=None, correct=None,
                    strategy=strategy, config=settings, seed=0, policy_version="m",
                    value_version=None, budget=dict.fromkeys(BUDGET_FIELDS, 0), seconds=0.0,
                    nodes=ROOT, chosen=[],
                )  # fmt: skip
                writer.write(record)
    return path


def read_ids(path, problems=PROBLEMS, **changes):
    settings = {**SETTINGS, "seed": 0, **changes}
    return [record["id"] for record in read_finished(path, "greedy", settings, problems)]


def test_records_of_the_same_run_are_kept(path, tmp_path):
    assert read_ids(path) == ["p0", "p1"]
    # Fewer problems are no other ones.
    assert read_ids(path, PROBLEMS[1:]) == ["p0", "p1"]
    assert read_ids(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"seed=0 \(now 1\)"),
        ({"max_depth": 5, "model": "n"}, r"model='m' \(now 'n'\), max_depth=4 \(now 5\)"),
        ({"widen": True}, r"widen=None \(now True\)"),
    ],
)
def test_other_settings_are_named(path, changes, message):
    with pytest.raises(ValueError, match=rf"records.jsonl holds records of greedy with {message};"):
        read_ids(path, **changes)


def test_another_question_under_the_same_id_is_named(path):
    with pytest.raises(ValueError, match="holds another question under the id 'p1'"):
        read_ids(path, [PROBLEMS[0], dataclasses.replace(PROBLEMS[1], question="Why?")])


def test_only_what_is_asked_for_is_compared():
    require_same("it holds a row", {"n": 3, "accuracy": 0.5}, {"n": 3})
    with pytest.raises(ValueError, match=r"^it holds a row with n=3 \(now 4\); name another --out"):
        require_same("it holds a row", {"n": 3, "accuracy": 0.5}, {"n": 4})


def test_a_digest_knows_questions_answers_ids_and_their_order():
    examples = [(problem, Gold("1")) for problem in PROBLEMS]
    others = [
        examples[:2],
        examples[::-1],
        [(PROBLEMS[0], Gold("2")), *examples[1:]],
        [(dataclasses.replace(PROBLEMS[0], id="x"), Gold("1")), *examples[1:]],
        [(dataclasses.replace(PROBLEMS[0], question="Why?"), Gold("1")), *examples[1:]],
    ]
    digests = {digest_problems(each) for each in (examples, list(examples), *others)}
    assert len(digests) == 1 + len(others)
