"""What a network says of the states one step on: a look ahead that writes nothing.

A state is hard to judge, and the states behind its steps are easier, the more so the nearer the end
they are. Where a task lists them (`DeviceTask.outcomes`) the network for states reads them all,
with two uses: the best of them says what the state is worth (evaluator "state_lookahead"; one-step
lookahead by a known model, Sutton and Barto 2018, chapter 8), and each says what the step to it is
worth, before the policy has written it (`sampling.outcome_weight`; controlled decoding, arXiv
2310.17022: the policy's probability times the value of what it leads to).

A state that comes up again in a later round is not looked ahead from again: what was read is kept
with its node, and found by the key of the state. (What nodes judged on visit read is not kept.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlm_jax.core.types import Array, Bool, Float32, Int32, PyTree, UInt32
from rlm_jax.models.state_value import StateValue, apply_state_value
from rlm_jax.reasoning.structure import Structure
from rlm_jax.tasks.device import DeviceTask

_ROWS_AT_ONCE = 512
_LEAST_VALUE = 1e-3  # What is said to be lost may be mistaken.
UNREAD = -1.0


class Ahead(NamedTuple):
    """Of R states: which of M steps the task lists, and the values of what they lead to, else 0.

    value: `UNREAD` in all of a state that was not looked ahead from. num_items: how many items the
    network read of each state's outcomes.
    """

    value: Float32[Array, "R M"]
    listed: Bool[Array, "R M"]
    num_items: Int32[Array, "R"]


def look_ahead(
    network: StateValue | None,
    task: DeviceTask | None,
    states: PyTree,
    wanted: Bool[Array, "R"],
    known: Float32[Array, "R M"],
) -> Ahead:
    """Reads what lies one step on from R states of a task; nothing of those that are not wanted.

    Args:
      known: what was read of the states before, `UNREAD` where nothing was.
    """
    assert network is not None
    assert task is not None
    assert task.outcomes is not None
    seen = jax.vmap(task.outcomes)(states)
    present = seen.items >= 0
    listed = present.any(-1) & wanted[:, None]
    is_known = known[:, :1] >= 0
    unread = listed & ~is_known
    num_unread = unread.sum(dtype=jnp.int32)
    items, goals = seen.items.reshape(listed.size, -1), seen.goal.reshape(-1)
    # Most places of a list are empty: those that are not are read one batch after the other.
    order = jnp.argsort(~unread.reshape(-1), stable=True)
    size = min(_ROWS_AT_ONCE, listed.size)

    def read(carry):
        start, value = carry
        place = start + jnp.arange(size)
        at = order[jnp.minimum(place, listed.size - 1)]
        found = apply_state_value(network, items[at], goals[at])
        at = jnp.where(place < num_unread, at, listed.size)
        return start + size, value.at[at].set(found, mode="drop")

    begun = jnp.zeros_like(num_unread), jnp.zeros(listed.size, jnp.float32)
    _, value = jax.lax.while_loop(lambda carry: carry[0] < num_unread, read, begun)
    value = jnp.where(is_known, known, value.reshape(listed.shape))
    num_items = jnp.where(unread, 1 + present.sum(-1, dtype=jnp.int32), 0).sum(1)
    return Ahead(jnp.where(wanted[:, None], value, UNREAD), listed, num_items)


def recall(
    ahead: Float32[Array, "B N M"], structure: Structure, keys: UInt32[Array, "B L"]
) -> Float32[Array, "R M"]:
    """What was read of states with these keys, R = B * L of them; `UNREAD` where nothing was.

    Args:
      ahead: `Ahead.value` of the nodes.
    """
    there = jnp.arange(structure.capacity) < structure.num_nodes[:, None]
    there &= ahead[..., 0] >= 0
    same = (structure.state_key[:, None] == keys[..., None]) & (keys[..., None] != 0)
    same &= there[:, None]
    found = jnp.take_along_axis(ahead, same.argmax(-1)[..., None], axis=1)
    found = jnp.where(same.any(-1, keepdims=True), found, UNREAD)
    return found.reshape(-1, ahead.shape[-1])


def weigh_steps(ahead: Ahead, weight: float) -> Float32[Array, "R M"]:
    """What is added to the log-probability of each step, the best one's being 0."""
    chance = jnp.maximum(ahead.value, _LEAST_VALUE)
    best = chance.max(1, keepdims=True)
    return jnp.where(ahead.listed, weight * jnp.log(chance / best), 0.0)
