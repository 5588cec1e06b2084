"""Operators one by one: the golden numbers of the spec, and small cases done by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import grow, make_request

from rlm_jax.core.budget import zero_budget
from rlm_jax.reasoning.operators.evaluate import (
    accumulate_score,
    self_consistency,
    sibling_prior,
    step_prior,
)
from rlm_jax.reasoning.operators.structure import child_slots, generate
from rlm_jax.reasoning.operators.traversal import (
    backtracks,
    puct_score,
    select_answer,
    td_score,
    uct_score,
    visit_policy,
)
from rlm_jax.reasoning.operators.update import (
    Backup,
    add_to_paths,
    backpropagate,
    weighted_mean,
)
from rlm_jax.reasoning.protocol import make_outcome
from rlm_jax.reasoning.strategies.gumbel import improve_prior, scale_q
from rlm_jax.reasoning.structure import check, make_structure
from rlm_jax.reasoning.tree_config import TreeConfig
from rlm_jax.reasoning.tree_descent import find_first, look_below
from rlm_jax.reasoning.tree_search import init_state

choose = jax.jit(select_answer, static_argnames="rule")


def test_x1_scores_equal_golden_g01():
    q, visits = jnp.asarray([0.2, -0.1, 0.6]), jnp.asarray([1.0, 2.0, 2.0])
    score = functools.partial(td_score, c1=1.25, c2=19652.0)
    raw = score(q, visits, jnp.asarray(5.0))
    np.testing.assert_allclose(raw, [1.450254, 0.733503, 1.433503], atol=1e-6)
    normalised = score((q + 1.0) / 2.0, visits, jnp.asarray(5.0))
    np.testing.assert_allclose(normalised, [1.850254, 1.283503, 1.633503], atol=1e-6)
    np.testing.assert_array_equal(score(q, visits, jnp.asarray(1.0)), q)


@pytest.mark.parametrize(
    ("settings", "score"),
    [
        ({"exploration": 2**0.5}, 1.572983),
        ({"exploration": 1.0}, 1.258714),
        ({"exploration": 2.0}, 2.017427),
        ({"exploration": 0.7 * 2**0.5}, 1.251088),
        ({"exploration": 1.4}, 1.562199),
    ],
    ids=["ucb1", "lats", "rstar", "rest_mcts", "berry"],
)
def test_uct_scores_equal_golden_g04(settings, score):
    value, visits = jnp.asarray([0.5]), jnp.asarray([4.0])
    np.testing.assert_allclose(
        uct_score(value, visits, jnp.asarray(10.0), **settings), [score], atol=1e-6
    )


def test_an_unvisited_child_comes_first_or_as_its_setting_says():
    value, visits = jnp.asarray([0.9, 0.2]), jnp.asarray([3.0, 0.0])
    score = functools.partial(uct_score, value, visits, jnp.asarray(3.0), exploration=1.0)
    assert jnp.isposinf(score()[1])
    np.testing.assert_allclose(score(unvisited=1.0)[1], 1.2, atol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "policy"),
    [(1.0, [0.5, 0.3, 0.2]), (0.5, [0.657895, 0.236842, 0.105263]), (0.0, [1.0, 0.0, 0.0])],
)
def test_visit_policy_equals_golden_g54(temperature, policy):
    visits = jnp.asarray([5.0, 3.0, 2.0])
    np.testing.assert_allclose(visit_policy(visits, temperature), policy, atol=1e-6)


def test_visit_policy_shares_a_tie_and_refuses_a_negative_temperature():
    np.testing.assert_allclose(visit_policy(jnp.asarray([4.0, 0.0, 4.0]), 0.0), [0.5, 0.0, 0.5])
    np.testing.assert_allclose(visit_policy(jnp.zeros(2), 1.0), [0.0, 0.0])
    with pytest.raises(ValueError, match="-1"):
        visit_policy(jnp.ones(2), -1.0)


def test_weighted_means_equal_goldens_g55_and_g56():
    """MCTS-DPO: V = sum max(1, N) Q / sum max(1, N); CPL: the same without the floor."""
    value = weighted_mean(jnp.asarray([0.6, 0.2]), jnp.asarray([2.0, 1.0]), min_visits=1.0)
    assert float(value) == pytest.approx(0.466667, abs=1e-6)
    assert float(0.1 + 1.0 * value) == pytest.approx(0.566667, abs=1e-6)
    unvisited = weighted_mean(jnp.asarray([0.6, 0.2]), jnp.asarray([3.0, 0.0]), min_visits=1.0)
    assert float(unvisited) == pytest.approx((3 * 0.6 + 0.2) / 4)
    value = weighted_mean(jnp.asarray([0.5, -0.5]), jnp.asarray([3.0, 1.0]))
    assert float(value) == pytest.approx(0.25, abs=1e-6)


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
    majority = choose(structure, ids, "majority")
    assert (int(majority.node[0]), float(majority.score[0])) == (2, 2.0)
    assert float(majority.share[0]) == pytest.approx(2 / 3)
    weighted = choose(structure, ids, "weighted")
    assert int(weighted.node[0]) == 3
    assert float(weighted.score[0]) == pytest.approx(0.6)
    assert int(choose(structure, ids, "best").node[0]) == 3


def test_votes_weigh_equal_answers_together(tree):
    ids = jnp.full((1, 10), -1).at[0, jnp.asarray([3, 4, 5])].set(jnp.asarray([0, 0, 1]))
    assert int(choose(tree, ids, "weighted").node[0]) == 5
    raised = tree.replace(value=tree.value.at[0, 4].set(0.45))
    answer = choose(raised, ids, "weighted")
    assert int(answer.node[0]) == 4
    assert float(answer.score[0]) == pytest.approx(0.65)


def test_unfinished_leaves_answer_only_when_nothing_finished(tree):
    ids = jnp.full((1, 10), -1).at[0, 6].set(0)
    assert int(choose(tree, ids, "majority").node[0]) == 6
    ids = ids.at[0, 3].set(1)
    assert int(choose(tree, ids, "majority").node[0]) == 3
    nothing = jnp.full((1, 10), -1)
    assert int(choose(tree, nothing, "majority").node[0]) == 5


@pytest.mark.parametrize("rule", ["majority", "weighted", "best", "most_visited", "highest_value"])
def test_a_proven_solution_is_the_answer_by_every_rule(rule):
    structure, _ = grow(
        make_structure(jnp.asarray([3]), 8),
        [0], 2, [0.2, 0.9], terminal=[True, True], proven=[True, False],
    )  # fmt: skip
    visits = structure.visits.at[0, 1:3].set(jnp.asarray([1.0, 5.0]))
    structure = dataclasses.replace(structure, visits=visits)
    ids = jnp.full((1, 8), -1).at[0, 1:3].set(jnp.asarray([0, 1]))
    assert choose(structure, ids, rule=rule).node[0] == 1
    unproven = dataclasses.replace(structure, proven=structure.proven & False)
    assert choose(unproven, ids, rule="highest_value").node[0] == 2


@pytest.mark.parametrize("rule", ["most_visited", "highest_value"])
def test_walks_pass_through_nodes_of_several_parents(rule):
    """Node 3 hangs on 1 and, by an edge of its own, on 2, which has no child beside it."""
    structure = make_structure(jnp.asarray([3]), 8, num_parents=2)
    structure, _ = grow(structure, [0], 2, [0.2, 0.9])
    structure, _ = grow(structure, [1], 1, [0.5])
    edges = structure.more_parents.at[0, 3, 0].set(2)
    visits = structure.visits.at[0, 2].set(9.0)
    structure = dataclasses.replace(structure, more_parents=edges, visits=visits)
    check(structure)
    assert choose(structure, jnp.full((1, 8), -1), rule=rule).node[0] == 3


def test_a_bare_root_answers_with_itself():
    structure = make_structure(jnp.asarray([2]), 3)
    answer = choose(structure, jnp.full((1, 3), -1), "majority")
    assert int(answer.node[0]) == 0


def test_self_consistency_is_the_share_of_finished_solutions():
    votes = jnp.asarray([[7, 7, 9, 7, 0]], jnp.uint32)
    voters = jnp.asarray([[True, True, True, False, True]])
    share = self_consistency(jnp.asarray([[7, 9, 5, 0]], jnp.uint32), votes, voters)
    np.testing.assert_allclose(share, [[0.5, 0.25, 0, 0]], atol=1e-6)
    nobody = self_consistency(votes, votes, jnp.zeros_like(voters))
    np.testing.assert_array_equal(nobody, jnp.zeros((1, 5)))


def test_slots_follow_each_other_and_idle_lanes_get_none(tree):
    assert child_slots(tree, make_request([6, -1, 2], 1)).tolist() == [[[7], [10], [8]]]


def test_generate_keeps_a_duplicate_dead_but_on_record():
    structure = make_structure(jnp.asarray([4]), 5)
    structure, _ = grow(structure, [0], 2, [0.5, 0.7], length=[3, 3], duplicate=[False, True])
    assert structure.alive[0, :3].tolist() == [True, True, False]
    assert structure.visits[0, :3].tolist() == [0.0, 1.0, 0.0]
    assert int(structure.budget.generated_tokens[0]) == 6
    assert structure.span_start[0, 1:3].tolist() == [4, 4]


@pytest.mark.parametrize("visits", [0.0, 1.0])
def test_what_an_expander_does_not_know_is_zero_in_the_structure(visits):
    structure, _ = grow(make_structure(jnp.asarray([4]), 9), [0], 3, [0.5, 0.7, 0.1])
    request = make_request([2, -1, 3], 2)
    valid = jnp.asarray([[[True, True], [False, False], [True, False]]])
    known = {"logprob": jnp.asarray([[[-1.0, -2.0], [0.0, 0.0], [-3.0, -4.0]]])}
    some = make_outcome(valid, zero_budget(structure.num_nodes), **known)
    zeros = {name: getattr(some, name) for name in some.absent}
    whole = make_outcome(valid, some.cost, **known, **zeros)
    assert set(some.absent) - set(whole.absent) == set(zeros) == set(some.absent)
    prior = jnp.full(valid.shape, 0.5)
    pairs = zip(
        jax.tree.leaves_with_path(generate(structure, request, some, prior, visits=visits)),
        jax.tree.leaves(generate(structure, request, whole, prior, visits=visits)),
        strict=True,
    )
    for (path, found), expected in pairs:
        np.testing.assert_array_equal(found, expected, jax.tree_util.keystr(path))
    with pytest.raises(TypeError, match="lenght"):
        make_outcome(valid, some.cost, lenght=valid)


def test_steps_of_several_lanes_from_the_root_share_one_prior():
    nodes = jnp.asarray([[0, 0, -1], [3, 5, -1]])
    logprob = jnp.log(
        jnp.asarray([[[0.1, 0.2], [0.3, 0.9], [1, 1]], [[0.1, 0.3], [0.2, 0.2], [1, 1]]])
    )
    valid = jnp.asarray([[[1, 1], [1, 0], [0, 0]], [[1, 1], [1, 1], [0, 0]]], bool)
    prior = sibling_prior(nodes, logprob, jnp.ones(logprob.shape, jnp.int32), valid)
    expected = [
        [[1 / 6, 2 / 6], [3 / 6, 0], [0, 0]],
        [[0.25, 0.75], [0.5, 0.5], [0, 0]],
    ]
    np.testing.assert_allclose(prior, expected, atol=1e-6)


def test_changes_add_up_along_the_paths(tree):
    counts = add_to_paths(
        tree,
        jnp.zeros((1, 10), jnp.int32),
        jnp.asarray([[3, 5, -1, 1]]),
        jnp.asarray([[1, 2, 9, -1]]),
    )
    assert counts[0].tolist() == [2, 0, 2, 1, 0, 2, 0, 0, 0, 0]


def test_backtracks_are_steps_that_leave_the_path(tree):
    def leaves(before, node):
        args = (tree.parent, jnp.asarray([before]), jnp.asarray([node]))
        return bool(backtracks(*args)[0])

    assert not leaves(2, 6)
    assert not leaves(0, 6)
    assert leaves(1, 2)
    assert leaves(1, 6)
    assert leaves(6, 2)  # Back to its own parent.
    assert leaves(6, 0)
    assert not leaves(-1, 6)  # Nothing was grown before.
    assert not leaves(6, -1)  # Nothing is grown now.


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
    new = back_up(stats, [0], [0.0], [1], rule="td", discount=0.96, learning_rate=learning_rate)
    assert float(new.value[0, 0]) == pytest.approx(value, abs=1e-6)
    assert float(new.visits[0, 0]) == 5.0


@pytest.mark.parametrize("capacity", [9, 16])
def test_backups_count_the_last_children_of_a_full_structure_once(capacity):
    """The root has four children and all others two: the window of four ends behind the arena."""
    structure = make_structure(jnp.asarray([3]), capacity)
    structure, _ = grow(structure, [0, 0], 2, [0.1, 0.2, 0.3, 0.4])
    structure, _ = grow(structure, [2], 2, [0.0, 0.0])
    structure, _ = grow(structure, [1], 2, [0.0, 1.0])
    first = jnp.full((1, capacity), -1).at[0, :3].set(jnp.asarray([1, 7, 5]))
    backup = Backup(jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.zeros((1, 1), jnp.int32))
    structure, *_ = backpropagate(
        structure, first, first * 0, jnp.asarray([[1]]), backup, num_children=4, rule="weighted"
    )
    assert structure.value[0, 1] == 0.5


@pytest.mark.parametrize("capacity", [9, 16])
def test_no_node_looks_below_at_the_children_of_others(capacity):
    structure = make_structure(jnp.asarray([3]), capacity)
    structure, _ = grow(structure, [0, 0], 2, [0.1, 0.2, 0.3, 0.4])
    structure, _ = grow(structure, [1, 2], 2, [0.5, 0.6, 0.0, 1.0])
    cfg = TreeConfig(num_children=2, num_lanes=2, root_lanes=2)
    state = init_state(structure, jax.random.split(jax.random.key(0), 1), cfg=cfg)
    nodes = jnp.asarray([[0, 1, 2]])
    kids, siblings = look_below(state, structure, nodes, cfg, find_first(state, nodes))
    own = np.asarray(siblings.alive & (structure.depth[0, kids] > 0))
    assert [kids[0, lane][own[0, lane]].tolist() for lane in range(3)] == [
        [1, 2, 3, 4], [5, 6], [7, 8],
    ]  # fmt: skip
    weights = improve_prior(siblings, scale_q(siblings, value_scale=0.1, visit_offset=50.0))
    np.testing.assert_allclose(np.where(own, weights, 0).sum(-1), 1.0, rtol=1e-6)


def test_backups_by_maximum_and_with_rewards_and_discount(tree):
    stats = tree.replace(reward=tree.reward.at[0, 1:3].set(jnp.asarray([0.1, -0.2])))
    new = back_up(stats, [0], [0.0], [1], rule="max", discount=0.5)
    assert float(new.value[0, 0]) == pytest.approx(0.1 + 0.5 * 0.5)
    new = back_up(stats, [1], [0.7], [1], discount=0.5)
    # Node 1 held one visit of 0.5; its edge is worth 0.1 on the way up.
    assert float(new.value[0, 1]) == pytest.approx((0.5 + 0.7) / 2)
    assert float(new.value[0, 0]) == pytest.approx(0.1 + 0.5 * 0.7)
