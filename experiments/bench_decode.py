"""Suite "decode" of bench.py: step decoding against transformers, its roofs, and token accounting.

Ours is `decode_steps`, with the step rule and answer rule that a search gives it, greedy, as the
root is grown: behind the prompt there is no path yet. Every row runs to the end. The other side is
`bench_transformers.py`, a process of its own. The two alternate (A/B/A/B) in one run. Both forward
the same prompt once outside of the clock and then the same number of tokens per row.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_timing import busy_share
from side_process import SideProcess

from rlm_jax.evaluation import build, solver
from rlm_jax.evaluation.build import Policy
from rlm_jax.inference.decode import decode_steps
from rlm_jax.inference.extend import extend, last_hidden
from rlm_jax.inference.pages import (
    count_pages,
    gather_prompts,
    make_pages,
    write_prompts,
)
from rlm_jax.inference.sampling import SamplingConfig
from rlm_jax.models.load import find_model
from rlm_jax.models.params import count_params
from rlm_jax.models.quantize import QUANTIZATIONS
from rlm_jax.tasks.base import Problem
from rlm_jax.text.answers import init_answer_state, make_answer_rule
from rlm_jax.text.steps import StepSpec, make_step_rule

PAGE_TOKENS = 4
OTHER_SCRIPT = "bench_transformers.py"
HOW_TO_GET_OTHER = "pip install torch transformers, or --other_python=PATH of a Python with both"
QUESTIONS = (
    "Ben has 3 boxes of 12 pens and gives 7 pens away. How many pens are left?",
    "A train covers 60 miles in an hour. How far does it go in 4 hours?",
)


class Times(NamedTuple):
    """Seconds of each repeat, ours and the other's (none where it is absent)."""

    ours: list[float]
    other: list[float]


class Roofs(NamedTuple):
    """What this machine does at best, measured in this process."""

    flops_per_second: float
    bytes_per_second: float


def run_decode(
    config: Mapping[str, Any],
    *,
    rows: Sequence[int],
    context_tokens: int,
    new_tokens: int,
    repeats: int,
    dtypes: Sequence[str],
    other_python: str | None,
) -> Iterator[dict[str, Any]]:
    """The suite's cases, one after the other.

    Args:
      config: its model is measured; its searches are counted. other_python: None leaves the other
        side out.
    """
    model = config["model"]
    other = None if other_python is None else SideProcess(other_python, OTHER_SCRIPT)
    try:
        for dtype in dtypes:
            wide, quantize = ("float32", dtype) if dtype in QUANTIZATIONS else (dtype, None)
            policy = build.load_policy(model, wide, quantize)
            missing = load_other(other, model, wide)
            roofs = measure_roofs(dtype)
            for num_rows in rows:
                yield _decode_case(
                    policy, dtype, num_rows, context_tokens, new_tokens, repeats, roofs,
                    None if missing else other, missing,
                )  # fmt: skip
        yield from account_search(config, build.load_policy(model, "float32"))
    finally:
        if other is not None:
            other.close()


def measure_roofs(dtype: str, repeats: int = 5) -> Roofs:
    """Peak of a large matmul in `dtype`, and of reading 512 MiB of float32 (sum or product)."""
    size = 2048
    square = jnp.ones((size, size), dtype)
    result = jnp.int32 if dtype == "int8" else None
    contract = (((1,), (1,)), ((), ()))
    multiply = jax.jit(
        lambda a, b: jax.lax.dot_general(a, b, contract, preferred_element_type=result)
    )
    stream = jnp.ones((128 * 1024, 1024), jnp.float32)
    add_up = jax.jit(lambda x: x.reshape(128, -1).sum(1))
    product = jax.jit(lambda x: x @ jnp.ones(1024))
    # The first call of each compiles; it is never the quickest.
    flops = 2 * size**3 / min(_time(lambda: multiply(square, square), repeats))
    seconds = [min(_time(lambda f=f: f(stream), repeats)) for f in (add_up, product)]
    return Roofs(flops, stream.nbytes / min(seconds))


