"""States read out of records: of a tree, of a chain that goes back, of lines that are wrong."""

import pytest
from record_trees import make_tree_record

from rlm_jax.evaluation.calibration import Judged
from rlm_jax.evaluation.states import judge_states, read_puzzle, read_states
from rlm_jax.tasks import countdown, game24
from rlm_jax.tasks.base import Problem

PROBLEM = countdown.make_problem((7, 4, 10, 4), 24, "p")
NUMBERS = PROBLEM.data[0]


def chain(*lines):
    """Nodes in a row, as `make_tree_record` takes them."""
    return [(place, line, False, True) for place, line in enumerate(lines)]


def values(record, *found):
    for node, value in zip(record["nodes"][1:], found, strict=True):
        node["value"]["model"] = value
    return record


def test_a_tree_is_read_line_by_line():
    record = make_tree_record(
        [
            (0, "10 - 4 = 6 ; 4 6 7\n", False, True),
            (0, "10 * 4 = 40 ; 4 7 40\n", False, True),
            (1, "7 - 6 = 1 ; 1 4\n", False, True),
            (3, "4 * 1 = 4", True, True),
            (1, "6 + 4 = 10 ; 7 10\n", False, False),
        ]
    )
    assert read_states(record, NUMBERS) == {
        0: (4, 4, 7, 10),
        1: (4, 6, 7),
        2: (4, 7, 40),
        3: (1, 4),
        4: (4,),
        5: (7, 10),
    }


@pytest.mark.parametrize(
    "line",
    [
        "10 - 4 = 7 ; 4 7 7\n",
        "10 - 4 = 6 ; 4 6 8\n",
        "10 - 4 = 6\n",
        "10 - 5 = 5 ; 4 4 5 7\n",
        "7 / 4 = 1 ; 1 4 10\n",
        "4 - 7 = 3 ; 3 4 10\n",
        ": 4 4 7 10\n",
        "10 - 4 = 6 ; 4 6 7 so\n",
        "",
    ],
)
def test_a_wrong_line_leads_nowhere_and_so_does_what_follows(line):
    record = make_tree_record([(0, line, False, True), (1, "7 - 6 = 1 ; 1 4\n", False, True)])
    assert set(read_states(record, NUMBERS)) == {0}


def test_a_chain_that_goes_back_is_where_it_went():
    first, second = "10 * 4 = 40 ; 4 7 40\n", "40 - 7 = 33 ; 4 33\n"
    record = make_tree_record(
        chain(first, second, ": 4 7 40\n", ": 4 4 7 10\n", "10 - 7 = 3 ; 3 4 4\n")
    )
    states = [state for _, state in sorted(read_states(record, NUMBERS).items())]
    assert states == [
        (4, 4, 7, 10),
        (4, 7, 40),
        (4, 33),
        (4, 7, 40),
        (4, 4, 7, 10),
        (3, 4, 4),
    ]
    # What was left on the way that was taken back is no longer behind the chain.
    astray = make_tree_record(chain(first, second, ": 4 4 7 10\n", ": 4 7 40\n"))
    assert set(read_states(astray, NUMBERS)) == {0, 1, 2, 3}
    judged = [one for _, one in judge_states("countdown", [PROBLEM], [values(record, *[0.5] * 5)])]
    # 3 * (4 + 4)
    assert [(one.depth, one.solvable) for one in judged] == [
        (1, False),
        (2, False),
        (1, False),
        (0, True),
        (1, True),
    ]


def test_what_a_network_did_not_value_is_left_out():
    tree = [
        (0, "10 - 7 = 3 ; 3 4 4\n", False, True),
        (0, "10 * 4 = 40 ; 4 7 40\n", False, True),
        (0, "10 + 4 = 14 ; 4 7 14\n", False, False),
        (1, "4 - 4 = 0 ; 0 3\n", False, True),
        (4, "3 * 0 = 0", True, True),
        (0, "7 - 4 = 3 ; 3 4 10\n", False, True),
    ]
    record = values(make_tree_record(tree), 0.9, 0.2, 0.3, 0.1, 0.0, None)
    assert list(judge_states("countdown", [PROBLEM], [record])) == [
        (1, Judged("p", 1, 0.9, True)),
        (2, Judged("p", 1, 0.2, False)),
        (4, Judged("p", 2, 0.1, False)),
    ]
    record["config"] = {"judge": "visit"}
    record["nodes"][2]["visits"] = 3
    assert [node for node, _ in judge_states("countdown", [PROBLEM], [record])] == [2]


def test_the_verdict_is_that_of_the_task():
    """What the verifier says of a whole chain agrees with the states read from its lines."""
    lines = ("10 - 4 = 6 ; 4 6 7\n", "7 * 6 = 42 ; 4 42\n", ": 4 6 7\n", "7 - 4 = 3 ; 3 6\n")
    record = make_tree_record(chain(*lines))
    numbers, target = read_puzzle("countdown", PROBLEM)
    states = read_states(record, numbers)
    assert states[4] == (3, 6)
    text = "".join(lines)
    wrong = countdown.verify_text(numbers, target, text + "6 * 3 = 18")
    assert wrong.reason == "the chain ends on 18, not on 24"


def test_puzzles_of_both_tasks():
    assert read_puzzle("countdown", PROBLEM) == ((7, 4, 10, 4), 24)
    assert read_puzzle("game24", game24.make_problem((1, 2, 3, 4))) == ((1, 2, 3, 4), 24)
    problem = Problem("1 + 1", (("1", "1"),), "a")
    with pytest.raises(ValueError, match="'arithmetic': accepted are countdown, game24"):
        list(judge_states("arithmetic", [problem], []))
    assert list(judge_states("countdown", [Problem("?", ((1, 2), 3), "q")], [])) == []
