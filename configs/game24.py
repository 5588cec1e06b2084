"""The network that learned Countdown plays Game of 24: four numbers into 24.

Command:  python experiments/solve.py --config=configs/game24.py --strategy=best_first \
              --question="4 7 8 8"
Hardware: two CPU cores, 1 GB of memory.
Expected: an answer in 10 s, compilation included; accuracies in docs/results.md.

`--config=configs/game24.py:smoke` is the same program on a tiny random model, which solves nothing.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """The settings of configs/countdown.py for this task; `variant` is empty or "smoke"."""
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/game24.py:{variant}: accepted is smoke, or nothing")
    path = pathlib.Path(__file__).with_name("countdown.py")
    spec = importlib.util.spec_from_file_location("countdown_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    del config.train
    config.task = "game24"
    config.max_depth = 3
    if variant == "smoke":
        config.evaluator = "confidence"
        for name in module.LOOK_AHEAD:
            config[name].evaluator = config.evaluator
    return config
