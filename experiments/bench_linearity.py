"""Suite "memory", part "linearity": does a simulation cost more in a larger search?

T(4N) / 4 T(N) of Gumbel with one lane per child. A larger tree is deeper, so each simulation
descends and climbs more levels: that is what a search over small networks spends its time on. A
search over a language model hardly notices that, but rounds of halving are narrower in a larger
search, and a call of fewer rows costs more a row; filled rounds (`visits_per_round`) are as wide in
any search. All of that is measured.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from bench_language import Sizes, make_language_model, make_prompts
from bench_language import search_ours as search_language
from bench_small import NUM_ACTIONS, WIDTH, init_networks, make_strategy, search_for_depth
from bench_timing import Compiled, Patience, compile_call, time_pair

from rlm_jax.evaluation.build import Policy
from rlm_jax.reasoning.language import LanguageModel


@dataclasses.dataclass(frozen=True)
class LinearitySizes:
    """forms: of Gumbel. simulations: the N. batches, language_batches: structures. num_children,
    step_tokens: of the language model's searches, whose N language_simulations are."""

    forms: Sequence[str] = ("gumbel", "gumbel_filled")
    simulations: Sequence[int] = (8, 32, 128)
    batches: Sequence[int] = (1, 16)
    language_simulations: Sequence[int] = (8, 32, 128)
    language_batches: Sequence[int] = (1, 4)
    num_children: int = 16
    step_tokens: int = 8
    context_tokens: int = 64


def run_linearity(
    policy: Policy, sizes: LinearitySizes, patience: Patience
) -> Iterator[dict[str, Any]]:
    """The part's cases; policy: the language model."""
    yield from measure_small(sizes, patience)
    yield from measure_language(policy, sizes, patience)


def measure_small(sizes: LinearitySizes, patience: Patience) -> Iterator[dict[str, Any]]:
    """Over small networks; the ratio stands there over that of the mean depths too."""
    params = init_networks(jax.random.key(0))
    for batch in sizes.batches:
        states = jax.random.normal(jax.random.key(1), (batch, WIDTH))
        for form, number in itertools.product(sizes.forms, sizes.simulations):
            compile_search = functools.partial(_compile_small, form, params, states)
            case, programs = _compare(compile_search, number, batch, NUM_ACTIONS, patience)
            depths = [float(program.call()) for program in programs]
            per_level = case["ratio"] * depths[1] / depths[0]
            about = {"ratio_per_level": per_level, "mean_depths": depths}
            yield {"case": f"linearity_{form}", **case, **about}


def measure_language(
    policy: Policy, sizes: LinearitySizes, patience: Patience
) -> Iterator[dict[str, Any]]:
    """Over a language model."""
    lm = make_language_model(policy, sizes.step_tokens)
    for batch in sizes.language_batches:
        size = Sizes(
            batch=batch,
            num_children=sizes.num_children,
            step_tokens=sizes.step_tokens,
            context_tokens=sizes.context_tokens,
            max_depth=16,
        )
        prompts = make_prompts(policy, size)
        for form, number in itertools.product(sizes.forms, sizes.language_simulations):
            compile_search = functools.partial(_compile_language, form, policy, lm, size, prompts)
            case, _ = _compare(compile_search, number, batch, sizes.num_children, patience)
            yield {"case": f"linearity_{form}_language", **case, "model": policy.version}


def _compile_small(form: str, params: Any, states: jax.Array, num_simulations: int) -> Compiled:
    strategy = make_strategy(form, num_simulations, NUM_ACTIONS)
    search = functools.partial(search_for_depth, strategy, num_simulations)
    return compile_call(search, params, states)


def _compile_language(
    form: str,
    policy: Policy,
    lm: LanguageModel,
    size: Sizes,
    prompts: jax.Array,
    num_simulations: int,
) -> Compiled:
    passes = size.num_children if form == "gumbel_filled" else 1
    size = dataclasses.replace(size, num_simulations=num_simulations, visits_per_round=passes)
    search = functools.partial(search_language, policy.cfg, size, size.num_children)
    return compile_call(search, lm, prompts)


def _compare(
    compile_search: Callable[[int], Compiled],
    number: int,
    batch: int,
    num_lanes: int,
    patience: Patience,
) -> tuple[dict[str, Any], tuple[Compiled, Compiled]]:
    """Searches of 4 `number` and of `number` simulations in turn, and the two programs."""
    four, one = compile_search(4 * number), compile_search(number)
    times = time_pair(four.call, one.call, patience)
    ours, other = min(times.ours), min(times.other)
    case = {
        "ours": ours,
        "other": 4 * other,
        "ratio": ours / (4 * other),
        "unit": "s (other: four searches of a quarter)",
        "at_most": 1.1,
        "batch": batch,
        "simulations": 4 * number,
        "leaves": num_lanes,
        "calls": [len(times.ours), len(times.other)],
        "machine_busy_before": times.busy,
    }
    return case, (four, one)
