"""What training spends its time on: suite `train` of bench.py.

sft      model FLOP/s of supervised updates, data and optimizer included, over those of large
         float32 products in the same run (6 FLOP for each weight of a product and token; what
         attention computes is not counted), and over those of bfloat16 ones
step     one step of search and learning, profiled: shares of the time by what it is for. `ours`
         is the share inside the networks, forward and backward
"""

import collections
import functools
import glob
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import phases
from bench_timing import Patience, wait_until_quiet
from training_settings import read_settings

from rlm_jax.core.sharding import TENSOR_PARALLEL
from rlm_jax.evaluation import build
from rlm_jax.learning.networks import Networks
from rlm_jax.models.load import find_model
from rlm_jax.models.mixed import MATMUL_DTYPES
from rlm_jax.models.params import Params

PARTS = ("sft", "step")
# Scopes of the library's code; what is in none of them is counted as the search.
SCOPES = {
    "networks": ("transformer", "unembed", "value_head", "state_value"),
    "optimizer": ("optimizer",),
}
_PEAK_SIZE = 2048
_UPDATES = 5
_CONTAINERS = ("while", "conditional", "call")
_CONTAINER = "what only contains others"
# Name, opcode, operands and the rest of an operation in a program's text.
_OPERATION = re.compile(r"^ *(?:ROOT )?%(\S+) = .*? ([a-z][\w-]*)\((.*?)\)(.*)$", re.MULTILINE)


def run_train(
    config: Mapping[str, Any], *, parts: Sequence[str], patience: Patience
) -> Iterator[dict[str, Any]]:
    """All cases of some parts.

    Args:
      config: one with `train`; the networks that it begins with, or its model, are trained.

    Raises:
      ValueError: a setting that is not accepted, or a config without `train`.
    """
    if "train" not in config:
        raise ValueError("the config has no `train`: name one, as --config=configs/countdown.py")
    train = {**config["train"], "walks": {**config["train"]["walks"], "num_steps": 0}}
    # Room for any schedule; a step takes as long at each place of it.
    train["search"] = {**train["search"], "num_steps": max(1000, train["search"]["num_steps"])}
    train["num_steps"] = max(1000, train["num_steps"])
    spec = train["begin_with"] or config["model"]
    policy = build.load_policy(spec)
    if policy.value_head is None:
        raise ValueError(f"{spec}: it has no value head, which training needs")
    config = {**config, "train": train}
    settings = read_settings(config, str(find_model(spec)), None)
    with tempfile.TemporaryDirectory() as folder:
        run = phases.Run(
            config, train, settings, pathlib.Path(folder), policy.tokenizer, policy.cfg, {}, None,
            TENSOR_PARALLEL, policy.state_value,
        )  # fmt: skip
        for name, measure in (("sft", measure_updates), ("step", measure_search_step)):
            if name in parts:
                networks = jax.tree.map(jnp.copy, phases.take_networks(run, policy))
                yield {**measure(run, networks, patience), "model": spec}


def measure_updates(run: phases.Run, networks: Networks, patience: Patience) -> dict[str, Any]:
    """Supervised updates against large products, in turn."""
    settings = run.settings.supervised
    assert settings is not None
    weights = count_weights(networks.policy)
    phase = phases.make_supervised(run, networks)
    steps = phase.steps(phase.state, None)
    jax.block_until_ready(next(steps)[:2])
    busy = wait_until_quiet(patience.quiet_seconds)
    ours, spent = [], 0.0
    peaks: dict[str, list[float]] = {dtype: [] for dtype in MATMUL_DTYPES}
    while not ours or (len(ours) < patience.repeats and spent < patience.side_seconds):
        started, tokens = time.perf_counter(), 0
        for _ in range(_UPDATES):
            state, metrics, count, _ = next(steps)
            tokens += count
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - started
        ours.append(6 * weights * tokens / seconds / 1e9)
        for dtype, found in peaks.items():
            found.append(_measure_peak(dtype))
        spent += seconds
    steps.close()
    return {
        "case": "train_sft",
        "ours": max(ours),
        "other": max(peaks["float32"]),
        "ratio": max(ours) / max(peaks["float32"]),
        "ours_median": statistics.median(ours),
        "other_median": statistics.median(peaks["float32"]),
        "unit": "GFLOP/s",
        "other_is": f"float32 products of {_PEAK_SIZE} x {_PEAK_SIZE}",
        "matmul_dtype": settings.loss.matmul_dtype,
        "bfloat16_peak": max(peaks["bfloat16"]),
        "ratio_to_bfloat16": max(ours) / max(peaks["bfloat16"]),
        "weights": weights,
        "rows": settings.layout.num_rows,
        "row_tokens": settings.layout.row_tokens,
        "machine_busy_before": busy,
    }


