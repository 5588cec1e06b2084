"""Suite "search", small networks: our tree searches against mctx's, on an MLP of a MuZero agent.

Policy, value and dynamics are the same small networks on both sides, K actions, no reward. Ours
judges children on visit, as mctx does: one simulation is one network call for one new node on both
sides, the root's call apart. PUCT is MuZero's with the same constants and no noise, so its visit
counts are mctx's own with one leaf a round; Gumbel has no noise on either side and differs by what
a round does not know yet. `leaves` (W) of one structure go into one call; mctx has one. Gumbel's
rounds visit each considered child once and get narrow as these get few; "gumbel_filled" gives each
as many visits as fill the W leaves.

They run in a process of their own (`side_process.py`), whose memory is the C library's affair:
programs of `launching.py` share one arena, which spares large programs their page faults and costs
these, of 100 microseconds, up to a half more.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_timing import Compiled, Patience, compile_call, describe_pair, time_pair
from side_process import SideProcess, serve

from rlm_jax.core.budget import zero_budget
from rlm_jax.reasoning.drive import run_compiled
from rlm_jax.reasoning.operators.structure import child_slots
from rlm_jax.reasoning.protocol import Strategy, make_outcome
from rlm_jax.reasoning.strategies.gumbel import make_gumbel
from rlm_jax.reasoning.strategies.puct import make_puct
from rlm_jax.reasoning.structure import Structure, at_nodes, make_structure, put_at

HOW_TO_GET_MCTX = "pip install mctx"
NUM_ACTIONS = 16
WIDTH = 64
_HIDDEN = 128
_DEEPEST = 64


def run_small(
    *,
    batches: Sequence[int],
    simulations: Sequence[int],
    leaves: Sequence[int],
    patience: Patience,
    with_other: bool = True,
) -> Iterator[dict[str, Any]]:
    """Simulations per second of PUCT and Gumbel, one case per size."""
    found = importlib.util.find_spec("mctx") is not None
    with SideProcess(sys.executable, "bench_small.py") as process:
        for name in ("puct", "gumbel"):
            for num_simulations in simulations:
                for batch in batches:
                    for num_lanes in leaves:
                        filled = name == "gumbel" and num_lanes > 1
                        for case in (name, "gumbel_filled") if filled else (name,):
                            figures = process.ask(
                                "compare",
                                case=case,
                                num_simulations=num_simulations,
                                batch=batch,
                                num_lanes=num_lanes,
                                with_other=with_other and found,
                                patience=dataclasses.asdict(patience),
                            )
                            yield {
                                "case": f"small_{case}",
                                **figures,
                                "other_is": _tell_other(with_other, found),
                            }


def init_networks(key: jax.Array) -> dict[str, jax.Array]:
    """Weights of dynamics, policy and value."""
    shapes = {
        "dynamics_in": (WIDTH + NUM_ACTIONS, _HIDDEN),
        "dynamics_out": (_HIDDEN, WIDTH),
        "policy": (WIDTH, NUM_ACTIONS),
        "value_in": (WIDTH, _HIDDEN // 2),
        "value_out": (_HIDDEN // 2, 1),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) / shape[0] ** 0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def predict(params, state):
    """Logits over the actions and the value of states [..., WIDTH]."""
    hidden = jax.nn.relu(state @ params["value_in"])
    return state @ params["policy"], jnp.tanh(hidden @ params["value_out"])[..., 0]


def step(params, state, action):
    """The state after an action."""
    both = jnp.concatenate([state, jax.nn.one_hot(action, NUM_ACTIONS)], -1)
    return jnp.tanh(jax.nn.relu(both @ params["dynamics_in"]) @ params["dynamics_out"])


def expand(params, keys, world, structure, request):
    """Our expander: a requested node gets its state, its value and the logits of its children.

    `world` holds the states of grown nodes, [B, 1 + num_simulations, WIDTH], as mctx does: blocks
    of K children are consecutive behind the root, so that the block says whose children they are
    and a place in it is the action.
    """
    del keys
    node = jnp.maximum(request.nodes, 0)
    above = at_nodes(world, jnp.maximum(node - 1, 0) // NUM_ACTIONS)
    state = step(params, above, (node - 1) % NUM_ACTIONS)
    state = jnp.where((node == 0)[..., None], above, state)
    logits, value = predict(params, state)
    # Behind the root's own, which is there already, in the order of the slots of their children.
    block = (child_slots(structure, request)[..., 0] - 1) // NUM_ACTIONS
    at = jnp.where(request.nodes > 0, block, world.shape[1])
    world = put_at(world, at, state)
    outcome = make_outcome(
        valid=jnp.broadcast_to(request.grows[..., None], (*request.nodes.shape, NUM_ACTIONS)),
        cost=zero_budget(structure.num_nodes),
        logprob=logits,
        node_value=value,
    )
    return outcome, world


def make_strategy(name: str, num_simulations: int, num_lanes: int) -> Strategy:
    """Our strategy, with mctx's settings."""
    settings: dict[str, Any] = {
        "num_simulations": num_simulations,
        "num_children": NUM_ACTIONS,
        "num_lanes": num_lanes,
        "max_depth": min(num_simulations, _DEEPEST),
        "judge": "visit",
    }
    if name == "puct":
        return make_puct(base=19652.0, q="siblings", **settings)
    if name == "gumbel_filled":
        settings["visits_per_round"] = num_lanes
    return make_gumbel(max_considered=NUM_ACTIONS, gumbel_scale=0.0, **settings)


