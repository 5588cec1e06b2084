"""Suite "search", a language model: our Gumbel search against mctx's with the same model and steps.

Both sides decode K sampled steps of S tokens below every node they visit, by the same functions,
and judge a node by the likelihood of its path. What differs is how a node keeps what it stands for:

    ours       pages: a node's keys and values are written once, W leaves go into one call
    rows       mctx, a node's embedding is the tokens of its path: every simulation prefills it anew
               in each of the K rows that sample a step, as `generate` does with K samples of a text
    recompute  the same, prefilled once for all K rows: our own attention over a shared prefix
    dense      mctx, it is a buffer of keys and values as long as the longest path: every simulation
               copies its parent's and forwards the chosen step

All mctx forms prefill and attend over no more than they must: for each call the shortest of
a few buffer lengths that holds the longest path of the batch.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_timing import Patience, compile_call, describe_pair, program_bytes, time_pair

from rlm_jax.core.struct import struct
from rlm_jax.evaluation import build
from rlm_jax.evaluation.build import Policy
from rlm_jax.inference.attention import Context, split_caches
from rlm_jax.inference.decode import decode_steps
from rlm_jax.inference.extend import extend, last_hidden
from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.params import init_params
from rlm_jax.reasoning.drive import Limits, run_compiled
from rlm_jax.reasoning.language import LanguageConfig, LanguageModel, begin, make_expand
from rlm_jax.reasoning.strategies.gumbel import make_gumbel
from rlm_jax.text.answers import init_answer_state, make_answer_rule
from rlm_jax.text.steps import StepSpec, make_step_rule
from rlm_jax.text.tokenizer import ByteTokenizer

HOW_TO_GET_MCTX = "pip install mctx"
FORMS = ("rows", "recompute", "dense")
EIGHT_MILLION = ModelConfig(
    vocab_size=ByteTokenizer.vocab_size,
    num_layers=10,
    model_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    ffn_dim=768,
    tie_embeddings=True,
    eos_ids=ByteTokenizer.eos_ids,
    bos_id=ByteTokenizer.bos_id,
)
SAMPLING = SamplingConfig("sample", temperature=0.8, top_k=32)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is searched: B prompts of context_tokens each, num_simulations visits of K sampled steps
    of step_tokens tokens. Paths have room for max_depth steps, which no search should reach: where
    ours stops to grow, mctx decodes the last node's steps once more. visits_per_round: of a child,
    in ours."""

    batch: int
    num_simulations: int = 32
    num_children: int = 16
    step_tokens: int = 16
    context_tokens: int = 192
    max_depth: int = 8
    visits_per_round: int = 1

    @property
    def path_tokens(self) -> int:
        """Tokens of the longest path, its prompt included."""
        return self.context_tokens + self.max_depth * self.step_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens decoded: K steps below the root and below each visited node."""
        return self.batch * (1 + self.num_simulations) * self.num_children * self.step_tokens


def run_language(
    config: Mapping[str, Any],
    *,
    models: Sequence[str],
    batches: Sequence[int],
    leaves: Sequence[int],
    sizes: Sizes,
    patience: Patience,
    with_other: bool = True,
) -> Iterator[dict[str, Any]]:
    """Tokens per second and memory, one case each for every model, batch, W and form of mctx."""
    found = with_other and importlib.util.find_spec("mctx") is not None
    for name in models:
        policy = load(config, name)
        lm = make_language_model(policy, sizes.step_tokens)
        for batch in batches:
            size = dataclasses.replace(sizes, batch=batch)
            prompts = make_prompts(policy, size)
            others = {}
            for form in FORMS if found else ():
                search = functools.partial(search_mctx, form, policy.cfg, size)
                others[form] = compile_call(search, lm, prompts)
            for num_lanes in leaves:
                ours = compile_call(
                    functools.partial(search_ours, policy.cfg, size, num_lanes), lm, prompts
                )
                for form in others or ("mctx",):
                    about = {"model": name, "leaves": num_lanes}
                    yield from _compare(
                        policy.cfg, lm, size, ours, form, others.get(form), patience, about
                    )


def load(config: Mapping[str, Any], name: str) -> Policy:
    """The model to measure: "8m" (random, byte-level), "config", or what `load_policy` takes.

    Raises:
      FileNotFoundError, ValueError: as `load_policy`.
    """
    if name == "8m":
        tokenizer: Any = ByteTokenizer()
        params = init_params(jax.random.key(0), EIGHT_MILLION)
        return Policy(params, EIGHT_MILLION, tokenizer, None, name)
    return build.load_policy(config["model"] if name == "config" else name)


def make_language_model(policy: Policy, step_tokens: int) -> LanguageModel:
    """The model with steps that end by their length alone, so that both sides do the same work."""
    rule = make_step_rule(StepSpec("fixed", step_tokens), policy.tokenizer)
    rule = dataclasses.replace(rule, final=jnp.zeros(policy.tokenizer.vocab_size, bool))
    answers = make_answer_rule(policy.tokenizer)
    return jax.device_put(LanguageModel(policy.params, rule, answers))


def make_prompts(policy: Policy, size: Sizes) -> jax.Array:
    """Random prompts, [B, context_tokens]."""
    rng = np.random.default_rng(0)
    shape = (size.batch, size.context_tokens)
    return jnp.asarray(rng.integers(10, policy.cfg.vocab_size - 10, shape), jnp.int32)


# Ours.


def make_language_config(cfg: ModelConfig, size: Sizes) -> LanguageConfig:
    """Room for every step that is decoded, one page each."""
    return LanguageConfig(
        model=cfg,
        sampling=SAMPLING,
        evaluator="likelihood",
        judge="visit",
        num_nodes=1 + (1 + size.num_simulations) * size.num_children,
        max_depth=size.max_depth,
        max_new_tokens=size.num_tokens // size.batch,
        page_tokens=size.step_tokens,
    )


def search_ours(
    cfg: ModelConfig, size: Sizes, num_lanes: int, lm: LanguageModel, prompts: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Visits of the root's children [B, K], tokens generated and calls of the model [B]."""
    language = make_language_config(cfg, size)
    strategy = make_gumbel(
        num_simulations=size.num_simulations,
        max_considered=size.num_children,
        gumbel_scale=0.0,
        num_children=size.num_children,
        num_lanes=num_lanes,
        max_depth=size.max_depth,
        visits_per_round=size.visits_per_round,
        judge="visit",
    )
    lengths = jnp.full(size.batch, size.context_tokens, jnp.int32)
    structure, world = begin(lm, prompts, lengths, cfg=language)
    keys = jax.random.split(jax.random.key(0), size.batch)
    expand = make_expand(language)
    structure, _ = run_compiled(
        strategy, expand, lm, keys, world, structure, limits=Limits(step_tokens=size.step_tokens)
    )
    visits = structure.visits[:, 1 : size.num_children + 1]
    return visits, structure.budget.generated_tokens, structure.budget.model_calls


