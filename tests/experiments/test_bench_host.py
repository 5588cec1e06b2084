"""The other sides of the search benchmark: their tree, and (where torch is) their three ways.

RLM_JAX_OTHER_PYTHON names a Python with torch and transformers, or with llama_cpp; without it the
interpreter of the tests is tried, and what it has not is skipped.
"""

import functools
import importlib
import math
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.inference.extend import score_tokens
from rlm_jax.models.hf import load_hf, save_hf
from rlm_jax.models.params import init_params
from rlm_jax.models.presets import TINY_GEMMA3, TINY_LLAMA
from rlm_jax.text.tokenizer import ByteTokenizer

OTHER = os.environ.get("RLM_JAX_OTHER_PYTHON", sys.executable)
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17]]
COUNTS = ("generated_tokens", "prefilled_tokens", "forwarded_tokens", "model_calls", "expansions")


@pytest.fixture(scope="module")
def program(root):
    """program(name): a module of experiments/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "experiments"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def host_tree(program):
    return program("host_tree")


def skip_without(*packages: str) -> None:
    code = f"import importlib.util as u; print(all(map(u.find_spec, {packages})))"
    found = subprocess.run([OTHER, "-c", code], capture_output=True, text=True, timeout=60)
    if found.stdout.strip() != "True":
        pytest.skip(f"{OTHER} has not {', '.join(packages)}: set RLM_JAX_OTHER_PYTHON")


# The tree, without torch.


def step_of(host_tree, path: list[int], child: int, length: int, finished: bool):
    """A step that depends on nothing but its path and its place, as a sampler's would."""
    numbers = np.random.default_rng([*path, child, length])
    tokens = [int(token) for token in numbers.integers(1, 99, length)]
    return host_tree.Step(tokens, float(-numbers.exponential(0.5, length).sum()), finished)


class Sampler:
    """Steps by a rule; it notes what it was asked to expand."""

    def __init__(self, host_tree, num_children: int, share_finished: float):
        self.host_tree, self.num_children = host_tree, num_children
        self.share_finished, self.asked = share_finished, []

    def expand(self, leaves):
        self.asked.append([leaf for _, leaf in leaves])
        return [self._expand_one(self.host_tree.join_tokens(*leaf)) for leaf in leaves]

    def _expand_one(self, path):
        numbers = np.random.default_rng(path)
        lengths = numbers.integers(1, 5, self.num_children)
        finished = numbers.random(self.num_children) < self.share_finished
        return [
            step_of(self.host_tree, path, child, int(lengths[child]), bool(finished[child]))
            for child in range(self.num_children)
        ]


def check(tree, num_children: int) -> None:
    """What holds of every tree at any time."""
    nodes = tree.nodes
    assert len(nodes) == 1 + num_children * tree.expansions
    for index, node in enumerate(nodes):
        children = [nodes[child] for child in node.children]
        assert all(child.parent == index and child.depth == node.depth + 1 for child in children)
        assert node.visits == (index > 0) + sum(child.visits for child in children)
        assert node.depth <= tree.max_depth
        if children:
            assert not node.finished
            assert node.depth < tree.max_depth
            assert math.isclose(sum(child.prior for child in children), 1.0)
            assert node.closed == all(child.closed for child in children)
        else:
            assert node.closed == (node.finished or node.depth == tree.max_depth)
        own = 0.0 if index == 0 else math.exp(node.path_logprob / node.path_tokens)
        assert math.isclose(node.total, own + sum(child.total for child in children), rel_tol=1e-9)
        assert node.total <= node.visits


@settings(max_examples=60, deadline=None)
@given(
    expansions=st.integers(1, 25),
    num_children=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.3, 0.8]),
    max_depth=st.integers(1, 5),
    prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_trees_keep_their_books(
    host_tree, program, expansions, num_children, share, max_depth, prompts
):
    grow = program("bench_host_search").grow
    trees = [host_tree.plant_tree(prompt, max_depth=max_depth) for prompt in prompts]
    sampler = Sampler(host_tree, num_children, share)
    grow(sampler, trees, expansions)
    for tree in trees:
        check(tree, num_children)
        # Exactly as many as were asked for, unless nothing is left to grow.
        assert tree.expansions <= expansions
        assert tree.expansions == expansions or tree.nodes[0].closed
    assert sum(map(len, sampler.asked)) == sum(tree.expansions for tree in trees)


@settings(max_examples=20, deadline=None)
@given(expansions=st.integers(1, 20), share=st.sampled_from([0.0, 0.5]))
def test_a_tree_grows_alone_as_it_does_beside_others(host_tree, program, expansions, share):
    grow = program("bench_host_search").grow
    together = [host_tree.plant_tree(prompt) for prompt in PROMPTS]
    grow(Sampler(host_tree, 3, share), together, expansions)
    for prompt, tree in zip(PROMPTS, together, strict=True):
        alone = host_tree.plant_tree(prompt)
        grow(Sampler(host_tree, 3, share), [alone], expansions)
        assert alone == tree