def make_decoder(
    policy: Policy, num_rows: int, prompt: Sequence[int], new_tokens: int
) -> tuple[Callable[[], Any], float]:
    """A prefilled, compiled call of `decode_steps`, and the seconds its compilation took."""
    cfg, tokenizer = policy.cfg, policy.tokenizer
    width = count_pages(len(prompt), PAGE_TOKENS) * PAGE_TOKENS
    slots = count_pages(new_tokens, PAGE_TOKENS) * PAGE_TOKENS
    rule = make_step_rule(StepSpec("fixed", new_tokens), tokenizer)
    # Nothing but the length ends a row, so that all rows do the same work on both sides.
    rule = jax.device_put(dataclasses.replace(rule, final=jnp.zeros(tokenizer.vocab_size, bool)))
    answer_rule = jax.device_put(make_answer_rule(tokenizer))
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt)], jnp.int32)

    @jax.jit
    def prefill(params):
        done = extend(params, jnp.asarray(tokens), lengths, cfg=cfg)
        pages = make_pages(
            cfg,
            lengths,
            num_nodes=2,
            num_pages=count_pages(width, PAGE_TOKENS) + 1,
            num_prompt_pages=count_pages(width, PAGE_TOKENS),
            num_path_pages=count_pages(512, PAGE_TOKENS),
            page_tokens=PAGE_TOKENS,
            dtype=done.hidden.dtype,
        )
        return write_prompts(pages, lengths * 0, done.caches, lengths), last_hidden(
            done.hidden, lengths
        )

    @jax.jit
    def decode(params, pages, hidden, rule, answer_rule):
        zeros = jnp.zeros(num_rows, jnp.int32)
        steps = decode_steps(
            params,
            jax.random.split(jax.random.key(0), num_rows),
            jnp.broadcast_to(hidden, (num_rows, hidden.shape[-1])),
            init_answer_state(zeros),
            cfg=cfg,
            contexts=(gather_prompts(pages),),
            starts=zeros + len(prompt),
            limits=zeros + new_tokens,
            rule=rule,
            answer_rule=answer_rule,
            sampling=SamplingConfig("greedy"),
            num_siblings=num_rows,
            num_slots=slots,
        )
        return steps.tokens, steps.logprob, steps.hidden, steps.caches

    pages, hidden = jax.block_until_ready(prefill(policy.params))
    args = (policy.params, pages, hidden, rule, answer_rule)
    started = time.perf_counter()
    compiled = decode.lower(*args).compile()
    return lambda: compiled(*args), time.perf_counter() - started


def account_search(config: Mapping[str, Any], policy: Policy) -> Iterator[dict[str, Any]]:
    """Counts, over real searches: tokens forwarded, KV bytes per node, rows in use.

    Exact and independent of the machine. `forwarded_ratio` is (prefilled + generated tokens) over
    (prompt + tokens of the structure's nodes); `kv_bytes_per_node` is the bytes of the pages a
    search took, prompts apart, over the bytes of the tokens of the nodes that hold pages.
    """
    problems = [Problem(question, id=f"bench-{i}") for i, question in enumerate(QUESTIONS)]
    for name in ("best_of_n", "puct"):
        plan = build.plan_strategy(config, name)
        one = build.build_solver(config, plan, policy, seed=0, batch_size=len(problems))
        encoded = [solver.encode(one, problem) for problem in problems]
        structure, world = solver.search_batch(one, encoded)
        budget = jax.device_get(structure.budget)
        inside = np.arange(structure.capacity)[None] < np.asarray(structure.num_nodes)[:, None]
        inside[:, 0] = False
        length = np.asarray(structure.span_length)
        own = int(length[inside].sum())
        prompt = int(length[:, 0].sum())
        forwarded = int(budget.generated_tokens.sum() + budget.prefilled_tokens.sum())
        paged = inside & np.asarray(structure.alive)
        pages = int((np.asarray(world.pages.owner) > 0).sum())
        rows = one.strategy.num_lanes * one.strategy.num_children
        calls = int((budget.model_calls - 1).sum())
        token_bytes = _token_bytes(policy, "float32")
        shared = {"strategy": name, "problems": len(problems), "seed": 0}
        yield {
            "case": "forwarded_ratio", "ours": forwarded, "other": own + prompt,
            "ratio": forwarded / (own + prompt), "unit": "tokens", **shared,
        }  # fmt: skip
        yield {
            "case": "kv_bytes_per_node", "ours": pages * world.pages.page_tokens * token_bytes,
            "other": int(length[paged].sum()) * token_bytes,
            "ratio": pages * world.pages.page_tokens / length[paged].sum(), "unit": "bytes",
            "nodes": int(paged.sum()), **shared,
        }  # fmt: skip
        yield {
            "case": "row_utilisation", "ours": int(budget.generated_tokens.sum()),
            "other": calls * rows, "ratio": int(budget.generated_tokens.sum()) / (calls * rows),
            "unit": "row steps", **shared,
        }  # fmt: skip


