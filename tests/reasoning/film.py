"""A third driver, for tests: a search of a fixed number of rounds, with every round on record."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from procedural import make_expand, make_world

from rlm_jax.core.types import Array
from rlm_jax.reasoning.drive import next_request
from rlm_jax.reasoning.structure import NO_NODE, Structure, make_structure

CAPACITY = 40
ROUNDS = 24
# One problem a row; some of the rows have little or nothing to spend.
TOKEN_LIMITS = np.asarray([300, 300, 300, 300, 60, 17, 1, 0], np.int32)


class Frame(NamedTuple):
    """A round: nodes asked for, those to be grown; the state and the structure after it."""

    asked: Array
    grown: Array
    state: Any
    structure: Structure


def start(token_limits=TOKEN_LIMITS, capacity=CAPACITY, seed=7):
    """Keys, world and structures of a batch with these limits."""
    keys = jax.random.split(jax.random.key(seed), len(token_limits))
    structure = make_structure(
        jnp.full(len(token_limits), 4, jnp.int32), capacity, token_limit=jnp.asarray(token_limits)
    )
    return keys, make_world(keys, capacity), structure


def shoot(strategy, expand, keys, world, structure, rounds=ROUNDS):
    """The frame of every round."""

    def body(carry, _):
        state, structure, world = carry
        request = next_request(strategy, state, structure, keys)
        outcome, world = expand(None, keys, world, structure, request)
        state, structure = strategy.tell(state, structure, request, outcome)
        grown = jnp.where(request.grows, request.nodes, NO_NODE)
        return (state, structure, world), Frame(request.nodes, grown, state, structure)

    state = strategy.init(structure, keys)
    return jax.lax.scan(body, (state, structure, world), None, rounds)[1]


@functools.cache
def film(strategy):
    """The film of a strategy on the usual problems, as one frame of arrays [rounds, B, ...]."""
    run = jax.jit(functools.partial(shoot, strategy, make_expand()))
    taken = jax.tree.map(np.asarray, run(*start()))
    assert (taken.asked[-1] < 0).all(), "the film ends before the search"
    return taken


def frames(taken):
    """The film round by round."""
    for i in range(len(taken.asked)):
        yield jax.tree.map(lambda array, i=i: array[i], taken)