def test_selection_is_puct_by_hand(host_tree):
    """Two children, one expansion below the better: every number worked out."""
    tree = host_tree.plant_tree([1], exploration=1.0)
    steps = [host_tree.Step([2, 3], 2 * math.log(0.6), False), host_tree.Step([4], -1.0, False)]
    host_tree.add_children(tree, 0, steps)
    p, q = 0.6, math.exp(-1.0)
    assert [node.prior for node in tree.nodes[1:]] == pytest.approx([p / (p + q), q / (p + q)])
    assert [node.total for node in tree.nodes] == pytest.approx([p + q, p, q])
    assert host_tree.select_leaf(tree) == 1
    bad = host_tree.Step([5], -9.0, False)
    host_tree.add_children(tree, 1, [bad, bad])
    value = (p + 2 * math.exp((2 * math.log(0.6) - 9.0) / 3)) / 3
    assert tree.nodes[1].total / tree.nodes[1].visits == pytest.approx(value)
    left = value + 2 * (p / (p + q)) / 4
    right = q + 2 * (q / (p + q)) / 2
    assert host_tree.select_leaf(tree) == (3 if left > right else 2)
    assert host_tree.join_tokens(tree, 3) == [1, 2, 3, 5]


def test_ties_go_to_the_first_and_finished_nodes_are_left_alone(host_tree):
    tree = host_tree.plant_tree([1])
    same = [host_tree.Step([2], -1.0, child == 0) for child in range(3)]
    host_tree.add_children(tree, 0, same)
    assert host_tree.select_leaf(tree) == 2
    with pytest.raises(ValueError, match="node 1 is not an open leaf"):
        host_tree.add_children(tree, 1, same)
    with pytest.raises(ValueError, match="of one token or more"):
        host_tree.add_children(tree, 2, [host_tree.Step([], 0.0, False)])
    with pytest.raises(ValueError, match="prompt of 0 tokens"):
        host_tree.plant_tree([])
    with pytest.raises(ValueError, match="max_depth=0"):
        host_tree.plant_tree([1], max_depth=0)


def test_likelihoods_that_underflow_still_make_priors(host_tree):
    tree = host_tree.plant_tree([1])
    host_tree.add_children(tree, 0, [host_tree.Step([2], -1e4, False)] * 2)
    assert [node.prior for node in tree.nodes[1:]] == [0.5, 0.5]
    assert host_tree.select_leaf(tree) == 1


# The protocol, without torch.


def test_a_side_answers_its_mistakes_and_goes_on(program):
    side_process = program("side_process")
    with side_process.SideProcess(sys.executable, "bench_host_search.py") as side:
        with pytest.raises(RuntimeError, match="do='dance': accepted are load, search"):
            side.ask("dance")
        with pytest.raises(RuntimeError, match="TypeError"):
            side.ask("search")
        with pytest.raises(RuntimeError, match="load a model first"):
            side.ask(
                "search", mode="text", prompts=PROMPTS, expansions=1, children=1, step_tokens=1,
                stop_ids=[], final_ids=[], fixed_length=True, seed=0,
            )  # fmt: skip


def test_a_side_that_is_at_work_ends_with_an_interrupted_benchmark(program):
    side_process = program("side_process")
    side = side_process.SideProcess(sys.executable, "bench_host_search.py")
    process = side._process
    process.send_signal(signal.SIGSTOP)  # It reads nothing, as if it were searching.
    side.__exit__(KeyboardInterrupt, None, None)
    assert process.returncode == -signal.SIGKILL


def test_a_side_without_its_packages_says_how_to_get_them(program, tmp_path):
    if importlib.util.find_spec("torch") or importlib.util.find_spec("llama_cpp"):
        pytest.skip("this Python has them")
    bench_host = program("bench_host")
    with (
        pytest.raises(RuntimeError, match="pip install torch transformers"),
        bench_host.open_host(sys.executable, tmp_path),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="llama-cpp-python"),
        bench_host.open_llama(sys.executable),
    ):
        pass


def test_steps_end_at_newlines_and_solutions_at_end_tokens(program):
    assert program("bench_host").find_enders(ByteTokenizer()) == ([10], [257])


# Torch: three ways to the same trees.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with logits far enough apart for greedy choices to have no ties."""
    params = init_params(jax.random.key(0), TINY_LLAMA)
    params = jax.tree.map(lambda leaf: leaf * (4.0 if leaf.ndim == 2 else 1.0), params)
    return save_hf(tmp_path_factory.mktemp("host") / "tiny", params, TINY_LLAMA)


