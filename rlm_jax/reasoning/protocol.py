"""What strategies and expanders say to each other.

A strategy is four pure functions over a `Structure`; an expander proposes steps for the nodes a
strategy asks for. Neither knows the other, and either driver of `drive.py` runs any pair.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlm_jax.core.budget import Budget
from rlm_jax.core.struct import static, struct
from rlm_jax.core.types import Bool, Float32, Int32, PyTree, UInt32
from rlm_jax.reasoning.structure import Operator, Structure


@struct
class Request:
    """What a strategy wants: K children of each of W nodes per structure, or a node's value.

    nodes: [B, W], -1 where a lane has nothing to do. operator: the `Operator` to apply; an
    EVALUATE lane asks for the node's value alone and makes no children. distinct: equal steps from
    one node are to be marked as duplicates.
    """

    nodes: Int32[jax.Array, "B W"]
    operator: Int32[jax.Array, "B W"]
    num_children: int = static()
    distinct: bool = static(default=True)

    @property
    def active(self) -> Bool[jax.Array, "B W"]:
        """Lanes that ask for something."""
        return self.nodes >= 0

    @property
    def grows(self) -> Bool[jax.Array, "B W"]:
        """Lanes that ask for children."""
        return self.active & (self.operator != Operator.EVALUATE)

    @property
    def leads(self) -> Bool[jax.Array, "B W"]:
        """Lanes that are the first at their node: several may grow the root at once."""
        same = self.nodes[:, :, None] == self.nodes[:, None, :]
        earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
        return self.active & ~(same & earlier).any(-1)


@struct
class Outcome:
    """What an expander answers: K proposed steps for each requested node.

    valid: a step was produced. duplicate: it equals an earlier sibling.
    length, logprob, reward, terminal, answer_key, state_key, proven: as in `Structure`.
    value: the evaluator's estimates of the children, where it judges at expansion.
    node_value: its estimate of the requested node itself.
    cost: what producing and judging them took.
    absent: names of fields [B, W, K] that are 0 throughout, see `make_outcome`.
    """

    valid: Bool[jax.Array, "B W K"]
    duplicate: Bool[jax.Array, "B W K"]
    length: Int32[jax.Array, "B W K"]
    logprob: Float32[jax.Array, "B W K"]
    value: Float32[jax.Array, "B W K"]
    reward: Float32[jax.Array, "B W K"]
    terminal: Bool[jax.Array, "B W K"]
    answer_key: UInt32[jax.Array, "B W K"]
    state_key: UInt32[jax.Array, "B W K"]
    proven: Bool[jax.Array, "B W K"]
    node_value: Float32[jax.Array, "B W"]
    cost: Budget
    absent: tuple[str, ...] = static(default=())


def make_outcome(valid: Bool[jax.Array, "B W K"], cost: Budget, **known: jax.Array) -> Outcome:
    """An outcome of what the expander knows: the fields it does not name are 0, and cost nothing.

    Free slots of a structure hold 0 already, so nothing of these fields is computed or written.

    Raises:
      TypeError: a name that is no field of `Outcome`.
    """
    absent = tuple(name for name in _OF_STEPS if name not in known)
    zeros: dict[str, jax.Array] = {name: jnp.zeros(valid.shape, _OF_STEPS[name]) for name in absent}
    if "node_value" not in known:
        zeros["node_value"] = jnp.zeros(valid.shape[:2], jnp.float32)
    return Outcome(valid=valid, cost=cost, absent=absent, **zeros, **known)


_OF_STEPS = {
    "duplicate": jnp.bool_,
    "length": jnp.int32,
    "logprob": jnp.float32,
    "value": jnp.float32,
    "reward": jnp.float32,
    "terminal": jnp.bool_,
    "answer_key": jnp.uint32,
    "state_key": jnp.uint32,
    "proven": jnp.bool_,
}


@struct
class Answer:
    """The node each structure answers with (-1: none), its score and the share of votes."""

    node: Int32[jax.Array, "B"]
    score: Float32[jax.Array, "B"]
    share: Float32[jax.Array, "B"]


# When nodes are evaluated: when they are made, or when they are selected.
JUDGEMENTS = ("expansion", "visit")

State = Any
World = PyTree
# keys [B]: one key per problem, the same for the whole search; what happens at a node depends on
# the problem's key and the node's number alone, never on neighbours in the batch.
Keys = jax.Array
Expand = Callable[[PyTree, Keys, World, Structure, Request], tuple[Outcome, World]]


class Strategy(NamedTuple):
    """How to grow a structure.

    init(structure, keys) -> state: of a fresh structure, or of one that was half grown elsewhere.
    ask(state, structure, keys) -> Request: which nodes to grow; all -1 when it is done.
    tell(state, structure, request, outcome) -> (state, structure) with the steps in it.
    answer(structure, answer_ids) -> Answer: never sees a gold answer.
    num_lanes, num_children: W and K, fixed at compile time.
    widths: numbers of lanes that rounds come in, W first and falling; () for W alone. Lanes in use
      are the first ones then, and `tell` takes a request of any of these widths.
    count_lanes(state, structure) -> [B]: lanes the next `ask` will use at most, 0 if it will ask
      nothing; with it, `ask` takes `num_lanes`, one of `widths`.
    """

    name: str
    init: Callable[[Structure, Keys], State]
    ask: Callable[..., Request]
    tell: Callable[[State, Structure, Request, Outcome], tuple[State, Structure]]
    answer: Callable[[Structure, jax.Array], Answer]
    num_lanes: int
    num_children: int
    widths: tuple[int, ...] = ()
    count_lanes: Callable[[State, Structure], Int32[jax.Array, "B"]] | None = None
