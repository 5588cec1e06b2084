"""Cached, paged and tree decoding against the full forward of every path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.inference.decode import decode_steps
from rlm_jax.inference.extend import extend, last_hidden, score_tokens, yes_probability
from rlm_jax.inference.pages import (
    gather_paths,
    gather_prompts,
    make_pages,
    pages_for_search,
    write_prompts,
    write_steps,
)
from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.models.attention import make_dense_attend
from rlm_jax.models.presets import TINY_LLAMA
from rlm_jax.models.transformer import forward, unembed
from rlm_jax.text.answers import init_answer_state

PAGE, SLOTS, CAPACITY = 4, 8, 16
PROMPT_LENGTHS = (7, 12)
PARENTS = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3}


@functools.cache
def _dense(cfg):
    def run(params, tokens, mask):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        attend = make_dense_attend(cfg, key_mask=mask)
        hidden, _ = forward(params, tokens, positions, cfg=cfg, attend=attend)
        return hidden, jax.nn.log_softmax(unembed(params, hidden, cfg=cfg), -1)

    return jax.jit(run)


def dense(params, cfg, ids, width=48):
    """Hidden states and log-probabilities of one path by the reference, no cache anywhere."""
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    hidden, logprobs = _dense(cfg)(params, tokens, np.arange(width)[None] < len(ids))
    return np.asarray(hidden)[0, : len(ids)], np.asarray(logprobs)[0, : len(ids)]


def prompts(seed=0):
    rng = np.random.default_rng(seed)
    tokens = np.zeros((len(PROMPT_LENGTHS), 12), np.int32)
    for row, length in enumerate(PROMPT_LENGTHS):
        tokens[row, :length] = rng.integers(32, 120, length)
    return jnp.asarray(tokens), jnp.asarray(PROMPT_LENGTHS, jnp.int32)


@pytest.fixture(scope="module")
def grown(tiny, rules):
    """Two trees of three levels grown page by page, each level in one decode.

    Level one: two children of each root. Level two: two of node 2. Level three: two of node 3.
    """
    params, cfg = tiny
    tokens, lengths = prompts()
    done = jax.jit(functools.partial(extend, cfg=cfg))(params, tokens, lengths)
    pages = make_pages(
        cfg,
        jnp.asarray(lengths),
        num_nodes=CAPACITY,
        num_pages=pages_for_search(12, CAPACITY, 60, 60, PAGE),
        num_prompt_pages=3,
        num_path_pages=8,
        page_tokens=PAGE,
        dtype=jnp.float32,
    )
    pages = write_prompts(pages, jnp.arange(2), done.caches, lengths)
    hidden = np.zeros((2, CAPACITY, cfg.model_dim), np.float32)
    hidden[:, 0] = last_hidden(done.hidden, jnp.asarray(lengths))
    paths = {(b, 0): [int(t) for t in tokens[b, : lengths[b]]] for b in range(2)}
    logprobs = {}
    levels = [([0], [1, 2], [6, 3]), ([2], [3, 4], [5, 4]), ([3], [5, 6], [6, 2])]
    for level, (parents, slots, limits) in enumerate(levels):
        pages, hidden = _grow(
            tiny, rules, pages, hidden, paths, logprobs, parents[0], slots, limits, level
        )
    return pages, hidden, paths, logprobs


@functools.cache
def _decode(cfg, num_siblings):
    settings = {"cfg": cfg, "num_siblings": num_siblings, "num_slots": SLOTS}
    return jax.jit(
        functools.partial(decode_steps, sampling=SamplingConfig(temperature=2.0), **settings)
    )


_write_steps = jax.jit(write_steps)
_gather_contexts = jax.jit(lambda pages, nodes: (gather_prompts(pages), gather_paths(pages, nodes)))


def _grow(tiny, rules, pages, hidden, paths, logprobs, parent, slots, limits, level):
    params, cfg = tiny
    num = len(slots)
    contexts = _gather_contexts(pages, np.full((2, 1), parent))
    starts = np.repeat([len(paths[b, parent]) for b in range(2)], num).astype(np.int32)
    steps = _decode(cfg, num)(
        params,
        jax.random.split(jax.random.key(level), 2 * num),
        np.repeat(hidden[:, parent], num, axis=0),
        init_answer_state(jnp.zeros(2 * num, jnp.int32)),
        contexts=contexts,
        starts=starts,
        limits=np.array(limits * 2, np.int32),
        rule=rules[0],
        answer_rule=rules[1],
    )
    pages = _write_steps(
        pages,
        steps.caches,
        parents=np.full((2, num), parent),
        slots=np.array([slots] * 2),
        starts=starts.reshape(2, num),
        lengths=steps.length.reshape(2, num),
        keep=np.ones((2, num), bool),
    )
    steps = jax.device_get(steps)
    hidden = hidden.copy()
    for b in range(2):
        for k, slot in enumerate(slots):
            row = b * num + k
            hidden[b, slot] = steps.hidden[row]
            new = [int(t) for t in steps.tokens[row, : steps.length[row]]]
            paths[b, slot] = paths[b, parent] + new
            logprobs[b, slot] = float(steps.logprob[row])
            assert 1 <= len(new) <= limits[k]
    return pages, hidden


def test_every_node_of_a_tree_equals_the_full_forward_of_its_path(tiny, grown):
    params, cfg = tiny
    _, hidden, paths, logprobs = grown
    for (b, node), ids in paths.items():
        states, table = dense(params, cfg, ids)
        np.testing.assert_allclose(hidden[b, node], states[-1], atol=1e-4)
        if node:
            parent = PARENTS[node]
            begin = len(paths[b, parent])
            steps = [table[t - 1, ids[t]] for t in range(begin, len(ids))]
            np.testing.assert_allclose(logprobs[b, node], sum(steps), atol=1e-4)


def test_extending_a_node_equals_the_full_forward_at_every_position(tiny, grown):
    params, cfg = tiny
    pages, _, paths, _ = grown
    suffix = jnp.asarray([[72, 105, 33, 10, 65], [66, 67, 68, 0, 0]], jnp.int32)
    lengths = jnp.asarray([5, 3], jnp.int32)
    nodes = jnp.asarray([[5], [4]])
    starts = jnp.asarray([len(paths[0, 5]), len(paths[1, 4])], jnp.int32)
    longest = int(pages.table_length[jnp.arange(2), nodes[:, 0]].max())
    assert longest in (4, 5)
    for num_pages in (longest, None):
        contexts = (gather_prompts(pages), gather_paths(pages, nodes, num_pages))
        run = jax.jit(functools.partial(extend, cfg=cfg))
        done = run(params, suffix, lengths, contexts=contexts, starts=starts)
        for row, node in enumerate((5, 4)):
            states, _ = dense(params, cfg, paths[row, node] + suffix[row, : lengths[row]].tolist())
            mine = np.asarray(done.hidden)[row, : lengths[row]]
            np.testing.assert_allclose(mine, states[starts[row] :], atol=1e-4)


def test_pages_hold_what_the_nodes_need_and_no_more(grown):
    pages, _, paths, _ = grown
    for b in range(2):
        own = [len(paths[b, n]) - len(paths[b, p]) for n, p in PARENTS.items()]
        first = b * pages.pages_per_structure
        owner = np.asarray(pages.owner)[first : first + pages.pages_per_structure]
        in_use = np.flatnonzero(owner >= 0)
        assert len(in_use) == 3 + sum(-(-n // PAGE) for n in own)
        listed = np.asarray(pages.table[b])
        assert set(listed[listed >= 0] - first) | set(range(3)) == set(in_use)
        fill = np.asarray(pages.fill)[first + in_use]
        assert fill.sum() == PROMPT_LENGTHS[b] + sum(own)


def test_scores_equal_the_full_forward(tiny):
    params, cfg = tiny
    rng = np.random.default_rng(3)
    tokens = jnp.asarray(rng.integers(0, 200, (2, 70)), jnp.int32)
    lengths = jnp.asarray([70, 41], jnp.int32)
    scores = jax.jit(functools.partial(score_tokens, cfg=cfg, num_top=3))(params, tokens, lengths)
    for row in range(2):
        ids = tokens[row, : lengths[row]]
        _, table = dense(params, cfg, ids, width=70)
        expected = [0.0] + [table[t - 1, ids[t]] for t in range(1, len(ids))]
        mine = np.asarray(scores.logprobs)[row, : len(ids)]
        np.testing.assert_allclose(mine, expected, atol=1e-4)
        best = np.sort(table, -1)[:, ::-1][:-1, :3]
        mine = np.asarray(scores.top_logprobs)[row, 1 : len(ids)]
        np.testing.assert_allclose(mine, best, atol=1e-4)


def test_yes_probability_compares_both_words(tiny):
    params, cfg = tiny
    hidden = jax.random.normal(jax.random.key(5), (3, cfg.model_dim))
    value = yes_probability(params, hidden, jnp.asarray([89, 121]), jnp.asarray([78]), cfg=cfg)
    probs = np.asarray(jax.nn.softmax(unembed(params, hidden, cfg=cfg)), np.float64)
    yes, no = probs[:, [89, 121]].sum(-1), probs[:, 78]
    np.testing.assert_allclose(value, yes / (yes + no), atol=1e-5)


@st.composite
def batches_of_steps(draw):
    """Rounds of (parent, length, keep) for three new steps each, for two structures."""
    rounds = draw(st.integers(1, 4))
    steps = st.tuples(st.integers(0, 100), st.integers(0, SLOTS), st.booleans())
    return [[[draw(steps) for _ in range(3)] for _ in range(2)] for _ in range(rounds)]


@settings(max_examples=25, deadline=None)
@given(batches_of_steps())
def test_writes_and_tables_equal_a_plain_model(rounds):
    """Random steps under random nodes: what a gather finds is what was written, in order."""
    rng = np.random.default_rng(0)
    groups, width = TINY_LLAMA.num_kv_heads, TINY_LLAMA.head_dim
    pages = _empty_pages()
    content = {(b, 0): ([], []) for b in range(2)}
    num_nodes = 1
    for steps in rounds:
        fresh = rng.normal(size=(6, groups, SLOTS, 2 * width)).astype(np.float32)
        parents = np.zeros((2, 3), np.int32)
        starts, lengths = np.zeros((2, 3), np.int32), np.zeros((2, 3), np.int32)
        keep = np.zeros((2, 3), bool)
        slots = np.broadcast_to(num_nodes + np.arange(3, dtype=np.int32), (2, 3))
        for b in range(2):
            for c, (parent, length, kept) in enumerate(steps[b]):
                parents[b, c] = parent % num_nodes
                above, positions = content[b, parents[b, c]]
                starts[b, c] = 12 + (positions[-1] - 11 if positions else 0)
                lengths[b, c], keep[b, c] = length, kept
                own = [fresh[b * 3 + c, :, t] for t in range(length)] if kept else []
                places = [starts[b, c] + t for t in range(len(own))]
                content[b, num_nodes + c] = (above + own, positions + places)
        pages = _write(pages, fresh, parents, slots, starts, lengths, keep)
        num_nodes += 3
    for (b, node), (values, positions) in content.items():
        context = _gather(pages, jnp.full((2, 1), node))
        valid = np.asarray(context.valid[b])
        assert np.asarray(context.positions[b])[valid].tolist() == positions
        keys = np.asarray(context.keys[1][b]).transpose(2, 0, 1)
        both = np.concatenate([keys, np.asarray(context.values[1][b]).transpose(1, 0, 2)], axis=-1)
        found = both[valid]
        np.testing.assert_array_equal(found, np.asarray(values).reshape(-1, groups, 2 * width))


@functools.partial(jax.jit, donate_argnums=0)
def _write(pages, fresh, parents, slots, starts, lengths, keep):
    layers = (fresh, fresh)
    return write_steps(
        pages,
        layers,
        parents=parents,
        slots=slots,
        starts=starts,
        lengths=lengths,
        keep=keep,
    )


_gather = jax.jit(gather_paths)


def _empty_pages():
    return make_pages(
        TINY_LLAMA,
        jnp.zeros(2, jnp.int32),
        num_nodes=13,
        num_pages=pages_for_search(12, 13, SLOTS, 12 * SLOTS, PAGE),
        num_prompt_pages=3,
        num_path_pages=4 * SLOTS // PAGE,
        page_tokens=PAGE,
        dtype=jnp.float32,
    )