@pytest.fixture(scope="module")
def search(program, checkpoint):
    """search(mode, **settings) on the other side, which is started once."""
    skip_without("torch", "transformers")
    bench_host = program("bench_host")
    with bench_host.open_host(OTHER, checkpoint) as host:
        usual = {
            "expansions": 6, "children": 3, "step_tokens": 6, "stop_ids": [], "final_ids": [],
            "fixed_length": True, "return_trees": True,
        }  # fmt: skip
        yield lambda mode, **changes: bench_host.host_search(
            host, changes.pop("prompts", PROMPTS), mode, **(usual | changes)
        )


@pytest.fixture(scope="module")
def enders(search):
    """Tokens of greedy steps, so that they end some steps and some solutions in mid-step."""
    trees = search("text", temperature=0.0, children=1)["problems"]
    return [trees[0]["tree"][1]["tokens"][2]], [trees[2]["tree"][2]["tokens"][3]]


def spans(answer) -> list:
    """What was grown, without its floating-point numbers."""
    fields = ("parent", "tokens", "visits", "finished")
    return [[[node[f] for f in fields] for node in p["tree"]] for p in answer["problems"]]


def lines(answer) -> list[dict[int, set[tuple[int, ...]]]]:
    """The steps found at each depth of each tree. Greedy siblings are alike, so it is one a depth;
    which of them is expanded is a tie that rounding decides."""
    found = []
    for problem in answer["problems"]:
        tree, depths, line = problem["tree"], [0], {}
        for node in tree[1:]:
            depths.append(depths[node["parent"]] + 1)
            line.setdefault(depths[-1], set()).add(tuple(node["tokens"]))
        found.append(line)
    return found


@pytest.mark.parametrize("mode", ["path", "batched"])
@pytest.mark.parametrize("fixed_length", [True, False])
@pytest.mark.parametrize("children", [1, 3])
def test_greedy_steps_are_those_of_text(search, enders, mode, fixed_length, children):
    stop_ids, final_ids = enders
    settings = {
        "temperature": 0.0,
        "children": children,
        "fixed_length": fixed_length,
        "stop_ids": stop_ids,
        "final_ids": final_ids,
    }
    text, kept = search("text", **settings), search(mode, **settings)
    if children == 1:
        assert spans(kept) == spans(text)
    for ours, theirs in zip(lines(kept), lines(text), strict=True):
        common = ours.keys() & theirs.keys()
        assert all(ours[depth] == theirs[depth] for depth in common)
        assert all(len(ours[depth]) == 1 for depth in ours)
    assert min(map(len, lines(kept))) >= (2 if fixed_length else 1)
    lengths = {len(node["tokens"]) for p in kept["problems"] for node in p["tree"][1:]}
    assert (lengths == {6}) == fixed_length
    assert any(p["finished"] for p in kept["problems"]) != fixed_length


@pytest.mark.parametrize("mode", ["text", "path", "batched"])
@pytest.mark.parametrize("fixed_length", [True, False])
def test_sampled_paths_have_the_likelihood_a_full_forward_gives_them(
    search, enders, checkpoint, mode, fixed_length
):
    """Siblings differ here: one that saw another's tokens would be scored otherwise."""
    stop_ids, final_ids = enders
    answer = search(
        mode, temperature=2.0, seed=3, fixed_length=fixed_length, stop_ids=stop_ids,
        final_ids=final_ids,
    )  # fmt: skip
    params, cfg, _ = load_hf(checkpoint)
    score = jax.jit(functools.partial(score_tokens, cfg=cfg))
    for prompt, problem in zip(PROMPTS, answer["problems"], strict=True):
        tree = problem["tree"]
        texts = [[]] * len(tree)
        for index, node in enumerate(tree):
            texts[index] = (texts[node["parent"]] if index else []) + node["tokens"]
        rows = np.zeros((19, 64), np.int32)
        lengths = np.ones(19, np.int32)
        for row, text in enumerate(texts):
            rows[row, : len(text)], lengths[row] = text, len(text)
        scores = np.asarray(score(params, jnp.asarray(rows), jnp.asarray(lengths)).logprobs)
        for row, node in enumerate(tree):
            expected = scores[row, len(prompt) : lengths[row]].sum()
            assert node["path_logprob"] == pytest.approx(expected, abs=2e-3)
        assert len({tuple(node["tokens"]) for node in tree}) > len(tree) // 2


