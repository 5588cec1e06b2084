"""Operators one by one: golden numbers of the spec, and invariants of the structure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.core.budget import zero_budget
from rlm_jax.reasoning.operators.evaluate import accumulate_score, self_consistency, step_prior
from rlm_jax.reasoning.operators.structure import child_slots, generate
from rlm_jax.reasoning.operators.traversal import puct_score, select_answer
from rlm_jax.reasoning.operators.update import Backup, backpropagate
from rlm_jax.reasoning.protocol import Outcome, Request
from rlm_jax.reasoning.structure import Operator, check, make_structure, path_to_root


def grow(structure, nodes, num_children, values, terminal=None, lengths=None, duplicate=None):
    """Appends children with these values under `nodes` of a batch of one."""
    shape = (1, len(nodes), num_children)
    values = jnp.asarray(values, jnp.float32).reshape(shape)
    lengths = jnp.ones(shape, jnp.int32) if lengths is None else jnp.asarray(lengths).reshape(shape)
    false = jnp.zeros(shape, bool)
    request = Request(
        jnp.asarray([nodes]), jnp.full((1, len(nodes)), Operator.GENERATE), num_children
    )
    active = jnp.broadcast_to(request.active[..., None], shape)
    lengths = jnp.where(active, lengths, 0)
    cost = zero_budget(structure.num_nodes).replace(generated_tokens=lengths.sum((1, 2)))
    outcome = Outcome(
        valid=active,
        duplicate=false if duplicate is None else jnp.asarray(duplicate).reshape(shape),
        length=lengths,
        logprob=-values,
        value=values,
        reward=jnp.zeros(shape),
        terminal=false if terminal is None else jnp.asarray(terminal).reshape(shape),
        answer_key=jnp.zeros(shape, jnp.uint32),
        state_key=jnp.zeros(shape, jnp.uint32),
        proven=false,
        node_value=jnp.zeros(shape[:2]),
        cost=cost,
    )
    structure, slots = generate(structure, request, outcome, jnp.ones(shape))
    check(structure)
    return structure, slots


@pytest.fixture
def tree():
    """root -> 1, 2; 1 -> 3, 4 (both terminal); 2 -> 5 (terminal), 6 (not)."""
    structure = make_structure(jnp.asarray([3]), 10)
    structure, _ = grow(structure, [0], 2, [0.5, 0.6])
    structure, _ = grow(
        structure, [1, 2], 2, [0.2, 0.3, 0.6, 0.9], terminal=[True, True, True, False]
    )
    return structure


def test_puct_scores_equal_goldens_g02_and_g03():
    stats = {
        "value": jnp.asarray([0.6, 0.4, 0.5]),
        "visits": jnp.asarray([3.0, 5.0, 2.0]),
        "prior": jnp.asarray([0.2, 0.5, 0.3]),
        "parent_visits": jnp.asarray(10.0),
    }
    scores = puct_score(**stats, exploration=1.25, base=19652.0)
    np.testing.assert_allclose(scores, [0.797731, 0.729551, 0.895462], atol=1e-6)
    scores = puct_score(**stats, exploration=1.25, base=None)
    np.testing.assert_allclose(scores, [0.797642, 0.729404, 0.895285], atol=1e-6)


def test_prior_golden_g05():
    prior = step_prior(
        jnp.asarray([-1.2]),
        jnp.asarray([3]),
        jnp.asarray([True]),
        length_power=1.25,
        normalise=False,
    )
    np.testing.assert_allclose(prior, [0.737909], atol=1e-6)
    score = puct_score(
        jnp.asarray([0.3]), jnp.asarray([2.0]), prior, jnp.asarray(9.0), exploration=1.0, base=None
    )
    np.testing.assert_allclose(score, [1.037909], atol=1e-6)


def test_a_normalised_prior_sums_to_one_over_the_valid_steps():
    prior = step_prior(
        jnp.asarray([[-1.0, -8.0, -3.0]]),
        jnp.asarray([[2, 4, 3]]),
        jnp.asarray([[True, True, False]]),
    )
    expected = np.exp([-0.5, -2.0]) / np.exp([-0.5, -2.0]).sum()
    np.testing.assert_allclose(prior, [[*expected, 0.0]], atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ("min", 0.8, 0.5),
        ("prod", 0.684, 0.49005),
        ("last", 0.95, 0.99),
        ("mean", 0.883333, 0.826667),
        ("max", 0.95, 0.99),
    ],
)
def test_aggregation_golden_g23(rule, first, second):
    steps = jnp.asarray([[0.9, 0.99], [0.8, 0.5], [0.95, 0.99]])
    score = jnp.asarray([7.0, -7.0])  # What stands at the root must not matter.
    for depth, step in enumerate(steps, 1):
        score = accumulate_score(score, step, jnp.full(2, depth), rule)
    np.testing.assert_allclose(score, [first, second], atol=1e-6)


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="'median'"):
        accumulate_score(jnp.ones(1), jnp.ones(1), jnp.ones(1, jnp.int32), "median")


def test_votes_golden_g48():
    """Answers 7, 7, 9 with scores .2, .3, .6: majority 7, weighted and best 9."""
    structure = make_structure(jnp.asarray([1]), 4)
    structure, _ = grow(structure, [0], 3, [0.2, 0.3, 0.6], terminal=[True] * 3)
    ids = jnp.asarray([[-1, 0, 0, 1]])
    majority = select_answer(structure, ids, "majority")
    assert (int(majority.node[0]), float(majority.score[0])) == (2, 2.0)
    assert float(majority.share[0]) == pytest.approx(2 / 3)
    weighted = select_answer(structure, ids, "weighted")
    assert int(weighted.node[0]) == 3
    assert float(weighted.score[0]) == pytest.approx(0.6)
    assert int(select_answer(structure, ids, "best").node[0]) == 3


def test_votes_weigh_equal_answers_together(tree):
    ids = jnp.full((1, 10), -1).at[0, jnp.asarray([3, 4, 5])].set(jnp.asarray([0, 0, 1]))
    assert int(select_answer(tree, ids, "weighted").node[0]) == 5
    raised = tree.replace(value=tree.value.at[0, 4].set(0.45))
    answer = select_answer(raised, ids, "weighted")
    assert int(answer.node[0]) == 4
    assert float(answer.score[0]) == pytest.approx(0.65)


def test_unfinished_leaves_answer_only_when_nothing_finished(tree):
    ids = jnp.full((1, 10), -1).at[0, 6].set(0)
    assert int(select_answer(tree, ids, "majority").node[0]) == 6
    ids = ids.at[0, 3].set(1)
    assert int(select_answer(tree, ids, "majority").node[0]) == 3
    nothing = jnp.full((1, 10), -1)
    assert int(select_answer(tree, nothing, "majority").node[0]) == 5


def test_a_bare_root_answers_with_itself():
    structure = make_structure(jnp.asarray([2]), 3)
    answer = select_answer(structure, jnp.full((1, 3), -1), "majority")
    assert int(answer.node[0]) == 0


def test_self_consistency_is_the_share_of_finished_solutions():
    votes = jnp.asarray([[7, 7, 9, 7, 0]], jnp.uint32)
    voters = jnp.asarray([[True, True, True, False, True]])
    share = self_consistency(jnp.asarray([[7, 9, 5, 0]], jnp.uint32), votes, voters)
    np.testing.assert_allclose(share, [[0.5, 0.25, 0, 0]], atol=1e-6)
    nobody = self_consistency(votes, votes, jnp.zeros_like(voters))
    np.testing.assert_array_equal(nobody, jnp.zeros((1, 5)))


def test_slots_follow_each_other_and_idle_lanes_get_none(tree):
    request = Request(jnp.asarray([[6, -1, 2]]), jnp.full((1, 3), Operator.GENERATE), 1)
    assert child_slots(tree, request).tolist() == [[[7], [10], [8]]]


def test_generate_keeps_a_duplicate_dead_but_on_record():
    structure = make_structure(jnp.asarray([4]), 5)
    structure, _ = grow(structure, [0], 2, [0.5, 0.7], lengths=[3, 3], duplicate=[False, True])
    assert structure.alive[0, :3].tolist() == [True, True, False]
    assert structure.visits[0, :3].tolist() == [0.0, 1.0, 0.0]
    assert int(structure.budget.generated_tokens[0]) == 6
    assert structure.span_start[0, 1:3].tolist() == [4, 4]


FIRST_CHILD = jnp.full((1, 10), -1).at[0, :3].set(jnp.asarray([1, 3, 5]))


def back_up(tree, nodes, totals, counts, **settings):
    """`backpropagate` of `tree`, with no change of its open leaves."""
    counts, totals = jnp.asarray([counts], jnp.float32), jnp.asarray([totals], jnp.float32)
    backup = Backup(counts, totals, jnp.zeros(counts.shape, jnp.int32))
    leaves = jnp.zeros((1, 10), jnp.int32)
    return backpropagate(
        tree, FIRST_CHILD, leaves, jnp.asarray([nodes]), backup, num_children=2, **settings
    )[0]


def test_backpropagation_keeps_means_whatever_the_order(tree):
    together = back_up(tree, [1, 2], [1.5, -0.5], [2, 1])
    apart = back_up(back_up(tree, [2], [-0.5], [1]), [1], [1.5], [2])
    np.testing.assert_allclose(together.value, apart.value, atol=1e-6)
    assert together.visits[0, :3].tolist() == [3.0, 3.0, 2.0]
    np.testing.assert_allclose(together.value[0, :3], [1 / 3, 2.0 / 3, 0.05], atol=1e-6)
    np.testing.assert_array_equal(together.value[0, 3:], tree.value[0, 3:])


@pytest.mark.parametrize(("learning_rate", "value"), [(1.0, -0.024), (0.5, 0.038)])
def test_td_backup_golden_g06(tree, learning_rate, value):
    """Children (N, q) = (1, .5), (3, -.2), old q = .1."""
    stats = tree.replace(
        value=tree.value.at[0, :3].set(jnp.asarray([0.1, 0.5, -0.2])),
        visits=tree.visits.at[0, :3].set(jnp.asarray([4.0, 1.0, 3.0])),
    )
    new = back_up(
        stats, [0], [0.0], [1], rule="td", discount=0.96, learning_rate=learning_rate
    )
    assert float(new.value[0, 0]) == pytest.approx(value, abs=1e-6)
    assert float(new.visits[0, 0]) == 5.0


def test_backups_by_maximum_and_with_rewards_and_discount(tree):
    stats = tree.replace(reward=tree.reward.at[0, 1:3].set(jnp.asarray([0.1, -0.2])))
    new = back_up(stats, [0], [0.0], [1], rule="max", discount=0.5)
    assert float(new.value[0, 0]) == pytest.approx(0.1 + 0.5 * 0.5)
    new = back_up(stats, [1], [0.7], [1], discount=0.5)
    # Node 1 held one visit of 0.5; its edge is worth 0.1 on the way up.
    assert float(new.value[0, 1]) == pytest.approx((0.5 + 0.7) / 2)
    assert float(new.value[0, 0]) == pytest.approx(0.1 + 0.5 * 0.7)


def test_a_graph_node_may_have_several_parents():
    structure = make_structure(jnp.asarray([1]), 6, num_parents=2)
    structure, _ = grow(structure, [0], 3, [0.1, 0.2, 0.3])
    structure, _ = grow(structure, [1], 1, [0.4])
    more = structure.more_parents.at[0, 4, 0].set(2)
    operator = structure.operator.at[0, 4].set(Operator.AGGREGATE)
    check(structure.replace(more_parents=more, operator=operator))
    with pytest.raises(AssertionError, match="parents come before"):
        check(structure.replace(more_parents=more.at[0, 4, 0].set(4), operator=operator))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("parent", 8, "parents come before"),
        ("depth", 5, "depth is one more"),
        ("span_start", 77, "starts where its parent ends"),
        ("value", np.nan, "finite"),
        ("visits", 0.5, "counts"),
        ("owner", 99, "owner"),
        ("span_length", 9, "generated tokens"),
    ],
)
def test_check_finds_what_is_broken(tree, field, value, rule):
    array = getattr(tree, field)
    broken = tree.replace(**{field: array.at[0, 6].set(value)})
    with pytest.raises(AssertionError, match=rule):
        check(broken)


def test_check_finds_growth_below_a_terminal_node(tree):
    grown, _ = grow(tree, [6], 1, [0.0])
    with pytest.raises(AssertionError, match="below a terminal"):
        check(grown.replace(terminal=grown.terminal.at[0, 6].set(True)))


def test_paths_run_from_the_root(tree):
    assert path_to_root(tree, 0, 5) == [0, 2, 5]
    assert path_to_root(tree, 0, 0) == [0]


@pytest.mark.parametrize("bad", [{"capacity": 0}, {"capacity": 3, "num_parents": 0}])
def test_a_structure_needs_room(bad):
    with pytest.raises(ValueError, match="must be >= 1"):
        make_structure(jnp.asarray([1]), **bad)


def test_a_structure_passes_through_transformations(tree):
    doubled = jax.vmap(lambda s: s.replace(value=s.value * 2))(tree)
    np.testing.assert_array_equal(doubled.value, tree.value * 2)