def count_weights(params: Params) -> int:
    """Weights that a token is multiplied by: all matrices, the embedding as the output's."""
    matrices = [leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    return sum(matrices) - (0 if params.lm_head is None else params.embed.size)


def _measure_peak(dtype: str) -> float:
    """GFLOP/s of one large product of factors of this dtype, summed in float32."""
    one = jnp.ones((_PEAK_SIZE, _PEAK_SIZE), dtype)
    product = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(one, one))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(product(one, one))
        seconds.append(time.perf_counter() - started)
    return 2 * _PEAK_SIZE**3 / min(seconds) / 1e9


def measure_search_step(run: phases.Run, networks: Networks, patience: Patience) -> dict[str, Any]:
    """One step of search and learning, profiled operation by operation."""
    program = phases.make_search_program(run, networks)
    compiled = program.step_fn.lower(program.state, *program.draw(0), program.base).compile()
    state, _ = compiled(program.state, *program.draw(0), program.base)
    batch = jax.block_until_ready((state, program.draw(1)))[1]
    busy = wait_until_quiet(patience.quiet_seconds)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with jax.profiler.trace(folder):
            _, metrics = jax.block_until_ready(compiled(state, *batch, program.base))
        seconds = time.perf_counter() - started
        [trace] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        shares, largest = share_time(trace, compiled.as_text())
    search = run.train["search"]
    return {
        "case": "train_search_step",
        "ours": shares["networks"],
        "other": None,
        "ratio": None,
        "unit": "share of the operations' time",
        "shares": shares,
        "largest_others": largest,
        "seconds": seconds,
        "problems": search["num_problems"],
        "strategy": search["strategy"],
        "search_tokens": float(metrics["search_tokens"].mean()),
        "machine_busy_before": busy,
    }


def share_time(trace: str, hlo: str) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of the time of all operations by scope, and the largest outside of the networks.

    Args:
      trace: an xplane file. hlo: the program's text, which says where its operations come from.
    """
    return share_operations(_read_operations(trace), place_operations(hlo))


def share_operations(
    operations: Iterable[tuple[str, float]], places: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, float]]:
    """`share_time` of operations' names and seconds, and of `place_operations`."""
    seconds: dict[str, float] = collections.defaultdict(float)
    others: dict[str, float] = collections.defaultdict(float)
    for name, duration in operations:
        place = places.get(name, "")
        if place == _CONTAINER:
            continue
        words = set(re.findall(r"\w+", place))
        scope = next((s for s, marks in SCOPES.items() if words.intersection(marks)), "search")
        seconds[scope] += duration
        if scope != "networks":
            others["/".join(place.split("/")[-3:]) or name] += duration
    total = sum(seconds.values())
    shares = {scope: seconds[scope] / total for scope in (*SCOPES, "search")}
    return shares, {
        name: spent / total for name, spent in sorted(others.items(), key=lambda one: -one[1])[:8]
    }


def place_operations(hlo: str) -> dict[str, str]:
    """Where in the code each operation of a program comes from, by its name.

    An operation that the compiler left without a place, as it does with products that it rewrites,
    has the place of what needs it, or else of what it needs. Those that only contain others, which
    are there as well, are `_CONTAINER`.
    """
    places: dict[str, str] = {}
    needs: dict[str, list[str]] = {}
    needed_by: dict[str, list[str]] = collections.defaultdict(list)
    for name, opcode, operands, rest in _OPERATION.findall(hlo):
        needs[name] = re.findall(r"%([^\s,)]+)", operands)
        for operand in needs[name]:
            needed_by[operand].append(name)
        found = re.search(r'op_name="([^"]*)"', rest)
        if opcode in _CONTAINERS:
            places[name] = _CONTAINER
        elif found:
            places[name] = found[1]
    lost = {
        name: _find_place(name, needed_by, places) or _find_place(name, needs, places)
        for name in needs
        if name not in places
    }
    return {**places, **lost}


def _find_place(name: str, edges: Mapping[str, Sequence[str]], places: Mapping[str, str]) -> str:
    """The place of the nearest operation along the edges that has one."""
    seen, front = {name}, [name]
    while front:
        near = [after for one in front for after in edges.get(one, ()) if after not in seen]
        seen.update(near)
        front = [one for one in near if places.get(one) != _CONTAINER]
        for one in front:
            if one in places:
                return places[one]
    return ""


def _read_operations(trace: str) -> Iterator[tuple[str, float]]:
    """Name and seconds of each operation that was run."""
    for plane in jax.profiler.ProfileData.from_file(trace).planes:
        for line in plane.lines:
            for event in line.events:
                if any(name == "hlo_op" for name, _ in event.stats):
                    yield event.name, event.duration_ns / 1e9