def test_counts_are_exact_and_nothing_kept_is_forwarded_twice(search):
    text, path, batched = (search(mode, seed=1) for mode in ("text", "path", "batched"))
    num_prompts, steps, expansions = len(PROMPTS), 6, 6
    for answer in (text, path, batched):
        assert answer["expansions"] == num_prompts * expansions
        assert answer["generated_tokens"] == num_prompts * expansions * 3 * steps
        assert answer["generated_tokens"] == sum(p["generated_tokens"] for p in answer["problems"])
        assert answer["seconds"] > 0
        assert answer["tokens_per_second"] > 0
    prompt_tokens = sum(len(prompt) - 1 for prompt in PROMPTS)
    # Per expansion: the path's last token once, then all children's tokens but the last.
    forwarded = num_prompts * expansions * (1 + 3 * (steps - 1))
    for answer in (path, batched):
        assert answer["prefilled_tokens"] == prompt_tokens
        assert answer["forwarded_tokens"] == prompt_tokens + forwarded
    calls = num_prompts * expansions * steps
    assert text["model_calls"] == calls
    assert path["model_calls"] == calls + 2  # One prompt is a single token: nothing to prefill.
    assert batched["model_calls"] == expansions * steps + 2
    resent = text["prefilled_tokens"]
    assert resent >= 3 * expansions * sum(map(len, PROMPTS))
    assert text["forwarded_tokens"] == resent + 3 * (calls - num_prompts * expansions)
    assert [p["seconds"] is None for p in batched["problems"]] == [True] * num_prompts
    assert sum(p["seconds"] for p in path["problems"]) == pytest.approx(path["seconds"])


def test_seeds_decide(search):
    same = [spans(search("batched", seed=seed)) for seed in (5, 5, 6)]
    assert same[0] == same[1] != same[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "beam"}, "mode='beam': accepted are text, path, batched"),
        ({"expansions": 0}, "expansions=0"),
        ({"children": 0}, "num_children=0"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"prompts": [[1], []]}, "of one token or more"),
    ],
)
def test_wrong_settings_are_answered(search, changes, message):
    mode = changes.pop("mode", "path")
    with pytest.raises(RuntimeError, match=message):
        search(mode, **changes)


def test_a_model_with_windows_is_refused(program, tmp_path):
    skip_without("torch", "transformers")
    bench_host = program("bench_host")
    folder = save_hf(tmp_path / "m", init_params(jax.random.key(0), TINY_GEMMA3), TINY_GEMMA3)
    settings = {"stop_ids": [], "final_ids": [], "fixed_length": True, "expansions": 1}
    with (
        bench_host.open_host(OTHER, folder) as host,
        pytest.raises(RuntimeError, match="sliding_attention"),
    ):
        bench_host.host_search(host, PROMPTS, "path", **settings)


# llama.cpp.


def test_llama_rows_continue_one_prompt_alike(program, smollm2_gguf):
    skip_without("llama_cpp")
    bench_host = program("bench_host")
    prompt = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    with bench_host.open_llama(OTHER) as llama:
        one = bench_host.llama_decode(llama, smollm2_gguf, 1, prompt, 4, 1)
        answer = bench_host.llama_decode(llama, smollm2_gguf, 3, prompt, 4, 2)
        assert answer["tokens"] == one["tokens"] * 3
        assert len(answer["seconds"]) == 2
        assert answer["layout"] in answer["trial_seconds"]
        assert len(answer["trial_seconds"]) == 4
        with pytest.raises(RuntimeError, match="FileNotFoundError: no GGUF file"):
            bench_host.llama_decode(llama, "nowhere.gguf", 1, prompt, 4, 1)
        with pytest.raises(RuntimeError, match="of 1 or more"):
            bench_host.llama_decode(llama, smollm2_gguf, 0, prompt, 4, 1)


@pytest.mark.slow
def test_llama_formats_hold_one_type_each(program, smollm2_gguf, tmp_path):
    """All matrices of a converted file are in its format, and the numbers are the source's."""
    skip_without("llama_cpp")
    gguf = pytest.importorskip("gguf")
    bench_host = program("bench_host")
    with bench_host.open_llama(OTHER) as llama:
        files = bench_host.make_formats(llama, smollm2_gguf, tmp_path)
        assert bench_host.make_formats(llama, smollm2_gguf, tmp_path) == files
    assert sorted(files) == ["f16", "f32", "q8_0"]
    source = {t.name: t for t in gguf.GGUFReader(smollm2_gguf).tensors}
    for name, path in files.items():
        for tensor in gguf.GGUFReader(path).tensors:
            if tensor.name.endswith("norm.weight"):
                continue
            assert tensor.tensor_type.name.lower() == name
            if name == "f32" and "blk.0." in tensor.name:
                own = source[tensor.name]
                wide = gguf.quants.dequantize(own.data, own.tensor_type)
                np.testing.assert_allclose(tensor.data.reshape(wide.shape), wide, rtol=1e-6)
    for path in files.values():
        pathlib.Path(path).unlink()  # A gigabyte.
