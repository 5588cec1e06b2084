"""Measures rlm_jax against other systems: one JSON line per case, both sides in one run.

    python experiments/bench.py --suite=decode --other_python=/path/to/python-with-torch

Each line holds `case`, `ours`, `other`, `ratio`, `unit` and what was run. Times are the best of the
repeats (medians beside them); ratios carry over to other machines, times do not. Counts of tokens
are exact. Where the other side is not installed, `other` is null and the line says how to get it.
"""

import contextlib
import json
import pathlib
import sys

import bench_decode
import launching
from absl import flags
from ml_collections import config_flags

SUITES = ("decode",)

_SUITE = flags.DEFINE_string("suite", None, f"Which suite: {', '.join(SUITES)}.")
_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/smollm2.py", "Whose model and searches are measured.", lock_config=True
)
_ROWS = flags.DEFINE_list("rows", ["1", "4", "16", "64"], "Rows decoded at once.")
_DTYPES = flags.DEFINE_list(
    "dtypes", ["float32", "bfloat16"], "Types of weights and KV; int8: weights, KV float32."
)
_CONTEXT = flags.DEFINE_integer("context", 192, "Tokens of the shared prompt.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 32, "Tokens decoded per row.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each side.", lower_bound=1)
_OTHER = flags.DEFINE_string("other_python", sys.executable, "A Python with torch, transformers.")
_ONLY_OURS = flags.DEFINE_bool("only_ours", False, "Leave the other side out.")
_OUT = flags.DEFINE_string("out", None, "A file that gets the lines too.")
flags.adopt_module_key_flags(launching)


def main() -> None:
    """Runs a suite and prints its lines as they come."""
    if _SUITE.value not in SUITES:
        raise ValueError(f"--suite={_SUITE.value}: accepted are {', '.join(SUITES)}")
    try:
        rows = [int(number) for number in _ROWS.value]
    except ValueError:
        raise ValueError(f"--rows={','.join(_ROWS.value)}: accepted are whole numbers") from None
    if not rows or min(rows) < 1:
        raise ValueError(f"--rows={','.join(_ROWS.value)}: accepted are numbers >= 1")
    launching.use_compilation_cache()
    cases = bench_decode.run_decode(
        launching.read_config(_CONFIG),
        rows=rows,
        context_tokens=_CONTEXT.value,
        new_tokens=_NEW.value,
        repeats=_REPEATS.value,
        dtypes=_DTYPES.value,
        other_python=None if _ONLY_OURS.value else _OTHER.value,
    )
    with contextlib.ExitStack() as stack:
        files = [sys.stdout]
        if _OUT.value:
            files.append(stack.enter_context(pathlib.Path(_OUT.value).open("w")))
        for case in cases:
            line = json.dumps({key: _shorten(value) for key, value in case.items()})
            for file in files:
                print(line, file=file, flush=True)


def _shorten(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    launching.launch(main)
