"""Beams over the tokens of a step: the K rows of a node are K hypotheses of one search.

Every beam still growing offers its next tokens, a step that has ended offers itself, and the K
best offers of a group become its rows, best first. So the steps of a node are distinct, which
K independent samples of a sharp policy are not. "beam" ranks by log-probability.

"stochastic_beam" ranks by log-probability plus Gumbel noise, and its rows are then a sample
*without replacement* of the distribution over whole steps: the first is an ordinary sample, each
further one a sample of what is left. The one idea: the largest noisy log-probability among all
continuations of a prefix is Gumbel noise around the prefix's own log-probability. It can be drawn
first, for the prefix; the tokens that follow share it out, their largest being the prefix's.

Paper: Kool, van Hoof and Welling, Stochastic Beams and Where to Find Them (arXiv 1903.06059).
Deviations: the noise of the empty step is drawn, where the paper sets it to 0, so that `score`
is the Gumbel variable which importance weights need. Temperature and truncation come first, and
the sample is of what they leave: with top-k (or top-p and min-p among `max_candidates`) the noise
falls on few tokens, without them on the whole vocabulary.
"""

import math

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float32, Int32, Key
from rlm_jax.inference.sampling import (
    NUM_ALTERNATIVES,
    Choice,
    SamplingConfig,
    filter_candidates,
    log_total,
    num_candidates,
    top_tokens,
)
from rlm_jax.models.attention import MASKED_SCORE

BEAM_METHODS = ("beam", "stochastic_beam")


@struct
class Growth:
    """The beams that take the rows of their groups.

    parent: the row a beam comes from, counted within its group; its own where it holds none.
    grew: it took the token of `choice`; the others have ended or hold no beam.
    score: what ranked it, -inf where a row holds no beam.
    """

    parent: Int32[Array, "X K"]
    grew: Bool[Array, "R"]
    score: Float32[Array, "R"]
    choice: Choice


@struct
class _Offers:
    """C next tokens of every row: their scores, and log-probabilities before and after filters."""

    ids: Int32[Array, "R C"]
    score: Float32[Array, "R C"]
    logprob: Float32[Array, "R C"]
    behaviour_logprob: Float32[Array, "R C"]


def begin_beams(
    keys: Key[Array, "R"],
    limits: Int32[Array, "R"],
    cfg: SamplingConfig,
    *,
    num_siblings: int,
    num_slots: int,
) -> tuple[Int32[Array, "R"], Float32[Array, "R"]]:
    """One empty beam in the first row of every group that has room.

    Returns:
      The rows' limits, the smallest of its group wherever a row may hold a beam at all, and the
      scores of the rows: -inf but for the empty beams.
    """
    grouped = limits.reshape(-1, num_siblings)
    usable = grouped > 0
    smallest = jnp.where(usable, grouped, grouped.max(-1, keepdims=True)).min(-1, keepdims=True)
    first = usable & (jnp.cumsum(usable, -1) == 1)
    score = grouped[:, :1].astype(jnp.float32) * 0
    if cfg.method == "stochastic_beam":
        # Tokens fold their index, which stays below `num_slots`, into the same keys.
        fresh = jax.vmap(jax.random.fold_in, (0, None))(keys[::num_siblings], num_slots)
        score = jax.vmap(jax.random.gumbel)(fresh)[:, None]
    score = jnp.where(first, score, -jnp.inf)
    return jnp.where(usable, smallest, 0).reshape(-1), score.reshape(-1)


