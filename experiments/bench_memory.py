"""Suite "memory" of bench.py: what a node takes, and how time grows with trees.

Parts, each beside what it should be at most:

    nodes        bytes per node over what its pages and rows need, at several depths: what the
                 compiled program adds for each node more, and what is alive after a run
    large        peak memory of a process that searches thousands of nodes with the config's model
    capacity     seconds per expansion as the capacity N grows, expansions being equal
    bookkeeping  seconds of a search whose expander does nothing, over those of the real one
    linearity    T(4N) / 4 T(N) of Gumbel, as it is and with filled rounds, over small networks and
                 over a language model

The program is its own other side in part "large": peak memory can be asked of a process alone.
"""

import dataclasses
import functools
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_language import SAMPLING, load, make_language_model
from bench_linearity import LinearitySizes, run_linearity
from bench_timing import Compiled, Patience, Prepared, compile_call, program_bytes, time_pair
from side_process import SideProcess, serve

from rlm_jax.core.budget import zero_budget
from rlm_jax.evaluation import build
from rlm_jax.evaluation.build import Policy
from rlm_jax.reasoning.drive import Limits, run_compiled
from rlm_jax.reasoning.language import LanguageConfig, begin, make_expand
from rlm_jax.reasoning.protocol import Outcome
from rlm_jax.reasoning.strategies.puct import make_puct
from rlm_jax.reasoning.structure import make_structure

PARTS = ("nodes", "large", "capacity", "bookkeeping", "linearity")
GIBIBYTE = 1 << 30
_LARGER = 4  # Times as many nodes, where two sizes tell what a node takes.


@dataclasses.dataclass(frozen=True)
class MemorySizes:
    """What parts measure.

    model: see `bench_language.load`. depths, num_nodes, capacities: each one case. num_structures,
    large_nodes: of part "large", nodes per structure; large_expansions: 0 to fill them all.
    num_expansions: of part "capacity", and rounds of part "bookkeeping", of W leaves each.
    """

    model: str = "8m"
    depths: Sequence[int] = (4, 16, 64)
    num_nodes: int = 64
    capacities: Sequence[int] = (64, 512, 4096)
    num_expansions: int = 15
    leaves: Sequence[int] = (1, 4)
    num_children: int = 4
    step_tokens: int = 16
    context_tokens: int = 64
    num_structures: int = 16
    large_nodes: int = 256
    large_children: int = 5
    large_expansions: int = 0
    large_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Search:
    """One search: B structures of N nodes, expanded until they are full or num_expansions are
    done."""

    batch: int
    num_nodes: int
    num_children: int
    num_lanes: int
    step_tokens: int
    context_tokens: int
    max_depth: int
    num_expansions: int

    def strategy(self):
        """PUCT; the root's expansion is no simulation."""
        return make_puct(
            num_children=self.num_children,
            num_lanes=self.num_lanes,
            max_depth=self.max_depth,
            num_simulations=max(self.num_expansions - 1, 1),
        )

    def language(self, policy: Policy) -> LanguageConfig:
        """Room for every node's step."""
        return LanguageConfig(
            model=policy.cfg,
            sampling=SAMPLING,
            evaluator="likelihood",
            num_nodes=self.num_nodes,
            max_depth=self.max_depth,
            max_new_tokens=self.num_nodes * self.step_tokens,
            page_tokens=self.step_tokens,
        )


def run_memory(
    config: Mapping[str, Any], *, parts: Sequence[str], sizes: MemorySizes, patience: Patience
) -> Iterator[dict[str, Any]]:
    """The suite's cases, one after the other; `parts`: of `PARTS`."""
    if "large" in parts:
        # First: a process that starts when this one is small finds more memory free.
        yield measure_large(config["model"], sizes)
    if set(parts) <= {"large"}:
        return
    policy = load(config, sizes.model)
    if "nodes" in parts:
        yield from measure_nodes(policy, sizes)
    if "capacity" in parts:
        yield from measure_capacity(policy, sizes, patience)
    if "bookkeeping" in parts:
        yield from measure_bookkeeping(policy, sizes, patience)
    if "linearity" in parts:
        yield from run_linearity(policy, LinearitySizes(), patience)