def search_ours(
    strategy: Strategy, num_simulations: int, params: Any, states: jax.Array
) -> jax.Array:
    """Visits of the root's children, [B, K]."""
    structure = _grow(strategy, num_simulations, params, states)
    return structure.visits[:, 1 : NUM_ACTIONS + 1]


def search_for_depth(
    strategy: Strategy, num_simulations: int, params: Any, states: jax.Array
) -> jax.Array:
    """The same search: how deep its selected leaves lie, a mean, which it descends and climbs."""
    structure = _grow(strategy, num_simulations, params, states)
    selected = (structure.visits > 0) & (structure.depth > 0)
    return (structure.depth * selected).sum() / selected.sum()


def _grow(strategy: Strategy, num_simulations: int, params: Any, states: jax.Array) -> Structure:
    batch = states.shape[0]
    capacity = 1 + NUM_ACTIONS * (num_simulations + 1)
    structure = make_structure(jnp.ones(batch, jnp.int32), capacity)
    world = jnp.zeros((batch, 1 + num_simulations, WIDTH)).at[:, 0].set(states)
    keys = jax.random.split(jax.random.key(0), batch)
    return run_compiled(strategy, expand, params, keys, world, structure)[0]


def search_mctx(name: str, num_simulations: int, params: Any, states: jax.Array) -> jax.Array:
    """The same of mctx."""
    mctx: Any = importlib.import_module("mctx")  # Its dataclasses hide their fields from checkers.

    def recurrent(params, key, action, state):
        del key
        state = step(params, state, action)
        logits, value = predict(params, state)
        output = mctx.RecurrentFnOutput(
            reward=jnp.zeros_like(value),
            discount=jnp.ones_like(value),
            prior_logits=logits,
            value=value,
        )
        return output, state

    logits, value = predict(params, states)
    root = mctx.RootFnOutput(prior_logits=logits, value=value, embedding=states)
    args = (params, jax.random.key(0), root, recurrent, num_simulations)
    max_depth = min(num_simulations, _DEEPEST)
    if name == "puct":
        policy = mctx.muzero_policy(*args, max_depth=max_depth, dirichlet_fraction=0.0)
    else:
        policy = mctx.gumbel_muzero_policy(
            *args, max_depth=max_depth, max_num_considered_actions=NUM_ACTIONS, gumbel_scale=0.0
        )
    return policy.search_tree.summary().visit_counts


def compare(
    case: str,
    num_simulations: int,
    batch: int,
    num_lanes: int,
    with_other: bool,
    patience: Mapping[str, Any],
) -> dict[str, Any]:
    """Both sides in turn, in this process: the fields of one case."""
    params, states = _make_inputs(batch)
    strategy = make_strategy(case, num_simulations, num_lanes)
    ours = compile_call(functools.partial(search_ours, strategy, num_simulations), params, states)
    visits = np.asarray(ours.call())
    assert (visits.sum(-1) == num_simulations).all(), visits.sum(-1)
    other = _compile_mctx(case.split("_")[0], num_simulations, batch) if with_other else None
    times = time_pair(ours.call, None if other is None else other.call, Patience(**patience))
    same = None
    if other is not None:
        same = float((visits == np.asarray(other.call())).all(-1).mean())
    return {
        **describe_pair(times, batch * num_simulations),
        "unit": "simulations/s",
        "batch": batch,
        "simulations": num_simulations,
        "leaves": num_lanes,
        "children": NUM_ACTIONS,
        "same_visit_counts": same,
        "compile_seconds": [ours.seconds, None if other is None else other.seconds],
    }


def _make_inputs(batch: int) -> tuple[dict[str, jax.Array], jax.Array]:
    params = init_networks(jax.random.key(0))
    return params, jax.random.normal(jax.random.key(1), (batch, WIDTH))


@functools.cache
def _compile_mctx(name: str, num_simulations: int, batch: int) -> Compiled:
    return compile_call(functools.partial(search_mctx, name, num_simulations), *_make_inputs(batch))


def _tell_other(with_other: bool, found: bool) -> str:
    if not with_other:
        return "left out (--only_ours)"
    if not found:
        return f"not here: {HOW_TO_GET_MCTX}"
    return f"mctx {importlib.metadata.version('mctx')}"


def main() -> None:
    """Answers commands until stdin ends."""
    serve({"compare": compare})


if __name__ == "__main__":
    main()
