"""A search on eight simulated devices: the same structures as on one, and nobody talks."""

import collections
import dataclasses
import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_language import make_model

from rlm_jax.core.mesh import make_mesh
from rlm_jax.inference.extend import extend
from rlm_jax.inference.pages import path_buckets
from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.models.params import param_axes
from rlm_jax.models.presets import preset
from rlm_jax.models.transformer import unembed
from rlm_jax.reasoning.drive import run_compiled
from rlm_jax.reasoning.language import LanguageConfig, begin, make_expand
from rlm_jax.reasoning.sharding import (
    abstract_outputs,
    place_batch,
    place_params,
    shard_search,
)
from rlm_jax.reasoning.strategies import best_of_n, puct
from rlm_jax.reasoning.structure import check

BATCH, WIDTH, LIMIT = 8, 24, 48
MESHES = {"data": (2, 4, 1), "model": (1, 4, 2)}
STRATEGIES = {
    "puct": puct.make_puct(num_children=3, num_lanes=2, max_depth=3),
    "best_of_n": best_of_n.make_best_of_n(3, 3),
}
# Trees on the mesh that splits the batch, by both its axes; chains where the model is split too.
STRATEGY_OF = {"data": "puct", "model": "best_of_n"}


def _model():
    lm, cfg = make_model()
    return dataclasses.replace(lm, value_head=None, judge=None), cfg


@functools.cache
def programs(name):
    """Parameters, functions and inputs of a search: `begin`, the search, and its answer."""
    lm, cfg = _model()
    config = LanguageConfig(
        model=cfg,
        sampling=SamplingConfig(temperature=1.5),
        num_nodes=16,
        max_depth=3,
        max_new_tokens=LIMIT,
        page_tokens=4,
    )
    strategy = STRATEGIES[name]
    expand = make_expand(config)

    def begin_batch(lm, prompts, lengths, limits):
        return begin(lm, prompts, lengths, limits, cfg=config)

    def search(lm, keys, world, structure):
        structure, world = run_compiled(strategy, expand, lm, keys, world, structure)
        ids = structure.answer_key.astype(jnp.int32)
        return structure, world, strategy.answer(structure, jnp.where(structure.terminal, ids, -1))

    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.integers(1, 200, (BATCH, WIDTH)), jnp.int32)
    lengths = jnp.asarray(rng.integers(1, WIDTH + 1, BATCH), jnp.int32)
    limits = jnp.asarray([LIMIT] * (BATCH - 2) + [9, 0], jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(BATCH))
    return lm, cfg, begin_batch, search, keys, (prompts, lengths, limits)


@functools.cache
def on_one_device(name):
    lm, _, begin_batch, search, keys, inputs = programs(name)
    structure, world = jax.jit(begin_batch)(lm, *inputs)
    return jax.device_get(jax.jit(search)(lm, keys, world, structure))


@functools.cache
def on_mesh(mesh_name):
    """The compiled programs of a mesh, and what they gave."""
    lm, cfg, begin_batch, search, keys, inputs = programs(STRATEGY_OF[mesh_name])
    mesh = make_mesh(*MESHES[mesh_name])
    params = place_params(mesh, lm, policy=param_axes(cfg, mesh.shape["model"]))
    inputs = place_batch(mesh, inputs)
    begin_fn = jax.jit(shard_search(begin_batch, mesh)).lower(params, *inputs).compile()
    structure, world = abstract_outputs(begin_fn)
    keys = place_batch(mesh, keys)
    search_fn = jax.jit(shard_search(search, mesh), donate_argnums=2)
    search_fn = search_fn.lower(params, keys, world, structure).compile()
    structure, world = begin_fn(params, *inputs)
    pools = world.pages.pools
    addresses = [
        shard.data.unsafe_buffer_pointer() for a in pools for shard in a.addressable_shards
    ]
    result = search_fn(params, keys, world, structure)
    pools = result[1].pages.pools
    after = [shard.data.unsafe_buffer_pointer() for a in pools for shard in a.addressable_shards]
    return begin_fn, search_fn, jax.device_get(result), (addresses, after), world


@pytest.mark.parametrize("mesh_name", MESHES)
def test_one_device_and_eight_give_equal_structures(mesh_name):
    structure, _, answer = on_mesh(mesh_name)[2]
    check(structure)
    expected, _, voted = on_one_device(STRATEGY_OF[mesh_name])
    leaves = jax.tree_util.tree_flatten_with_path((structure, answer))[0]
    for (path, got), want in zip(leaves, jax.tree.leaves((expected, voted)), strict=True):
        name = jax.tree_util.keystr(path)
        if got.dtype == np.float32:
            np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(got, want, err_msg=name)
    assert (structure.num_nodes[:-2] > 4).all()
    assert structure.num_nodes[-1] == 1


def test_world_rows_are_equal_too():
    """Tokens are; page numbers count from each shard's own pool, and stay inside it."""
    _, world, _ = on_mesh("data")[2]
    _, expected, _ = on_one_device("puct")
    np.testing.assert_array_equal(world.tokens, expected.tokens)
    np.testing.assert_allclose(world.hidden, expected.hidden, atol=1e-5)
    per_shard = world.pages.fill.shape[0] // 8
    assert world.pages.table.max() < per_shard < expected.pages.table.max()


