"""Solutions worth imitating, picked out of records written by hand."""

import pytest

from rlm_jax.data.records import BUDGET_FIELDS, NodeColumns, make_record
from rlm_jax.learning.expert_iteration import (
    finished_paths,
    make_answer_key,
    select_solutions,
)

# parent, text, terminal, alive, searched value
TREE = [
    (None, "Make 24.", False, True, None),
    (0, "a;", False, True, 0.5),
    (1, "b=24", True, True, 0.2),
    (1, "c=24", True, True, 0.9),
    (0, "d=7", True, True, 0.99),
    (0, "a;", False, False, None),
    (0, "ab=24", True, True, 0.2),
    (0, "c=24", True, True, None),
]


def make(tree=TREE, id="p", correct=True, chosen=(0, 1, 3)):
    parents = [[] if parent is None else [parent] for parent, *_ in tree]
    depth = [0] * len(tree)
    for i, above in enumerate(parents):
        depth[i] = depth[above[0]] + 1 if above else 0
    zeros = [0] * len(tree)
    columns = NodeColumns(
        parents=parents,
        op=["root"] + ["generate"] * (len(tree) - 1),
        owner=[-1] * len(tree),
        depth=depth,
        text=[text for _, text, *_ in tree],
        tokens=[list(text.encode()) for _, text, *_ in tree],
        logprob=zeros,
        visits=zeros,
        value={"search": [value for *_, value in tree]},
        prior=zeros,
        reward=zeros,
        terminal=[terminal for *_, terminal, _, _ in tree],
        alive=[alive for *_, alive, _ in tree],
        budget=zeros,
    )
    return make_record(
        id=id,
        question="Make 24.",
        answer="24",
        correct=correct,
        strategy="puct",
        config={},
        seed=0,
        policy_version="x",
        value_version=None,
        budget=dict.fromkeys(BUDGET_FIELDS, 0),
        seconds=0.0,
        nodes=columns,
        chosen=list(chosen),
    )


def says_24(record, path):
    return path[-1]["text"].endswith("=24")


def texts(solutions):
    return [solution.text for solution in solutions]


def test_a_record_vouches_for_its_chosen_solution_alone():
    (solution,) = select_solutions([make()])
    assert solution.problem == "p"
    assert bytes(solution.prompt) == b"Make 24."
    assert [bytes(step) for step in solution.steps] == [b"a;", b"c=24"]
    assert solution.text == "a;c=24"
    for correct in (False, None):
        assert select_solutions([make(correct=correct)]) == []
    assert select_solutions([make(chosen=())]) == []


def test_right_paths_come_best_first_then_shortest():
    found = select_solutions([make()], is_right=says_24)
    assert texts(found) == ["a;c=24", "ab=24", "a;b=24", "c=24"]
    assert texts(select_solutions([make()], is_right=says_24, max_per_problem=2)) == texts(
        found[:2]
    )


def test_equal_solutions_are_one_however_they_are_cut_into_steps():
    """Of two records' equal solutions the one of higher value stands for both."""
    whole = [TREE[0], (0, "a;c=24", True, True, 0.95), (0, "a;b=24", True, True, 0.1)]
    again = make(whole, chosen=(0, 1))
    found = select_solutions([make(), again], is_right=says_24)
    assert texts(found) == ["a;c=24", "ab=24", "a;b=24", "c=24"]
    assert len(found[0].steps) == 1
    assert len(found[2].steps) == 2


def test_answers_as_keys():
    key = make_answer_key(lambda text: "24" if text.endswith("b=24") else None)
    found = select_solutions([make()], is_right=says_24, key_fn=key)
    assert texts(found) == ["a;c=24", "ab=24", "c=24"]


def test_problems_keep_their_order_and_their_own_solutions():
    records = [make(id="q"), make(id="p"), make(id="q", correct=False)]
    assert [s.problem for s in select_solutions(records)] == ["q", "p"]


def test_dead_and_unfinished_ends_are_no_solutions_unless_chosen():
    ends = [path[-1]["id"] for path in finished_paths(make())]
    assert ends == [2, 3, 4, 6, 7]
    ends = [path[-1]["id"] for path in finished_paths(make(chosen=(0, 1)))]
    assert ends == [2, 3, 4, 6, 7, 1]
    assert finished_paths(make(TREE[:1], chosen=(0,))) == []


def test_a_cap_below_one_is_refused():
    with pytest.raises(ValueError, match="max_per_problem"):
        select_solutions([], max_per_problem=0)
