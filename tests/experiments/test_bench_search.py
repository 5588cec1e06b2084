"""bench.py's suites search and memory at tiny sizes: their lines, equal work, and their errors.

Where mctx is not installed, or the other Python has no torch, the other side is null, which is
what these tests then see of it.
"""

import dataclasses
import functools
import importlib
import importlib.util
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import run_program

from rlm_jax.models.params import init_params

# A minute of small measurements.
pytestmark = pytest.mark.slow

FIELDS = {"case", "ours", "other", "ratio", "unit", "batch", "simulations", "leaves"}
QUICK = ("--config=configs/smollm2.py:smoke", "--repeats=1", "--quiet_seconds=0")
HAS_MCTX = importlib.util.find_spec("mctx") is not None


@pytest.fixture(scope="module")
def program(root):
    """program(name): a module of experiments/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "experiments"))
        yield importlib.import_module


def run_lines(*flags: str) -> list[dict]:
    done = run_program("bench.py", *QUICK, *flags)
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert all(line.keys() >= FIELDS for line in lines)
    return lines


# Against mctx.


@pytest.mark.slow
def test_small_networks_do_the_same_simulations_on_both_sides():
    lines = run_lines(
        "--suite=search", "--only=small", "--batches=2", "--simulations=6", "--leaves=1"
    )
    found = [(line["case"], line["batch"], line["leaves"]) for line in lines]
    assert found == [("small_puct", 2, 1), ("small_gumbel", 2, 1)]
    for line in lines:
        assert line["ours"] > 0
        assert (line["other"] is not None) == HAS_MCTX
        assert (line["ratio"] is not None) == HAS_MCTX
        if HAS_MCTX:
            assert line["same_visit_counts"] == 1.0
            assert line["ratio"] == pytest.approx(line["ours"] / line["other"], rel=1e-3)


@pytest.fixture(scope="module")
def policy(program):
    """One random layer: programs compile in seconds."""
    policy = program("bench_language").load({}, "random:tiny-llama")
    cfg = dataclasses.replace(policy.cfg, num_layers=1)
    return policy._replace(cfg=cfg, params=init_params(jax.random.key(0), cfg))


@pytest.mark.slow
def test_language_model_sides_decode_the_same_number_of_tokens(program, policy, monkeypatch):
    bench = program("bench_language")
    monkeypatch.setattr(bench, "load", lambda config, name: policy)
    sizes = bench.Sizes(1, 4, 2, 4, 8, max_depth=3)
    patience = program("bench_timing").Patience(1, 9.0, 0.0)
    lines = list(
        bench.run_language(
            {}, models=["m"], batches=[2], leaves=[2], sizes=sizes, patience=patience
        )
    )
    forms = ("rows", "recompute", "dense") if HAS_MCTX else ("mctx",)
    names = [f"language_{form}{what}" for form in forms for what in ("", "_memory")]
    assert [line["case"] for line in lines] == names
    for line in lines:
        assert line.keys() >= FIELDS
        assert line["ours"] > 0
        if HAS_MCTX:
            assert line["tokens"] == [2 * 5 * 2 * 4] * 2
    for line in lines[1::2]:
        assert line["ours"] > line["parameter_bytes"]
        if line["case"].startswith("language_dense"):
            # The buffer of a path of 8 + 3 * 4 tokens against one step of 4 and the rows beside it.
            assert line["node_bytes"][1] > 2 * line["node_bytes"][0]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MCTX, reason="pip install mctx")
def test_mctx_grows_the_same_tree_however_its_nodes_keep_their_path(program, policy, monkeypatch):
    """Prefilled anew or kept, a path is the same: so are steps, values and visits of all nodes."""
    bench = program("bench_language")
    mctx = importlib.import_module("mctx")
    size = bench.Sizes(2, 8, 2, 4, 6, max_depth=4)
    lm = bench.make_language_model(policy, size.step_tokens)
    prompts = bench.make_prompts(policy, size)
    trees = []
    real = mctx.gumbel_muzero_policy

    def spy(*args, **kwargs):
        found = real(*args, **kwargs)
        trees.append(found.search_tree)
        return found

    monkeypatch.setattr(mctx, "gumbel_muzero_policy", spy)

    def search(form, lm, prompts):
        visits, tokens = bench.search_mctx(form, policy.cfg, size, lm, prompts)
        return visits, tokens, trees.pop()

    found = [jax.jit(functools.partial(search, form))(lm, prompts) for form in bench.FORMS]
    for visits, tokens, _ in found:
        np.testing.assert_array_equal(visits.sum(-1), [8, 8])
        np.testing.assert_array_equal(tokens, [9 * 2 * 4] * 2)
    recomputed, *others = (tree for *_, tree in found)
    for kept in others:
        np.testing.assert_array_equal(recomputed.parents, kept.parents)
        np.testing.assert_array_equal(recomputed.embeddings.steps, kept.embeddings.steps)
        np.testing.assert_allclose(recomputed.raw_values, kept.raw_values, rtol=1e-5)
    # Paths longer than the shortest buffer were among them.
    assert recomputed.embeddings.length.max() > bench.buffer_lengths(size)[0]


def test_buffer_lengths_end_with_the_longest_path(program):
    size = program("bench_language").Sizes(1, step_tokens=16, context_tokens=10, max_depth=6)
    lengths = program("bench_language").buffer_lengths(size)
    assert lengths == [10 + 2 * 16, 10 + 4 * 16, 10 + 6 * 16]
    assert lengths[-1] == size.path_tokens


# Against host-side search and llama.cpp.


@pytest.mark.slow
def test_questions_and_llama_measure_ours_alone_where_the_model_has_no_file():
    lines = run_lines(
        "--suite=search", "--only=host", "--problems_limit=2", "--expansions=3", "--children=2",
        "--step_tokens=4", "--host_leaves=2", "--context=12", "--new_tokens=4",
    )  # fmt: skip
    assert [line["case"] for line in lines] == ["questions", "llama_float32", "llama_int8"]
    for line in lines:
        assert line["ours"] > 0
        assert line["other"] is None
        assert line["ratio"] is None
        assert "random model" in line["other_is"]


def test_int8_is_compared_with_the_best_format_and_float32_with_their_float32(program):
    bench = program("bench_search")
    ours = {"float32": [2.0, 4.0], "int8": [1.0, 3.0]}
    theirs = {"own": [3.0, 2.5], "f32": [5.0, 4.0], "f16": [2.0, 9.0], "q8_0": [8.0, 8.0]}
    sizes = bench.HostSizes(rows=4, new_tokens=10)
    wide, narrow = bench.describe_llama(sizes, ours, theirs, None, 0.0)
    assert (wide["ours"], wide["other"], wide["ratio"]) == (20.0, 10.0, 2.0)
    assert (narrow["ours"], narrow["other"], narrow["ratio"]) == (40.0, 20.0, 2.0)
    assert "f32" in wide["other_is"]
    assert "f16" in narrow["other_is"]
    assert wide["all_formats"] == {"own": 16.0, "f32": 10.0, "f16": 20.0, "q8_0": 5.0}
    assert (wide["ours_median"], wide["other_median"]) == (40 / 3, 40 / 4.5)


def test_published_questions_become_prompts(program, policy, shared_data):
    bench = program("bench_search")
    sizes = bench.HostSizes(problems=shared_data / "gsm8k" / "test.jsonl", num_problems=3)
    prompts = bench.make_prompts(policy, sizes)
    assert len(prompts) == 3
    assert "Janet" in policy.tokenizer.decode(prompts[0])
    with pytest.raises(ValueError, match="wanted are 99999"):
        bench.make_prompts(policy, dataclasses.replace(sizes, num_problems=99999))


# Memory.


@pytest.fixture(scope="module")
def tiny(program):
    return program("bench_memory").MemorySizes(
        depths=(4,), num_nodes=9, capacities=(9, 17), num_expansions=2, leaves=(2,),
        num_children=2, step_tokens=4, context_tokens=8, num_structures=2, large_nodes=11,
    )  # fmt: skip


@pytest.mark.slow
def test_a_node_takes_little_more_than_it_needs(program, policy, tiny):
    """Of programs and alive, against a count by hand."""
    lines = list(program("bench_memory").measure_nodes(policy, tiny))
    names = [line["case"] for line in lines]
    assert names == ["node_bytes_memory_analysis", "node_bytes_alive"]
    kv = 4 * 2 * 2 * 8 * 4  # Tokens, keys and values, heads, width, bytes.
    tokens, hidden, answers_and_rows = 4 * 4, 32 * 4, 200
    for line in lines:
        assert kv + tokens + hidden < line["other"] < kv + tokens + hidden + answers_and_rows
        assert line["ratio"] == line["ours"] / line["other"]
        assert 1.0 <= line["ratio"] < 1.2


@pytest.mark.slow
def test_capacity_and_bookkeeping_compare_equal_work(program, policy, tiny):
    bench = program("bench_memory")
    patience = program("bench_timing").Patience(1, 1.0, 0.0)
    (capacity,) = bench.measure_capacity(policy, tiny, patience)
    (share,) = bench.measure_bookkeeping(policy, tiny, patience)
    assert capacity["nodes"] == 17
    assert share["leaves"] == 2
    assert share["nodes"] == 1 + 2 * (1 + 2 * 2)
    for line in (capacity, share):
        assert line.keys() >= FIELDS
        assert line["ours"] > 0
        assert line["ratio"] == line["ours"] / line["other"]


@pytest.mark.slow
def test_linearity_is_of_four_times_the_simulations(program, policy):
    bench = program("bench_linearity")
    patience = program("bench_timing").Patience(1, 1.0, 0.0)
    sizes = bench.LinearitySizes(
        simulations=(8,), batches=(1,), language_simulations=(4,), language_batches=(2,),
        num_children=4, step_tokens=4, context_tokens=8,
    )  # fmt: skip
    cases = {line["case"]: line for line in bench.run_linearity(policy, sizes, patience)}
    small, filled, language, _ = cases.values()
    assert [*cases] == [
        "linearity_gumbel", "linearity_gumbel_filled",
        "linearity_gumbel_language", "linearity_gumbel_filled_language",
    ]  # fmt: skip
    assert filled["mean_depths"][0] > 1
    for line in cases.values():
        assert line.keys() >= FIELDS
        assert line["ratio"] == line["ours"] / line["other"]
    assert (small["simulations"], small["batch"]) == (32, 1)
    deeper, shallower = small["mean_depths"]
    assert deeper > shallower >= 1
    assert small["ratio_per_level"] == pytest.approx(small["ratio"] * shallower / deeper)
    assert (language["simulations"], language["batch"], language["leaves"]) == (16, 2, 4)


@pytest.mark.slow
def test_large_search_is_measured_in_a_process_of_its_own(program, tiny):
    line = program("bench_memory").measure_large("random:tiny-llama", tiny)
    assert line.keys() >= FIELDS
    assert line["nodes"] == line["nodes_made"] == 22
    assert line["expansions_made"] == 4
    pages = 2 * (11 + 8 // 4)
    assert line["pool_bytes"] == pages * 4 * 2 * 2 * 2 * 8 * 4
    assert line["peak_bytes"] >= line["compiled_peak_bytes"] >= line["pool_bytes"]
    assert line["ratio"] == line["peak_bytes"] / (8 << 30)


# Timing.


def test_slow_sides_are_called_less_often_and_every_side_once(program):
    timing = program("bench_timing")

    def slow():
        time.sleep(0.02)
        return ()

    times = timing.time_pair(slow, None, timing.Patience(3, side_seconds=0.01, quiet_seconds=0))
    assert len(times.ours) == 1
    assert times.other == []
    times = timing.time_pair(slow, lambda: (), timing.Patience(2, side_seconds=9, quiet_seconds=0))
    assert len(times.ours) >= 2
    assert len(times.other) >= len(times.ours)
    assert min(times.ours) >= 0.02
    case = timing.describe_pair(times, 6, 3)
    assert case["ours"] == 6 / min(times.ours)
    assert case["other"] == 3 / min(times.other)


def test_short_calls_are_timed_in_rows(program):
    timing = program("bench_timing")
    calls = []

    def short():
        time.sleep(0.001)
        calls.append(1)
        return ()

    times = timing.time_pair(short, None, timing.Patience(3, side_seconds=0.1, quiet_seconds=0))
    assert len(calls) > 1.5 * (1 + len(times.ours))
    assert min(times.ours) >= 0.001


def test_preparation_is_not_timed(program):
    timing = program("bench_timing")

    def prepare():
        time.sleep(0.05)
        return (1,)

    seen = []
    assert timing.time_once(timing.Prepared(prepare, seen.append)) < 0.05
    assert seen == [1]


def test_program_bytes_count_a_donated_buffer_once(program):
    timing = program("bench_timing")
    add = lambda x: x + 1  # noqa: E731
    big = jax.ShapeDtypeStruct((1024,), jnp.float32)
    apart = jax.jit(add).lower(big).compile().memory_analysis()
    donated = jax.jit(add, donate_argnums=0).lower(big).compile().memory_analysis()
    assert timing.program_bytes(apart) == 2 * 4096
    assert timing.program_bytes(donated) == 4096


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--suite=search", "--only=speed"), "--only=speed: accepted are small, language, q"),
        (("--suite=memory", "--only=mctx"), "--only=mctx: accepted are nodes, large"),
        (("--suite=decode", "--only=host"), "--only=host: accepted are none for this suite"),
        (("--suite=search", "--batches=0"), "--batches=0: accepted are numbers >= 1"),
        (("--suite=memory", "--large=4"), "--large=4: accepted are two numbers"),
        (("--suite=memory", "--memory_model=nowhere.gguf", "--only=nodes"), "nowhere.gguf"),
        (
            ("--suite=search", "--only=questions", "--problems=nowhere.jsonl", *QUICK[:1]),
            "nowhere.jsonl",
        ),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    done = run_program("bench.py", *flags)
    assert done.status == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1