# Bytes.


def measure_nodes(policy: Policy, sizes: MemorySizes) -> Iterator[dict[str, Any]]:
    """Bytes per node by depth: of programs (from the difference of two sizes), and alive.

    A compiler packs what is temporary, and the least change of a size can leave a gap: hence sizes
    that lie apart.
    """
    first: dict[str, float] = {}
    for depth in sizes.depths:
        searches = [
            _make_search(sizes, batch=2, num_nodes=factor * sizes.num_nodes, max_depth=depth)
            for factor in (1, _LARGER)
        ]
        held = [_search_bytes(policy, search) for search in searches]
        more = 2 * (_LARGER - 1) * sizes.num_nodes
        measured = {
            "memory_analysis": (held[1]["program"] - held[0]["program"]) / more,
            "alive": (held[1]["alive"] - held[0]["alive"]) / more,
        }
        needed = (held[1]["needed"] - held[0]["needed"]) / more
        for source, value in measured.items():
            yield {
                "case": f"node_bytes_{source}",
                "ours": value,
                "other": needed,
                "ratio": value / needed,
                "unit": "bytes per node (other: its pages and rows)",
                "at_most": 1.1,
                "max_depth": depth,
                "over_least_depth": value / first.setdefault(source, value),
                "model": sizes.model,
                "batch": 2,
                "nodes": [search.num_nodes for search in searches],
                "step_tokens": sizes.step_tokens,
                "simulations": None,
                "leaves": 1,
            }


def measure_large(model: str, sizes: MemorySizes) -> dict[str, Any]:
    """Peak resident bytes of a process that does one large search."""
    search = dataclasses.asdict(
        Search(
            batch=sizes.num_structures,
            num_nodes=sizes.large_nodes,
            num_children=sizes.large_children,
            num_lanes=1,
            step_tokens=sizes.step_tokens,
            context_tokens=sizes.context_tokens,
            max_depth=16,
            num_expansions=sizes.large_expansions or sizes.large_nodes,
        )
    )
    with SideProcess(sys.executable, "bench_memory.py") as process:
        answer = process.ask("search", model=model, dtype=sizes.large_dtype, search=search)
    return {
        "case": "large_search_peak",
        "ours": answer["peak_bytes"],
        "other": 8 * GIBIBYTE,
        "ratio": answer["peak_bytes"] / (8 * GIBIBYTE),
        "unit": "bytes resident (other: 8 GiB)",
        "at_most": 1.0,
        "model": model,
        "dtype": sizes.large_dtype,
        "batch": sizes.num_structures,
        "nodes": sizes.num_structures * sizes.large_nodes,
        "simulations": search["num_expansions"],
        "leaves": 1,
        **answer,
    }