def grow_beams(
    keys: Key[Array, "R"],
    logits: Float32[Array, "R V"],
    score: Float32[Array, "R"],
    behaviour_logprob: Float32[Array, "R"],
    ended: Bool[Array, "R"],
    usable: Bool[Array, "R"],
    cfg: SamplingConfig,
    *,
    num_siblings: int,
) -> Growth:
    """One token more for the beams of every group of `num_siblings` rows.

    Args:
      keys: one per row; that of a group's first row is the group's.
      score: of each row's beam, -inf where it holds none. behaviour_logprob: of its tokens so far,
        what its noise is centred on.
      ended: the beam is complete, or there is none. usable: the row may hold a beam.
    """
    offers, top_logprobs = _make_offers(keys, logits, score, behaviour_logprob, cfg, num_siblings)
    num_offers = offers.ids.shape[-1]
    # A beam's offers and, behind them, itself: one of the two is out of the race.
    # And what no step may go on with is no offer, even where there is nothing else.
    barred = offers.logprob <= MASKED_SCORE / 2
    fresh = jnp.where(ended[:, None] | barred, -jnp.inf, offers.score)
    itself = jnp.where(ended, score, -jnp.inf)[:, None]
    race = jnp.concatenate([fresh, itself], -1).reshape(-1, num_siblings * (num_offers + 1))
    best, at = top_tokens(race, num_siblings)
    if cfg.min_ratio:
        best = jnp.where(best < best[:, :1] + math.log(cfg.min_ratio), -jnp.inf, best)
    # The best beams take the usable rows in order.
    usable = usable.reshape(best.shape)
    rank = jnp.maximum(jnp.cumsum(usable, -1) - 1, 0)
    best = jnp.where(usable, _take(best, rank), -jnp.inf)
    at = _take(at, rank)
    holds = best > -jnp.inf
    parent = jnp.where(holds, at // (num_offers + 1), jnp.arange(num_siblings))
    offer = at % (num_offers + 1)
    grew = (holds & (offer < num_offers)).reshape(-1)
    place = parent * num_offers + jnp.minimum(offer, num_offers - 1)

    def pick(array: Array) -> Array:
        return _take(array.reshape(place.shape[0], -1), place).reshape(-1)

    choice = Choice(
        token=jnp.where(grew, pick(offers.ids), 0),
        logprob=pick(offers.logprob),
        behaviour_logprob=pick(offers.behaviour_logprob),
        top_logprobs=follow(top_logprobs, parent),
    )
    return Growth(parent, grew, best.reshape(-1), choice)


def follow(array: Array, parent: Int32[Array, "X K"]) -> Array:
    """Rows [R, ...] of what the beams come from: row k of a group becomes its row parent[k]."""
    grouped = array.reshape(*parent.shape, -1)
    return _take(grouped, parent[..., None]).reshape(array.shape)


def _make_offers(keys, logits, score, behaviour_logprob, cfg, num_siblings):
    """The tokens that may enter a group's best, and the model's top log-probabilities."""
    num_top = num_candidates(cfg, logits.shape[-1], num_siblings)
    top, ids = top_tokens(logits, num_top)
    norm = log_total(logits, top[:, 0])
    top_logprobs = (top - norm[:, None])[:, :NUM_ALTERNATIVES]
    warm_norm = norm[:, None]
    if cfg.temperature != 1:
        warm_norm = log_total(logits, top[:, 0], cfg.temperature)[:, None]
    behaviour = top / cfg.temperature - warm_norm
    if cfg.truncates:
        behaviour = filter_candidates(behaviour, cfg)
    if cfg.method == "beam":
        offered = score[:, None] + behaviour
        return _Offers(ids, offered, top - norm[:, None], jnp.zeros_like(top)), top_logprobs
    if cfg.truncates:
        noisy = behaviour + _draw_noise(keys, behaviour.shape, num_siblings)
    else:
        # No more of one beam's tokens than there are rows can be among the group's best.
        noise = _draw_noise(keys, logits.shape, num_siblings)
        noisy, ids = top_tokens(
            logits / cfg.temperature - warm_norm + noise, min(num_siblings, logits.shape[-1])
        )
        top = _take(logits, ids)
        behaviour = top / cfg.temperature - warm_norm
    offered = _share_out(score, behaviour_logprob[:, None] + noisy)
    return _Offers(ids, offered, top - norm[:, None], behaviour), top_logprobs


def _draw_noise(keys, shape, num_siblings) -> Float32[Array, "R C"]:
    def draw(key):
        return jax.random.gumbel(key, (num_siblings, shape[-1]))

    return jax.vmap(draw)(keys[::num_siblings]).reshape(shape)


def _share_out(score: Float32[Array, "R"], noisy: Float32[Array, "R C"]) -> Float32[Array, "R C"]:
    """Noisy log-probabilities given that their largest is `score`; their order stays.

    The paper's appendix B.3: -log(exp(-score) - exp(-largest) + exp(-noisy)), in a form that
    neither overflows nor cancels.
    """
    # The largest is known by its place: a compiler may compute `noisy` once for the maximum and
    # again, rounded otherwise, for the difference, which is then not 0 or even above it.
    largest = jnp.arange(noisy.shape[-1]) == noisy.argmax(-1, keepdims=True)
    gap = jnp.where(largest, 0.0, jnp.minimum(noisy - noisy.max(-1, keepdims=True), 0.0))
    # log(1 - exp(gap)), each form where it is exact.
    rest = jnp.where(gap > -0.7, jnp.log(-jnp.expm1(gap)), jnp.log1p(-jnp.exp(gap)))
    below = score[:, None] - noisy + rest
    return score[:, None] - jnp.maximum(below, 0) - jnp.log1p(jnp.exp(-jnp.abs(below)))


def _take(array: Array, index: Array) -> Array:
    return jnp.take_along_axis(array, index, 1, mode="promise_in_bounds")
