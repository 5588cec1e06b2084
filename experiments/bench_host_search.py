"""The other side of `bench.py --suite=search`: tree search driven from Python over transformers.

    python experiments/bench_host_search.py   (started by bench.py, under any Python with torch)

A process that obeys (`side_process.py`). The search is PUCT (`host_tree.py`), one leaf per tree and
round; its steps come from a transformers model (`host_model.py`) in one of three ways:

    text     every expansion re-sends the tokens of the path to `generate`; one problem at a time
    path     keys and values are kept per node, nothing is forwarded twice; one problem at a time
    batched  the same, and each round expands one leaf of every problem together

    {"do": "load", "model": FILE_OR_FOLDER, "dtype": "float32"}      -> versions, threads
    {"do": "search", "mode": MODE, "prompts": [[ids], ...], "expansions": N, "children": K,
     "step_tokens": S, "stop_ids": [ids], "final_ids": [ids], "fixed_length": BOOL, "seed": SEED}
        -> seconds, cpu_seconds, counts (`host_model.Work`, expansions), and the same per problem

`stop_ids` end a step (tokens that hold a newline), `final_ids` the solution; nothing grows below a
finished one. With `fixed_length` all steps have S tokens and none is final, so that any two sides
do the same amount of work. Optional: temperature (0.8; 0 for greedy), top_k (32), exploration
(1.25), max_depth (16), return_trees (false).
"""

import time
from collections.abc import Sequence
from typing import Any

from host_tree import Tree, add_children, plant_tree, select_leaf
from side_process import serve

MODES = ("text", "path", "batched")


class Side:
    """A loaded model that searches are run over."""

    def __init__(self):
        self.model: Any = None

    def load(self, model: str, dtype: str) -> dict[str, Any]:
        """Loads a checkpoint; what runs it."""
        from bench_transformers import describe_versions, load_model

        self.model = None  # The old weights make room first.
        self.model = load_model(model, dtype)
        return describe_versions()

    def search(
        self,
        mode: str,
        prompts: Sequence[Sequence[int]],
        expansions: int,
        children: int,
        step_tokens: int,
        stop_ids: Sequence[int],
        final_ids: Sequence[int],
        fixed_length: bool,
        seed: int,
        temperature: float = 0.8,
        top_k: int = 32,
        exploration: float = 1.25,
        max_depth: int = 16,
        return_trees: bool = False,
    ) -> dict[str, Any]:
        """Grows one tree per prompt; see the module's docstring."""
        if self.model is None:
            raise ValueError("search: load a model first")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: accepted are {', '.join(MODES)}")
        if expansions < 1:
            raise ValueError(f"expansions={expansions}: accepted are numbers >= 1")
        if not prompts or not all(prompts):
            raise ValueError(f"prompts={prompts}: accepted are one or more, of one token or more")
        import torch
        from host_model import KeptSampler, Rules, TextSampler

        rules = Rules(
            children, step_tokens, frozenset(stop_ids), frozenset(final_ids), fixed_length,
            temperature, top_k,
        )  # fmt: skip
        torch.manual_seed(seed)
        groups = [list(prompts)] if mode == "batched" else [[prompt] for prompt in prompts]
        room = max(map(len, prompts)) + min(expansions, max_depth) * step_tokens
        with torch.inference_mode():
            if mode == "text":
                sampler = TextSampler(self.model, rules)
            else:
                sampler = KeptSampler(self.model, rules, len(groups[0]), room)
            runs = []
            for group in groups:
                settings = {"exploration": exploration, "max_depth": max_depth}
                runs.append(_search_group(sampler, group, expansions, settings))
        return _report(mode, runs, sampler, return_trees)


def grow(sampler: Any, trees: Sequence[Tree], expansions: int) -> None:
    """Expands each tree `expansions` times, all of them side by side; less where it is used up."""
    for _ in range(expansions):
        selected = [(tree, select_leaf(tree)) for tree in trees]
        leaves = [(tree, leaf) for tree, leaf in selected if leaf is not None]
        if not leaves:
            return
        for (tree, leaf), steps in zip(leaves, sampler.expand(leaves), strict=True):
            add_children(tree, leaf, steps)


def _search_group(sampler, prompts, expansions: int, settings) -> dict[str, Any]:
    start, start_cpu = time.perf_counter(), time.process_time()
    trees = [plant_tree(prompt, **settings, kept=sampler.plant(prompt)) for prompt in prompts]
    grow(sampler, trees, expansions)
    for tree in trees:
        for node in tree.nodes:
            node.kept = None  # Outlives its search otherwise.
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "trees": trees}


def _report(mode: str, runs: list[dict[str, Any]], sampler: Any, return_trees: bool):
    """Totals, and per problem; a batch's seconds belong to no problem alone."""
    problems = []
    for run in runs:
        alone = len(run["trees"]) == 1
        for tree in run["trees"]:
            problem = {
                "seconds": run["seconds"] if alone else None,
                "cpu_seconds": run["cpu_seconds"] if alone else None,
                "generated_tokens": sum(len(node.tokens) for node in tree.nodes[1:]),
                "expansions": tree.expansions,
                "nodes": len(tree.nodes),
                "finished": sum(node.finished for node in tree.nodes),
            }
            if return_trees:
                problem["tree"] = [_describe(node) for node in tree.nodes]
            problems.append(problem)
    seconds = sum(run["seconds"] for run in runs)
    return {
        "mode": mode,
        "seconds": seconds,
        "cpu_seconds": sum(run["cpu_seconds"] for run in runs),
        "generated_tokens": sampler.work.generated,
        "prefilled_tokens": sampler.work.prefilled,
        "forwarded_tokens": sampler.work.forwarded,
        "model_calls": sampler.work.model_calls,
        "expansions": sum(problem["expansions"] for problem in problems),
        "tokens_per_second": sampler.work.generated / seconds,
        "problems": problems,
    }


def _describe(node) -> dict[str, Any]:
    return {
        "parent": node.parent,
        "tokens": node.tokens,
        "path_logprob": node.path_logprob,
        "visits": node.visits,
        "finished": node.finished,
    }


def main() -> None:
    """Answers commands until stdin ends."""
    side = Side()
    serve({"load": side.load, "search": side.search})


if __name__ == "__main__":
    main()