def test_shards_of_a_batch_do_not_talk():
    begin_fn, search_fn, *_ = on_mesh("data")
    assert hlo.collectives(begin_fn.as_text()) == []
    assert hlo.collectives(search_fn.as_text()) == []


def test_a_split_model_talks_inside_its_group_and_no_more_than_one_forward():
    begin_fn, search_fn, _, _, world = on_mesh("model")
    lm, cfg, _, _, _, (prompts, lengths, _) = programs("best_of_n")
    mesh = make_mesh(*MESHES["model"])

    def one_token(lm, tokens, lengths):
        hidden = extend(lm.policy, tokens, lengths, cfg=cfg).hidden
        return unembed(lm.policy, hidden[:, 0], cfg=cfg)

    params = place_params(mesh, lm, policy=param_axes(cfg, 2))
    forward = jax.jit(shard_search(one_token, mesh)).lower(params, prompts[:, :1], lengths)
    own = hlo.collectives(forward.compile().as_text())
    pairs = tuple((device, device + 1) for device in range(0, 8, 2))
    assert own == [("all-reduce", pairs)] * (2 * cfg.num_layers)
    assert hlo.collectives(begin_fn.as_text()) == own
    loops = len(path_buckets(world.pages))
    found = collections.Counter(hlo.collectives(search_fn.as_text()))
    assert found == {("all-reduce", pairs): loops * len(own)}


@pytest.mark.parametrize("mesh_name", MESHES)
def test_pools_are_donated_and_written_in_place(mesh_name):
    _, search_fn, (_, world, _), (before, after), _ = on_mesh(mesh_name)
    assert after == before
    replica, data, model = MESHES[mesh_name]
    pool_bytes = world.pages.pools[0].nbytes // (replica * data * model)
    inside = hlo.loop_instructions(search_fn.as_text())
    assert any(one.op == "dynamic-update-slice" for one in inside)
    assert max((one.largest_bytes for one in hlo.copies(inside)), default=0) < pool_bytes
    pools_bytes = pool_bytes * len(world.pages.pools)
    assert search_fn.memory_analysis().alias_size_in_bytes >= pools_bytes
    assert hlo.host_transfers(search_fn.as_text()) == []


def test_pools_of_a_split_model_hold_their_own_heads():
    *_, world = on_mesh("model")
    pool = world.pages.pools[0]
    assert np.prod(pool.sharding.shard_shape(pool.shape)) * 8 == np.prod(pool.shape)


def test_the_reader_finds_collectives_loops_and_copies():
    """On a program that has them: a global sum in a loop, whose carry is swapped."""
    mesh = make_mesh(data=4, model=2)

    def run(x, y):
        def body(carry):
            i, x, y = carry
            return i + 1, y + x.sum(), x

        return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, x, y))

    rows = NamedSharding(mesh, PartitionSpec(("replica", "data")))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=rows)
    text = jax.jit(run).lower(x, x).compile().as_text()
    (found,) = set(hlo.collectives(text))
    assert found == ("all-reduce", ((0, 2, 4, 6), (1, 3, 5, 7)))
    inside = hlo.loop_instructions(text)
    assert "all-reduce" in {one.op for one in inside}
    assert {one.largest_bytes for one in hlo.copies(inside)} >= {2 * 64 * 4}
    assert len(inside) < len(hlo.instructions(text))
    assert hlo.array_bytes("(bf16[3,8]{1,0:T(8,128)}, u32[], pred[5])") == [48, 4, 5]


@pytest.mark.parametrize(
    ("shape", "batch", "message"),
    [
        ((1, 8, 1), (np.zeros((12, 3)),), r"batch of 12 cannot be split over replica=1 \* data=8"),
        ((2, 2, 2), (np.zeros(6), np.zeros((12, 1))), r"replica=2 \* data=2 = 4 shards"),
        ((1, 8, 1), (np.zeros(8), np.float32(1)), r"\[1\] has shape \(\)"),
        ((1, 8, 1), (np.zeros(8), {"pool": np.zeros((12, 2))}), r"\[1\]\['pool'\].*batch of 8"),
        ((1, 4, 1), (np.zeros(8), np.zeros(4)), r"\[1\] has shape \(4,\).*batch of 8"),
        ((1, 8, 1), (np.zeros((0, 2)),), r"\[0\] has shape \(0, 2\).*at least 1"),
        ((1, 8, 1), (), "batch of None"),
    ],
)
def test_what_cannot_be_split_is_named(shape, batch, message):
    split = shard_search(
        lambda _, *batch: batch, make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    )
    with pytest.raises(ValueError, match=message):
        jax.jit(split)((), *batch)


def test_heads_are_never_cut():
    """Nine heads over two devices stay whole, over three they are split; ffn is split by both."""
    cfg = preset("smollm2-135m")
    by_two, by_three = param_axes(cfg, 2).layers[0], param_axes(cfg, 3).layers[0]
    assert by_two.wq == (None, "embed")
    assert by_two.wk == (None, "embed")
    assert by_two.w_up == by_three.w_up == ("ffn", "embed")
    assert by_three.wq == ("heads", "embed")
    assert by_three.wk == ("kv_heads", "embed")
