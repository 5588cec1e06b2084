"""Search distillation: the policy towards the step distribution that a search found better.

A search compares K sampled steps of a node and ends with weights over them: visits^(1/t)
(AlphaZero; golden G54) or softmax(log prior + sigma(completed Q)) (Gumbel MuZero, Danihelka et al.
2022). `improve_policy` reads them off a finished structure with its verified outcomes; the losses
take the steps' log-probabilities under the current policy (sums over their tokens, `steps.py`):

  sequence form  -sum_k w_k log pi(step_k | state): weighted fine-tuning on whole steps. It moves
                 the policy's mass onto the steps the search prefers, away from everything that was
                 not sampled too. The one to use when the policy itself is the product (greedy
                 chains, expert iteration); its least value is not 0. On a batch with one row a
                 step it is `losses.cross_entropy` with weight w_k on each of the step's tokens.
  sibling form   KL(w || softmax over the siblings of log pi): only the order and ratios among the
                 sampled steps are learned, no mass moves between them and the rest, and it is 0
                 when they agree with the search. The one to use when the samples are few and the
                 policy must stay broad (exploration, off-policy replay); needs two siblings.

The children were sampled from the policy and duplicates merged, so the prior of a child is its
probability among its distinct siblings and no further correction for sampling enters (Sampled
MuZero, Hubert et al. 2021, corrects the empirical frequencies instead).
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import MaskedSum
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float, Float32, Int32
from rlm_jax.learning.losses import weighted_sum
from rlm_jax.learning.targets import ValueTree
from rlm_jax.reasoning.operators.traversal import complete_q, scale_completed_q, visit_policy
from rlm_jax.reasoning.structure import NO_NODE, Structure

IMPROVEMENTS = ("completed_q", "visits")
_NEVER = -1e30


@struct
class ImprovedPolicy:
    """A search's step distribution at each node.

    children: nodes, -1 where there are fewer than K. weights: of the children; they sum to one
    where the node teaches and are 0 elsewhere. teaches: the node was searched below.
    """

    children: Int32[Array, "B N K"]
    weights: Float32[Array, "B N K"]
    teaches: Bool[Array, "B N"]


def improve_policy(
    structure: Structure,
    tree: ValueTree,
    *,
    num_children: int,
    rule: str = "completed_q",
    temperature: float = 1.0,
    value_scale: float = 0.1,
    visit_offset: float = 50.0,
    rescale_q: bool = True,
    min_visits: float = 1.0,
    min_children: int = 2,
) -> ImprovedPolicy:
    """What the search prefers at each node of a structure.

    Args:
      tree: values of the nodes with the outcomes in them, `targets.value_tree`.
      num_children: K, living children kept per node (the first ones); the root of a search with
        `root_lanes` has that many times its K.
      rule: "completed_q", with `value_scale`, `visit_offset` and `rescale_q` as in
        `scale_completed_q`, or "visits" with `temperature` as in `visit_policy`.
      min_visits: least visits of all children together; min_children: least living children for a
        node to teach.

    Raises:
      ValueError: the rule is unknown.
    """
    if rule not in IMPROVEMENTS:
        raise ValueError(f"rule {rule!r}: accepted are {IMPROVEMENTS}")
    children = list_children(structure, num_children)
    real = children >= 0

    def of_children(array: Array) -> Array:
        rows = jnp.arange(array.shape[0])[:, None, None]
        return jnp.where(real, array[rows, jnp.maximum(children, 0)], 0.0)

    visits, prior = of_children(_seen(structure)), of_children(structure.prior)
    if rule == "visits":
        weights = visit_policy(visits, temperature)
    else:
        q = complete_q(of_children(tree.edge), visits, prior, real, structure.model_value)
        scaled = scale_completed_q(
            q, visits, real, value_scale=value_scale, visit_offset=visit_offset, rescale=rescale_q
        )
        logits = jnp.log(jnp.maximum(prior, jnp.finfo(jnp.float32).tiny)) + scaled
        weights = jax.nn.softmax(jnp.where(real, logits, _NEVER), axis=-1)
    teaches = structure.alive & tree.known & ~structure.terminal
    teaches &= (real.sum(-1) >= min_children) & (visits.sum(-1) >= min_visits)
    weights = jnp.where(real & teaches[..., None], weights, 0.0)
    return ImprovedPolicy(children, weights, teaches)


def list_children(structure: Structure, num_children: int) -> Int32[Array, "B N K"]:
    """The first K living children of each node, in the order they were made; -1 where fewer."""
    rows = jnp.arange(structure.depth.shape[0])[:, None]
    index = jnp.arange(structure.capacity)
    parent = jnp.where(structure.alive, structure.parent, NO_NODE)
    earlier = (parent[:, :, None] == parent[:, None, :]) & (index[None, :] < index[:, None])
    rank = earlier.sum(-1)
    at = jnp.where((parent >= 0) & (rank < num_children), parent, structure.capacity)
    empty = jnp.full_like(structure.parent, NO_NODE)[..., None]
    empty = jnp.broadcast_to(empty, (*structure.parent.shape, num_children))
    places = jnp.broadcast_to(index, parent.shape).astype(jnp.int32)
    return empty.at[rows, at, rank].set(places, mode="drop")


def sequence_distillation(
    logprob: Float[Array, "*rows K"], weights: Float[Array, "*rows K"]
) -> MaskedSum:
    """-sum_k w_k log pi(step_k), and the sum of the weights.

    Args:
      logprob: of whole steps under the current policy; anything where the weight is 0.
    """
    return weighted_sum(-logprob, weights)


def sibling_distillation(
    logprob: Float[Array, "*rows K"],
    weights: Float[Array, "*rows K"],
    siblings: Bool[Array, "*rows K"],
) -> MaskedSum:
    """KL(w || softmax of the siblings' log-probabilities), and the sum of the weights.

    Args:
      logprob: of whole steps; divided by length (to a power) where the search's prior was.
      siblings: the steps compared; anything elsewhere. Weights are 0 there.
    """
    logits = jnp.where(siblings, logprob.astype(jnp.float32), _NEVER)
    weights = jnp.where(siblings, weights, 0.0)
    target = jnp.log(jnp.where(weights > 0, weights, 1.0))
    return weighted_sum(target - jax.nn.log_softmax(logits, axis=-1), weights)


def _seen(structure: Structure) -> Float32[Array, "B N"]:
    """Visits; a finished solution's outcome is known even if nothing came through it."""
    return jnp.where(structure.terminal, jnp.maximum(structure.visits, 1.0), structure.visits)