def search_once(model: str, dtype: str, search: Mapping[str, Any]) -> dict[str, Any]:
    """One search in this process: nodes made, seconds, and the peak memory it ever took."""
    sizes = Search(**search)
    policy = build.load_policy(model, dtype)
    loaded = _peak_bytes()
    begin_fn, search_fn, args = _compile_apart(policy, sizes)
    compiled = _peak_bytes()
    started = time.perf_counter()
    structure, world = begin_fn(*args)
    keys = jax.random.split(jax.random.key(0), sizes.batch)
    structure, world = jax.block_until_ready(search_fn(args[0], keys, world, structure))
    return {
        "seconds": time.perf_counter() - started,
        "nodes_made": int(structure.num_nodes.sum()),
        "expansions_made": int(structure.budget.expansions.sum()),
        "pool_bytes": sum(a.nbytes for a in world.pages.pools),
        "parameter_bytes": sum(a.nbytes for a in jax.tree.leaves(policy.params)),
        "loaded_peak_bytes": loaded,
        "compiled_peak_bytes": compiled,
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _compile_apart(policy: Policy, search: Search):
    """Prefill and search as two programs, the second with its world donated, and their inputs."""
    language, strategy = search.language(policy), search.strategy()
    expand = make_expand(language)
    lm = make_language_model(policy, search.step_tokens)
    rng = np.random.default_rng(0)
    shape = (search.batch, search.context_tokens)
    prompts = jnp.asarray(rng.integers(10, policy.cfg.vocab_size - 10, shape), jnp.int32)
    lengths = jnp.full(search.batch, search.context_tokens, jnp.int32)
    keys = jax.random.split(jax.random.key(0), search.batch)

    def start(lm, prompts, lengths):
        return begin(lm, prompts, lengths, cfg=language)

    def grow(lm, keys, world, structure):
        return run_compiled(
            strategy,
            expand,
            lm,
            keys,
            world,
            structure,
            limits=Limits(step_tokens=search.step_tokens),
        )

    structure, world = jax.eval_shape(start, lm, prompts, lengths)
    begin_fn = jax.jit(start).lower(lm, prompts, lengths).compile()
    search_fn = jax.jit(grow, donate_argnums=(2, 3)).lower(lm, keys, world, structure).compile()
    return begin_fn, search_fn, (lm, prompts, lengths)


def _search_bytes(policy: Policy, search: Search) -> dict[str, int]:
    """Bytes of a search: of its program, alive after it, and needed by its pages and rows.

    What finds the pages (tables, owners) is not needed by this count: it is overhead.
    """
    begin_fn, search_fn, args = _compile_apart(policy, search)
    keys = jax.random.split(jax.random.key(0), search.batch)
    before = _live_bytes()
    structure, world = begin_fn(*args)
    structure, world = search_fn(args[0], keys, world, structure)
    jax.block_until_ready(structure)
    alive = _live_bytes() - before
    pages = world.pages
    page_bytes = sum(a.nbytes for a in pages.pools) // pages.fill.shape[0]
    per_node = -(-search.step_tokens // pages.page_tokens) * page_bytes
    rows = [
        *jax.tree.leaves(structure),
        *jax.tree.leaves(dataclasses.replace(world, pages=None)),
    ]
    needed = search.batch * search.num_nodes * per_node + sum(array.nbytes for array in rows)
    return {"program": program_bytes(search_fn.memory_analysis()), "alive": alive, "needed": needed}


def _live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


# Seconds.


def measure_capacity(
    policy: Policy, sizes: MemorySizes, patience: Patience
) -> Iterator[dict[str, Any]]:
    """Seconds per expansion at each capacity, against the smallest."""
    limits = {64: 1.0, 512: 1.1, 4096: 1.5}
    least = _prepare_search(policy, _make_search(sizes, num_nodes=min(sizes.capacities)))
    for capacity in sorted(sizes.capacities)[1:]:
        larger = _prepare_search(policy, _make_search(sizes, num_nodes=capacity))
        times = time_pair(larger, least, patience)
        ours, other = (min(seconds) / sizes.num_expansions for seconds in times[:2])
        yield {
            "case": "seconds_per_expansion",
            "ours": ours,
            "other": other,
            "ratio": ours / other,
            "unit": f"s (other: N = {min(sizes.capacities)})",
            "at_most": limits.get(capacity),
            "ours_median": statistics.median(times.ours) / sizes.num_expansions,
            "other_median": statistics.median(times.other) / sizes.num_expansions,
            "nodes": capacity,
            **_describe_search(sizes, times),
        }


def measure_bookkeeping(
    policy: Policy, sizes: MemorySizes, patience: Patience
) -> Iterator[dict[str, Any]]:
    """Seconds of ask, tell and the loop, over those of what the expander does."""
    for num_lanes in sizes.leaves:
        num_expansions = 1 + num_lanes * sizes.num_expansions
        search = _make_search(
            sizes,
            num_nodes=1 + num_expansions * sizes.num_children,
            num_expansions=num_expansions,
            num_lanes=num_lanes,
        )
        whole = _prepare_search(policy, search)
        bare = _compile_bare(search)
        made = [int(s.num_nodes.sum()) for s in (whole.call(*whole.prepare()), bare.call())]
        assert made[0] == made[1], made
        times = time_pair(bare.call, whole, patience)
        ours, other = min(times.ours), min(times.other)
        yield {
            "case": "bookkeeping_share",
            "ours": ours,
            "other": other - ours,
            "ratio": ours / (other - ours),
            "unit": "s (other: the expander)",
            "at_most": 0.05,
            "nodes": search.num_nodes,
            **_describe_search(sizes, times),
            "simulations": num_expansions,
            "leaves": num_lanes,
        }


def _make_search(sizes: MemorySizes, **changes: Any) -> Search:
    settings: dict[str, Any] = {
        "batch": 1,
        "num_nodes": sizes.num_nodes,
        "num_children": sizes.num_children,
        "num_lanes": 1,
        "step_tokens": sizes.step_tokens,
        "context_tokens": sizes.context_tokens,
        "max_depth": 16,
        "num_expansions": sizes.num_expansions,
    }
    return Search(**{**settings, **changes})


def _prepare_search(policy: Policy, search: Search) -> Prepared:
    """The search apart from its beginning, whose world it takes over."""
    begin_fn, search_fn, args = _compile_apart(policy, search)
    keys = jax.random.split(jax.random.key(0), search.batch)

    def prepare():
        structure, world = begin_fn(*args)
        return args[0], keys, world, structure

    return Prepared(prepare, lambda *inputs: search_fn(*inputs)[0])


def _compile_bare(search: Search) -> Compiled:
    """The same search over steps that are made up: what is left is the tree's bookkeeping."""
    strategy = search.strategy()
    length, steps = search.context_tokens, search.step_tokens

    def grow(keys):
        lengths = jnp.full(search.batch, length, jnp.int32)
        structure = make_structure(lengths, search.num_nodes)
        world = jnp.zeros(())
        return run_compiled(
            strategy, functools.partial(_make_up, steps), None, keys, world, structure,
            limits=Limits(step_tokens=steps),
        )[0]  # fmt: skip

    return compile_call(grow, jax.random.split(jax.random.key(0), search.batch))


def _make_up(step_tokens, params, keys, world, structure, request):
    """Steps of full length with log-probabilities that differ."""
    del params, keys
    shape = (*request.nodes.shape, request.num_children)
    number = structure.num_nodes[:, None, None] + jnp.arange(shape[-1]) + request.nodes[..., None]
    logprob = -1.0 - (number % 7).astype(jnp.float32)
    zero, no = jnp.zeros(shape), jnp.zeros(shape, bool)
    grown = request.grows.sum(-1).astype(jnp.int32)
    cost = dataclasses.replace(
        zero_budget(structure.num_nodes),
        generated_tokens=grown * request.num_children * step_tokens,
        expansions=grown,
    )
    # All fields are given, those of 0 too: a search over steps of a language model writes them all.
    outcome = Outcome(
        valid=jnp.broadcast_to(request.grows[..., None], shape),
        duplicate=no,
        length=jnp.where(request.grows[..., None], step_tokens, zero).astype(jnp.int32),
        logprob=logprob,
        value=jnp.exp(logprob),
        reward=zero,
        terminal=no,
        answer_key=zero.astype(jnp.uint32),
        state_key=zero.astype(jnp.uint32),
        proven=no,
        node_value=zero[..., 0],
        cost=cost,
    )
    return outcome, world


def _describe_search(sizes: MemorySizes, times) -> dict[str, Any]:
    return {
        "model": sizes.model,
        "batch": 1,
        "simulations": sizes.num_expansions,
        "leaves": 1,
        "children": sizes.num_children,
        "step_tokens": sizes.step_tokens,
        "calls": [len(times.ours), len(times.other)],
        "machine_busy_before": times.busy,
    }


def main() -> None:
    """Answers commands until stdin ends."""
    serve({"search": search_once})


if __name__ == "__main__":
    main()