def our_node_bytes(cfg: ModelConfig, size: Sizes, lm: LanguageModel) -> float:
    """Bytes of a structure's nodes and of all they refer to, per decoded step."""
    language = make_language_config(cfg, size)

    def make(lm):
        prompts = jnp.zeros((size.batch, size.context_tokens), jnp.int32)
        lengths = jnp.full(size.batch, size.context_tokens, jnp.int32)
        return begin(lm, prompts, lengths, cfg=language)

    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(make, lm)))
    return held / (size.batch * (language.num_nodes - 1))


# mctx's.


@struct
class Node:
    """A node's embedding: its path and the K steps that were sampled below it.

    tokens: the path's, or of no use where keys and values are kept. length: of the path. steps,
    logprobs: of the children. path_logprob: sum over the path's generated tokens. keys, values: per
    layer [B, G, E, C] and [B, G, C, E] where they are kept, else empty.
    """

    tokens: jax.Array
    length: jax.Array
    steps: jax.Array
    logprobs: jax.Array
    path_logprob: jax.Array
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class Prefix(NamedTuple):
    """What rows decode from: a context, a group per structure or per row, and the state after the
    last token of each group."""

    context: Context
    hidden: jax.Array


def search_mctx(
    form: str, cfg: ModelConfig, size: Sizes, lm: LanguageModel, prompts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same of mctx, nodes kept in one of `FORMS`."""
    mctx: Any = importlib.import_module("mctx")  # Its dataclasses hide their fields from checkers.
    visit = {
        "rows": functools.partial(_visit_tokens, copies=size.num_children),
        "recompute": functools.partial(_visit_tokens, copies=1),
        "dense": _visit_dense,
    }[form]

    def recurrent(lm, key, action, node):
        node, logits, value = visit(cfg, size, lm, key, action, node)
        output = mctx.RecurrentFnOutput(
            reward=jnp.zeros_like(value),
            discount=jnp.ones_like(value),
            prior_logits=logits,
            value=value,
        )
        return output, node

    node, logits, value = _plant(form, cfg, size, lm, prompts)
    root = mctx.RootFnOutput(prior_logits=logits, value=value, embedding=node)
    policy = mctx.gumbel_muzero_policy(
        lm,
        jax.random.key(0),
        root,
        recurrent,
        size.num_simulations,
        max_depth=size.max_depth,
        max_num_considered_actions=size.num_children,
        gumbel_scale=0.0,
    )
    visits = policy.search_tree.summary().visit_counts
    calls = (policy.search_tree.node_visits > 0).sum(-1)
    return visits, calls * size.num_children * size.step_tokens


def mctx_node_bytes(form: str, cfg: ModelConfig, size: Sizes, lm: LanguageModel) -> float:
    """Bytes of one embedding."""
    prompts = jnp.zeros((size.batch, size.context_tokens), jnp.int32)
    node = jax.eval_shape(functools.partial(_plant, form, cfg, size), lm, prompts)[0]
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(node)) / size.batch


def buffer_lengths(size: Sizes) -> list[int]:
    """Lengths of path that programs are compiled for: up to two steps, then twice as many, ..."""
    steps = [2**power for power in range(1, size.max_depth.bit_length() + 1)]
    capped = sorted({min(number, size.max_depth) for number in steps})
    return [size.context_tokens + number * size.step_tokens for number in capped]


def _plant(form, cfg, size, lm, prompts):
    """The root's embedding, logits and value."""
    batch, width = prompts.shape
    room = size.path_tokens
    length = jnp.full(batch, width, jnp.int32)
    done = extend(lm.policy, prompts, length, cfg=cfg)
    keys, values = split_caches(done.caches)
    prefix = Prefix(_context(keys, values, length), last_hidden(done.hidden, length))
    spare, whole = (0, room - width), (0, 0)
    kept = form == "dense"
    tokens = jnp.pad(prompts, ((0, 0), (0, room - width)))
    node = Node(
        tokens=tokens[:, :0] if kept else tokens,
        length=length,
        steps=jnp.zeros((batch, size.num_children, size.step_tokens), jnp.int32),
        logprobs=jnp.zeros((batch, size.num_children)),
        path_logprob=jnp.zeros(batch),
        keys=tuple(jnp.pad(k, (whole, whole, whole, spare)) for k in keys) if kept else (),
        values=tuple(jnp.pad(v, (whole, whole, spare, whole)) for v in values) if kept else (),
    )
    return _sample_below(cfg, size, lm, jax.random.key(1), node, prefix)


def _visit_tokens(cfg, size, lm, key, action, node: Node, *, copies: int):
    """Appends the chosen step to the path and prefills all of it, so many times."""
    node, chosen = _descend(size, node, action)
    rows = jnp.arange(size.batch)[:, None]
    at = node.length[:, None] - size.step_tokens + jnp.arange(size.step_tokens)
    node = dataclasses.replace(node, tokens=node.tokens.at[rows, at].set(chosen, mode="drop"))

    def visit(width: int):
        tokens, length = (jnp.repeat(x, copies, 0) for x in (node.tokens[:, :width], node.length))
        done = extend(lm.policy, tokens, length, cfg=cfg)
        context = _context(*split_caches(done.caches), length)
        prefix = Prefix(context, last_hidden(done.hidden, length))
        return _sample_below(cfg, size, lm, key, node, prefix)

    return _in_shortest(size, node, visit)


def _visit_dense(cfg, size, lm, key, action, node: Node):
    """Forwards the chosen step behind the keys and values of its path, and adds its own."""
    above = node.length
    node, chosen = _descend(size, node, action)
    rows = jnp.arange(size.batch)[:, None]
    at = above[:, None] + jnp.arange(size.step_tokens)

    def put_keys(buffer, new):
        return buffer.at[rows, :, :, at].set(new.transpose(0, 3, 1, 2), mode="drop")

    def put_values(buffer, new):
        return buffer.at[rows, :, at].set(new.transpose(0, 2, 1, 3), mode="drop")

    def visit(width: int):
        keys = tuple(k[..., :width] for k in node.keys)
        values = tuple(v[:, :, :width] for v in node.values)
        done = extend(
            lm.policy,
            chosen,
            jnp.full(size.batch, size.step_tokens, jnp.int32),
            cfg=cfg,
            contexts=(_context(keys, values, above),),
            starts=above,
        )
        new = split_caches(done.caches)
        own = Context(*new, at, at >= 0)
        decoded = _sample_below(
            cfg, size, lm, key, node,
            Prefix(_context(keys, values, above), done.hidden[:, -1]), (own,),
        )  # fmt: skip
        return decoded, *new

    (node, logits, value), keys, values = _in_shortest(size, node, visit)
    node = dataclasses.replace(
        node,
        keys=tuple(map(put_keys, node.keys, keys)),
        values=tuple(map(put_values, node.values, values)),
    )
    return node, logits, value


def _in_shortest(size: Sizes, node: Node, visit: Callable[[int], Any]) -> Any:
    """`visit` with the shortest buffer that holds every path of the batch."""
    widths = buffer_lengths(size)
    branch = (node.length.max() > jnp.asarray(widths[:-1], jnp.int32)).sum()
    return jax.lax.switch(branch, [functools.partial(visit, width) for width in widths])


def _descend(size: Sizes, node: Node, action: jax.Array) -> tuple[Node, jax.Array]:
    """The chosen child, without its own children yet, and the tokens of its step."""
    rows = jnp.arange(size.batch)
    path_logprob = node.path_logprob + node.logprobs[rows, action]
    longer = dataclasses.replace(
        node, length=node.length + size.step_tokens, path_logprob=path_logprob
    )
    return longer, node.steps[rows, action]


def _sample_below(cfg, size, lm, key, node: Node, prefix: Prefix, own: tuple[Context, ...] = ()):
    """Decodes K steps below a node: its embedding with them, their logits, and its own value."""
    num_rows = size.batch * size.num_children
    siblings = num_rows // len(prefix.hidden)
    steps = decode_steps(
        lm.policy,
        jax.random.split(key, num_rows),
        jnp.repeat(prefix.hidden, siblings, 0),
        init_answer_state(jnp.zeros(num_rows, jnp.int32)),
        cfg=cfg,
        contexts=(prefix.context, *own),
        starts=jnp.repeat(node.length, size.num_children),
        limits=jnp.full(num_rows, size.step_tokens, jnp.int32),
        rule=lm.step_rule,
        answer_rule=lm.answer_rule,
        sampling=SAMPLING,
        num_siblings=siblings,
        num_slots=size.step_tokens,
    )
    shape = (size.batch, size.num_children)
    logprobs = steps.logprob.reshape(shape)
    node = dataclasses.replace(node, steps=steps.tokens.reshape(*shape, -1), logprobs=logprobs)
    generated = jnp.maximum(node.length - size.context_tokens, 1)
    return node, logprobs / size.step_tokens, jnp.exp(node.path_logprob / generated)


def _context(keys, values, lengths) -> Context:
    """Keys and values of paths that begin at position 0, as one context."""
    positions = jnp.broadcast_to(jnp.arange(keys[0].shape[3]), (len(lengths), keys[0].shape[3]))
    return Context(keys, values, positions, positions < lengths[:, None])


# Both.


def _compare(cfg, lm, size, ours, form, other, patience, about):
    """The case of time and the case of memory of one pair."""
    _, decoded, model_calls = (np.asarray(part) for part in ours.call())
    assert decoded.sum() == size.num_tokens, (decoded, size.num_tokens)
    theirs = []

    def call_other():
        theirs[:] = [other.call()]
        return theirs

    times = time_pair(ours.call, None if other is None else call_other, patience)
    about |= {
        "batch": size.batch,
        "simulations": size.num_simulations,
        "children": size.num_children,
        "step_tokens": size.step_tokens,
        "context": size.context_tokens,
        "max_depth": size.max_depth,
        "tokens": [int(decoded.sum()), int(theirs[0][1].sum()) if theirs else None],
        "other_is": f"mctx, {form}",
    }
    if other is None:
        about["other_is"] = f"left out (--only_ours), or not here: {HOW_TO_GET_MCTX}"
    # The prefill is a call of its own; in every other, W * K rows of each structure take part.
    rows = (model_calls.max() - 1) * size.batch * about["leaves"] * size.num_children
    yield {
        "case": f"language_{form}",
        **describe_pair(times, size.num_tokens),
        "unit": "decoded tokens/s",
        **about,
        "rows_in_use": float(decoded.sum() / rows),
        "compile_seconds": [ours.seconds, None if other is None else other.seconds],
    }
    held = [program_bytes(side.memory) for side in (ours, other) if side is not None]
    yield {
        "case": f"language_{form}_memory",
        "ours": held[0],
        "other": held[1] if other is not None else None,
        "ratio": held[1] / held[0] if other is not None else None,
        "unit": "bytes of the program (ratio: other over ours)",
        **about,
        "parameter_bytes": sum(a.nbytes for a in jax.tree.leaves(lm.policy)),
        "node_bytes": [
            our_node_bytes(cfg, size, lm),
            mctx_node_bytes(form, cfg, size, lm) if other is not None else None,
        ],
    }
