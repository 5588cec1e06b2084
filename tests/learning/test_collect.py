"""What the rows of a searched structure teach, by hand: returns along paths and step weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.learning.collect import CollectConfig, collect_rows

PROMPT, ROOT, INNER, END = 3, 2, 3, 4  # Tokens of a prompt, and where the values of states stand.
LIKELY, UNLIKELY, DONE, OPEN = range(1, 5)
OPINIONS = {LIKELY: 0.6, UNLIKELY: 0.1, DONE: 0.5, OPEN: 0.3}
CFG = CollectConfig(
    num_paths=1,
    row_tokens=8,
    num_children=2,
    max_depth=3,
    min_visits=1.0,
    value_rule="weighted",
    discount=0.9,
)


@pytest.fixture(scope="module")
def rows(plant):
    """rows(**fields): the rows of two structures under a changed config.

    Both have a likely move of two children and an unlikely one. The likely move's best child, also
    the search's, ends a right solution in the first structure and is unfinished in the second.
    """

    def node(number, parent, visits, prior, **flags):
        statistics = {"visits": visits, "prior": prior, "model_value": OPINIONS[number]}
        return {"parents": [parent], **statistics, **flags}

    trees = [
        [
            {"parents": [], "visits": 4.0, "model_value": 0.4},
            node(LIKELY, 0, 3.0, 0.9),
            node(UNLIKELY, 0, 1.0, 0.1),
            node(DONE, LIKELY, 2.0, 0.9, terminal=terminal),
            node(OPEN, LIKELY, 1.0, 0.1),
        ]
        for terminal in (True, False)
    ]
    structure = plant(trees, capacity=5)
    depth = np.asarray(structure.depth)
    structure = dataclasses.replace(
        structure,
        proven=structure.terminal,
        span_start=jnp.asarray(np.where(depth > 0, PROMPT + depth - 1, 0), jnp.int32),
        span_length=jnp.asarray(np.where(depth > 0, 1, PROMPT), jnp.int32),
    )
    tokens = jnp.broadcast_to(10 + jnp.arange(5, dtype=jnp.int32)[:, None], (2, 5, 1))
    keys, prompts = jax.random.split(jax.random.key(0), 2), jnp.ones((2, PROMPT), jnp.int32)

    def collect(right=True, **fields):
        cfg = dataclasses.replace(CFG, **fields)
        judged = dataclasses.replace(structure, proven=structure.proven & right)
        found, _ = jax.jit(lambda *args: collect_rows(*args, cfg=cfg))(
            judged, tokens, prompts, keys
        )
        return jax.tree.map(np.asarray, found)

    return collect


@pytest.mark.parametrize(
    ("fields", "finished", "cut_off"),
    [
        # The outcome, one step discounted; where there is none, nothing is said.
        ({"path_rule": "monte_carlo"}, [0.9, 1.0, 1.0], None),
        # 0.9 of what the network thought of the next state, or the reward at the end.
        ({"path_rule": "n_step"}, [0.54, 1.0, 1.0], [0.54, 0.45]),
        ({"path_rule": "n_step", "path_steps": 2}, [0.9, 1.0, 1.0], [0.405, 0.45]),
        # Errors of one step: 0.54 - 0.4 and 1 - 0.6; or 0.14 and 0.45 - 0.6.
        (
            {"path_rule": "td_lambda", "path_trace": 0.5},
            [0.4 + 0.14 + 0.45 * 0.4, 1.0, 1.0],
            [0.4 + 0.14 - 0.45 * 0.15, 0.45],
        ),
    ],
)
def test_returns_along_a_path(rows, fields, finished, cut_off):
    found = rows(**fields)
    assert found.tokens[:, INNER : END + 1].tolist() == [[11, 13]] * 2
    places = slice(ROOT, END + 1)
    np.testing.assert_allclose(found.value_target[0, places], finished, atol=1e-6)
    assert found.value_weight[0, places].tolist() == [1.0, 1.0, 1.0]
    expected = [0.0, 0.0, 0.0] if cut_off is None else [1.0, 1.0, 0.0]
    assert found.value_weight[1, places].tolist() == expected
    if cut_off is not None:
        np.testing.assert_allclose(found.value_target[1, ROOT : INNER + 1], cut_off, atol=1e-6)
    assert found.value_weight.sum() == 3.0 + sum(expected)


def test_steps_are_weighed_by_their_advantages(rows):
    """Q - V of each edge in the tree, both means by visits."""
    found = rows(policy_weight="advantage", advantage_scale=0.5)
    inner = (2 * 1.0 + 1 * 0.9 * 0.3) / 3
    root = (3 * 0.9 * inner + 1 * 0.9 * 0.1) / 4
    advantages = np.array([0.9 * inner - root, 1.0 - inner])
    np.testing.assert_allclose(
        found.loss_weight[0, INNER : END + 1], np.exp(advantages / 0.5), rtol=1e-5
    )
    alike = rows()
    assert alike.loss_weight[0, INNER : END + 1].tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(alike.soft_weights, found.soft_weights)


def test_every_other_path_leads_to_a_node_that_was_searched(rows):
    """The likely move alone has visited children, and is no end."""
    found = rows(num_paths=2)
    best, other = (jax.tree.map(lambda array, i=i: array[i::2], found) for i in (0, 1))
    assert best.tokens[:, INNER : END + 1].tolist() == [[11, 13]] * 2
    assert other.tokens[:, INNER].tolist() == [11] * 2
    assert other.segments[:, INNER : END + 1].tolist() == [[1, 0]] * 2
    for field in ("value_target", "value_weight", "loss_weight"):
        places = slice(ROOT, INNER + 1)
        np.testing.assert_array_equal(
            getattr(other, field)[:, places], getattr(best, field)[:, places]
        )


def test_nodes_that_were_searched_are_drawn_evenly(plant):
    """Of four moves three have a visited child; the other one, the likeliest, ends a solution."""
    moves = [{"parents": [0], "visits": float(n), "prior": 0.25} for n in (9, 1, 2, 3)]
    ends = [{"parents": [n], "visits": 1.0, "prior": 1.0} for n in (2, 3, 4)]
    moves[0]["terminal"] = True
    structure = plant([[{"parents": [], "visits": 16.0}, *moves, *ends]] * 32, capacity=8)
    depth = np.asarray(structure.depth)
    structure = dataclasses.replace(
        structure,
        span_start=jnp.asarray(np.where(depth > 0, PROMPT + depth - 1, 0), jnp.int32),
        span_length=jnp.asarray(np.where(depth > 0, 1, PROMPT), jnp.int32),
    )
    tokens = jnp.broadcast_to(10 + jnp.arange(8, dtype=jnp.int32)[:, None], (32, 8, 1))
    cfg = dataclasses.replace(CFG, num_paths=4)
    keys, prompts = jax.random.split(jax.random.key(1), 32), jnp.ones((32, PROMPT), jnp.int32)
    found, _ = jax.jit(lambda *args: collect_rows(*args, cfg=cfg))(structure, tokens, prompts, keys)
    drawn, counts = np.unique(np.asarray(found.tokens)[1::2, INNER], return_counts=True)
    assert drawn.tolist() == [12, 13, 14]
    assert counts.sum() == 64
    assert counts.min() > 8


def collect_of(plant, nodes, tokens, **fields):
    """Rows of one structure of steps of two tokens."""
    structure = plant([nodes], capacity=len(nodes))
    depth = np.asarray(structure.depth)
    structure = dataclasses.replace(
        structure,
        proven=structure.terminal,
        span_start=jnp.asarray(np.where(depth > 0, PROMPT + 2 * (depth - 1), 0), jnp.int32),
        span_length=jnp.asarray(np.where(depth > 0, 2, PROMPT), jnp.int32),
    )
    cfg = dataclasses.replace(CFG, num_paths=1, num_children=4, row_tokens=12, **fields)
    keys, prompts = jax.random.split(jax.random.key(0), 1), jnp.ones((1, PROMPT), jnp.int32)
    return collect_rows(structure, jnp.asarray([tokens], jnp.int32), prompts, keys, cfg=cfg)[0]


def test_a_word_that_siblings_share_is_one_label(plant):
    """Four equally good moves begin with one word: a policy that knows that has no loss."""
    moves = [{"parents": [0], "visits": 1.0, "prior": 0.25} for _ in range(4)]
    moves[0]["terminal"] = True
    tokens = [[0, 0], [7, 1], [7, 2], [7, 3], [8, 4]]
    found = collect_of(plant, [{"parents": [], "visits": 5.0}, *moves], tokens)
    ids, weights = found.soft_ids[0, PROMPT], found.soft_weights[0, PROMPT]
    assert ids[weights > 0].tolist() == [7, 8]
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
    assert (found.soft_weights[0, PROMPT + 1] > 0).sum() == 3


def test_no_path_ends_in_a_node_that_nobody_judged(plant):
    """Judged on visit: the likelier move has had none, and no value to end a path with."""
    moves = [
        {"parents": [0], "visits": 0.0, "prior": 0.9},
        {"parents": [0], "visits": 2.0, "prior": 0.1, "model_value": 0.6},
    ]
    nodes = [{"parents": [], "visits": 3.0, "model_value": 0.5}, *moves]
    found = collect_of(plant, nodes, [[0, 0], [7, 1], [8, 2]], path_rule="td_lambda")
    assert found.tokens[0, PROMPT : PROMPT + 2].tolist() == [8, 2]


@pytest.mark.parametrize("nodes", ["finished", "proven"])
def test_only_what_leads_to_a_solution_teaches_where_that_is_wanted(rows, nodes):
    found, all_teach = rows(policy_nodes=nodes), rows()
    assert found.tokens[:, INNER : END + 1].tolist() == [[11, 13]] * 2
    assert found.loss_weight[:, INNER : END + 1].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert not found.loss_weight[1].any()
    wrong = rows(right=False, policy_nodes=nodes)
    assert wrong.loss_weight.any() == (nodes == "finished")
    # Values do, as ever.
    np.testing.assert_array_equal(found.value_target, all_teach.value_target)
    np.testing.assert_array_equal(found.value_weight, all_teach.value_weight)
    assert found.value_weight[1].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path_rule": "td"}, "path_rule 'td'"),
        ({"policy_weight": "q"}, "policy_weight 'q'"),
        ({"policy_nodes": "best"}, "policy_nodes 'best'"),
        ({"path_steps": 0}, "path_steps must be >= 1"),
        ({"path_trace": 1.5}, "path_trace=1.5"),
        ({"discount": 0.0}, "discount=0.0"),
        ({"advantage_scale": 0.0}, "advantage_scale must be a number > 0"),
        ({"value_rule": "best"}, "'best'"),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CollectConfig(**fields)