def _decode_case(policy, dtype, num_rows, context_tokens, new_tokens, repeats, roofs, other, note):
    rng = np.random.default_rng(0)
    prompt = [int(t) for t in rng.integers(10, policy.cfg.vocab_size - 10, context_tokens)]
    decode, compile_seconds = make_decoder(policy, num_rows, prompt, new_tokens)
    cache = None
    if other is not None:
        cache = other.ask("prefill", prompt=prompt, rows=num_rows, new_tokens=new_tokens)["cache"]
    jax.block_until_ready(decode())
    times, busy, agree = Times([], []), busy_share(), None
    for _ in range(repeats):
        times.ours.extend(_time(decode, 1))
        if other is not None:
            answer = other.ask("decode")
            times.other.append(answer["seconds"])
            agree = _agreement(np.asarray(decode()[0])[:, :new_tokens], answer.get("tokens"))
    num_tokens = num_rows * new_tokens
    ours, theirs = (num_tokens / min(t) if t else None for t in times)
    step_seconds = min(times.ours) / new_tokens
    read, flops = _step_cost(policy, dtype, num_rows, context_tokens)
    return {
        "case": f"decode_{dtype}_{num_rows}", "ours": ours, "other": theirs,
        "ratio": ours / theirs if ours and theirs else None, "unit": "tokens/s",
        "ours_median": num_tokens / statistics.median(times.ours),
        "other_median": num_tokens / statistics.median(times.other) if times.other else None,
        "other_is": f"transformers {cache} cache" if cache else note,
        "rows": num_rows, "dtype": dtype, "context": context_tokens, "new_tokens": new_tokens,
        "repeats": repeats, "same_first_tokens": agree,
        "bandwidth_roof_share": read / roofs.bytes_per_second / step_seconds,
        "matmul_roof_share": flops / roofs.flops_per_second / step_seconds,
        "roof_gb_per_second": roofs.bytes_per_second / 1e9,
        "roof_gflop_per_second": roofs.flops_per_second / 1e9,
        "compile_seconds": compile_seconds, "machine_busy_before": busy,
    }  # fmt: skip


def _step_cost(policy: Policy, dtype: str, rows: int, context: int) -> tuple[float, float]:
    """Bytes one decoding step must read (weights and shared KV), and its floating operations."""
    cfg, weights = policy.cfg, count_params(policy.cfg)
    stored = sum(array.nbytes for array in jax.tree.leaves(policy.params))
    attention = 4 * cfg.num_layers * context * cfg.num_heads * cfg.head_dim
    kept = context * _token_bytes(policy, "float32" if dtype == "int8" else dtype)
    return stored + kept, rows * (2.0 * weights + attention)


def _token_bytes(policy: Policy, dtype: str) -> int:
    """Bytes of one token's keys and values in all layers."""
    cfg = policy.cfg
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * jnp.dtype(dtype).itemsize


def load_other(other: SideProcess | None, model: str, dtype: str) -> str | None:
    """Loads the other side; says what is missing where it cannot."""
    if other is None:
        return "left out (--only_ours)"
    if model.startswith("random:"):
        return "a random model has no file for the other side"
    try:
        other.ask("load", model=str(find_model(model)), dtype=dtype)
    except RuntimeError as error:
        return f"not here ({error}): {HOW_TO_GET_OTHER}"
    return None


def _agreement(ours: np.ndarray, theirs: Any) -> float | None:
    """Share of rows' leading tokens on which both sides agree (random prompts end in near-ties)."""
    if theirs is None:
        return None
    same = np.asarray(theirs)[:, : ours.shape[1]] == ours
    return float(np.cumprod(same, 1).mean())


def _time(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return seconds
