"""What a round of a compiled search does not do: copy arrays as large as the structure.

An expander that reads where a node hangs, and a search that then writes there, are unordered for
the compiler unless one needs the other; it then copies the array in every round, and a round's time
grows with the capacity.
"""

import dataclasses
import functools

import hlo
import jax
import jax.numpy as jnp
import procedural
import pytest

from rlm_jax.reasoning.drive import advance, start
from rlm_jax.reasoning.strategies.gumbel import make_gumbel
from rlm_jax.reasoning.strategies.puct import make_puct
from rlm_jax.reasoning.structure import at_nodes, make_structure

SIZES = {"num_simulations": 16, "num_children": 4, "max_depth": 8}


# A single structure with a single lane is a case of its own, see `at_nodes`.
@pytest.mark.parametrize(("batch", "num_lanes"), [(3, 2), (1, 1)])
@pytest.mark.parametrize("judge", ["visit", "expansion"])
@pytest.mark.parametrize("make", [make_gumbel, make_puct])
def test_no_round_copies_what_is_as_large_as_a_structure(make, judge, batch, num_lanes):
    grow = procedural.make_expand()

    def expand(params, keys, world, structure, request):
        outcome, world = grow(params, keys, world, structure, request)
        above = at_nodes(structure.parent, request.nodes).astype(jnp.float32)
        return dataclasses.replace(outcome, logprob=outcome.logprob - above[..., None]), world

    structure = make_structure(jnp.ones(batch, jnp.int32), 1000)
    keys = jax.random.split(jax.random.key(0), batch)
    world = procedural.make_world(keys, structure.capacity)
    strategy = make(num_lanes=num_lanes, judge=judge, **SIZES)
    search = jax.eval_shape(functools.partial(start, strategy), keys, world, structure)
    run = jax.jit(functools.partial(advance, strategy, expand, None), donate_argnums=0)
    inside = hlo.loop_instructions(run.lower(search).compile().as_text())
    assert len(inside) > 100
    sizes = [one.largest_bytes for one in hlo.copies(inside)]
    assert max(sizes, default=0) < structure.parent.size, "a copy of [B, N], or larger"
