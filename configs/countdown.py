"""A small transformer learns Countdown (and Game of 24) from scratch, then searches.

Command:  python experiments/train.py --config=configs/countdown.py --workdir=DIR
Hardware: two CPU cores, 2 GB of memory.
Expected: see docs/results.md.

`--config=configs/countdown.py:smoke` is the same program at a size that runs in seconds and learns
nothing of use.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """The settings of `train.py`; `variant` is empty or "smoke"."""
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/countdown.py:{variant}: accepted is smoke, or nothing")
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 1800
    config.model = ConfigDict(
        {"num_layers": 6, "model_dim": 160, "num_heads": 5, "ffn_dim": 416, "context_length": 256}
    )
    config.data = ConfigDict(
        {
            "sizes": ((3, 0.05), (4, 0.85), (5, 0.1)),
            "opening_share": 0.4,
            "small_share": 0.1,
            "wrong_share": 0.2,
            "sharpness": 0.5,
            "shard_examples": 4096,
        }
    )
    config.layout = ConfigDict({"num_rows": 160, "row_tokens": 64, "num_soft": 8})
    config.loss = ConfigDict({"value_coef": 0.1, "value_loss": "bce", "z_coef": 0.0})
    config.optimizer = ConfigDict(
        {
            "name": "muon",
            "learning_rate": 2e-2,
            "adam_learning_rate": 3e-3,
            "warmup_steps": 100,
            "decay_share": 0.4,
            "final_share": 0.02,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "beta2": 0.98,
        }
    )
    config.num_microbatches = 1
    config.log_steps = 20
    config.checkpoint_steps = 100
    config.eval_steps = 400
    config.eval_problems = 200
    if variant == "smoke":
        config.num_steps = 6
        config.model.update({"num_layers": 2, "model_dim": 32, "num_heads": 2, "ffn_dim": 48})
        config.data.update({"sizes": ((3, 0.5), (4, 0.5)), "shard_examples": 64})
        config.layout.update({"num_rows": 8})
        config.optimizer.update({"warmup_steps": 2})
        config.log_steps = 2
        config.checkpoint_steps = 2
        config.eval_steps = 4
        config.eval_problems = 4
    return config
