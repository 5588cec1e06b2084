"""A running search over a language model: rows handed on, subtrees kept, pages freed, visits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_language import (
    LIMIT,
    PROMPTS,
    assert_same,
    check,
    dense,
    encode,
    keys_of,
    language,
    search,
)

from rlm_jax.reasoning.drive import advance, replace_rows, run_compiled, start
from rlm_jax.reasoning.language import admit, begin, keep_world, make_expand, make_world
from rlm_jax.reasoning.operators.structure import keep_subtree, prune
from rlm_jax.reasoning.strategies import gumbel, puct
from rlm_jax.reasoning.structure import path_to_root

PUCT = puct.make_puct(num_children=3, num_lanes=2, max_depth=4)


@functools.cache
def go_on(config):
    """Grows any structures by PUCT, as far as their budgets go."""
    return jax.jit(functools.partial(run_compiled, PUCT, make_expand(config)))


def pages_in_use(world, row):
    owner = np.asarray(world.pages.owner).reshape(len(world.prompt_length), -1)[row]
    return set(np.flatnonzero(owner >= 0).tolist())


def pages_reachable(structure, world, row):
    """Prompt pages, and every page that the table of a living node lists."""
    pages = world.pages
    base = row * pages.pages_per_structure
    listed = np.asarray(pages.table[row])[np.asarray(structure.alive[row])]
    prompt = np.asarray(pages.prompt_table[row]).tolist()
    return {int(page) - base for page in [*listed[listed >= 0].tolist(), *prompt]}


def assert_no_page_leaks(structure, world):
    for row in range(len(world.prompt_length)):
        assert pages_in_use(world, row) == pages_reachable(structure, world, row)


def test_pages_in_use_are_pages_reachable_after_a_prune(model):
    lm, cfg = model
    structure, world = search(model, PUCT)
    assert_no_page_leaks(structure, world)
    before = [len(pages_in_use(world, row)) for row in range(len(PROMPTS))]
    first = (structure.parent == 0) & structure.alive
    doomed = first & (jnp.cumsum(first, -1) == 1)
    structure = prune(structure, doomed)
    check(structure)
    # The budget is spent: give it some more and let the search go on, on the pages that came free.
    config = language(cfg)
    structure = structure.replace(
        token_limit=structure.token_limit + 9,
        num_nodes=structure.num_nodes,
    )
    structure, world = go_on(config)(lm, keys_of(PROMPTS), world, structure)
    check(structure)
    assert_no_page_leaks(structure, world)
    after = [len(pages_in_use(world, row)) for row in range(len(PROMPTS))]
    assert sum(after) < sum(before) + 4 * len(PROMPTS)


def test_a_kept_subtree_goes_on_where_it_was(model):
    """Reuse: the chosen child becomes the root, with its pages, and grows as its path demands."""
    lm, cfg = model
    config = language(cfg)
    structure, world = search(model, PUCT)
    inner = structure.alive & (structure.parent == 0) & ~structure.terminal
    nodes = jnp.argmax(jnp.where(inner, structure.visits, -1.0), -1).astype(jnp.int32)
    texts = [
        [
            np.asarray(world.tokens[row, n, : int(structure.span_length[row, n])]).tolist()
            for n in path_to_root(structure, row, int(nodes[row]))[1:]
        ]
        for row in range(len(PROMPTS))
    ]

    @jax.jit
    def keep(structure, world):
        kept, order = keep_subtree(structure, nodes)
        return kept, keep_world(world, nodes, order, cfg=config)

    kept, moved = keep(structure, world)
    check(kept)
    assert_no_page_leaks(kept, moved)
    assert (np.asarray(kept.num_nodes) < np.asarray(structure.num_nodes)).any()
    kept = kept.replace(token_limit=kept.token_limit + 24)
    grown, moved = go_on(config)(lm, keys_of(PROMPTS), moved, kept)
    check(grown)
    assert_no_page_leaks(grown, moved)
    gaps = []
    for row, prompt in enumerate(PROMPTS):
        above = list(prompt.encode()) + [token for step in texts[row] for token in step]
        for node in range(int(kept.num_nodes[row]), int(grown.num_nodes[row])):
            if not grown.alive[row, node]:
                continue
            ids = list(above)
            for step in path_to_root(grown, row, node)[1:]:
                ids += np.asarray(
                    moved.tokens[row, step, : int(grown.span_length[row, step])]
                ).tolist()
            _, logprobs = dense(model, ids)
            begin_at = int(grown.span_start[row, node])
            step = sum(logprobs[t - 1, ids[t]] for t in range(begin_at, len(ids)))
            gaps.append(abs(float(grown.logprob[row, node]) - step))
    assert len(gaps) > 3
    assert max(gaps) < 1e-4


def test_subtrees_are_kept_again_and_again(model):
    """Each time the root's path is longer, and its pages are nobody else's."""
    lm, cfg = model
    rule = lm.step_rule
    never = rule.replace(ends_alone=rule.ends_alone & False, final=rule.final & False)
    lm = dataclasses.replace(lm, step_rule=never)
    sizes = {"num_nodes": 8, "max_depth": 12, "max_new_tokens": 400}
    config = dataclasses.replace(language(cfg, "confidence"), **sizes)
    strategy = puct.make_puct(num_children=3, max_depth=12, resample=False)
    grow = jax.jit(functools.partial(run_compiled, strategy, make_expand(config)))
    limits = jnp.full(len(PROMPTS), 400, jnp.int32)
    structure, world = begin(lm, *encode(PROMPTS), limits, cfg=config)

    @jax.jit
    def keep(structure, world):
        inner = structure.alive & (structure.parent == 0)
        nodes = jnp.argmax(jnp.where(inner, structure.visits, -1.0), -1).astype(jnp.int32)
        kept, order = keep_subtree(structure, nodes)
        return kept, keep_world(world, nodes, order, cfg=config)

    for _ in range(5):
        structure, world = grow(lm, keys_of(PROMPTS), world, structure)
        check(structure)
        assert_no_page_leaks(structure, world)
        for row in range(len(PROMPTS)):
            own = []
            for node in np.flatnonzero(structure.alive[row]):
                above = int(structure.parent[row, node])
                lead = int(world.pages.table_length[row, above]) if above >= 0 else 0
                listed = np.asarray(world.pages.table[row, node])
                own += listed[lead:][listed[lead:] >= 0].tolist()
            assert len(own) == len(set(own)) > 0
        structure, world = keep(structure, world)
    without = dataclasses.replace(config, keeps_subtrees=False)
    with pytest.raises(ValueError, match="keeps_subtrees=False: accepted is True"):
        keep_world(world, structure.num_nodes * 0, structure.parent, cfg=without)


@pytest.mark.slow
def test_a_row_handed_on_searches_as_if_it_were_alone(model):
    lm, cfg = model
    config = language(cfg)
    strategy = gumbel.make_gumbel(
        num_simulations=4, num_children=3, num_lanes=2, root_lanes=1, max_depth=4
    )
    tokens, lengths = encode(PROMPTS)

    @jax.jit
    def open_search(lm, keys):
        structure, world = make_world(lm, jnp.zeros(2, jnp.int32), tokens.shape[1], cfg=config)
        return start(strategy, keys, world, structure)

    @functools.partial(jax.jit, donate_argnums=1)
    def hand_on(lm, search, rows, keys, tokens, lengths):
        structure, world = admit(
            lm, search.structure, search.world, rows, tokens, lengths, LIMIT, cfg=config
        )
        return replace_rows(strategy, search, rows, keys, structure, world)

    @functools.partial(jax.jit, donate_argnums=1)
    def go_on(lm, search, max_rounds):
        return advance(strategy, make_expand(config), lm, search, max_rounds=max_rounds)

    running = open_search(lm, keys_of(PROMPTS[:2]))
    assert not np.asarray(running.running).any()
    # Row 1 is handed on in the middle of row 0's search, then row 0 itself.
    for rows, places, rounds in (([0, 1], [0, 1], 2), ([2, 1], [3, 2], 99), ([0, 2], [3, 0], 99)):
        at = jnp.asarray(places)
        running = hand_on(
            lm,
            running,
            jnp.asarray(rows),
            keys_of([PROMPTS[place] for place in places]),
            tokens[at],
            lengths[at],
        )
        running = go_on(lm, running, rounds)
        check(running.structure)
        assert_no_page_leaks(running.structure, running.world)
    together, _ = search(model, strategy)
    for row, place in ((1, 2), (0, 3)):
        assert_same(
            jax.tree.map(lambda a, row=row: a[row], running.structure),
            jax.tree.map(lambda a, place=place: a[place], together),
            exact=False,
        )


@pytest.mark.parametrize(
    "evaluator",
    [
        "value_head",
        pytest.param("likelihood", marks=pytest.mark.slow),
        pytest.param("p_yes", marks=pytest.mark.slow),
    ],
)
def test_judging_on_visit_gives_the_values_of_judging_at_expansion(model, evaluator):
    lm, cfg = model
    strategy = puct.make_puct(num_children=3, num_lanes=2, max_depth=4, judge="visit")
    structure, _ = search(model, strategy, evaluator=evaluator, judge="visit")
    visited = np.asarray(structure.visits > 0) & (np.arange(structure.capacity) > 0)
    assert visited.sum() > 8
    config = language(cfg, evaluator)
    start_fn = jax.jit(functools.partial(begin, cfg=config))
    made, world = start_fn(lm, *encode(PROMPTS), jnp.full(len(PROMPTS), LIMIT, jnp.int32))
    # The root's children are the same steps under either rule: the same keys made them.
    strategy = puct.make_puct(num_children=3, num_lanes=2, max_depth=1, resample=False)
    run = functools.partial(run_compiled, strategy, make_expand(config))
    at_once, _ = jax.jit(run)(lm, keys_of(PROMPTS), world, made)
    for row in range(len(PROMPTS)):
        for node in (1, 2, 3):
            if visited[row, node]:
                np.testing.assert_allclose(
                    structure.model_value[row, node], at_once.model_value[row, node], atol=1e-5
                )
