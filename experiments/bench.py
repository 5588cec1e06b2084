"""Measures rlm_jax against other systems: one JSON line per case, both sides in one run.

    python experiments/bench.py --suite=decode --other_python=/path/to/python-with-torch
    python experiments/bench.py --suite=search --only=mctx
    python experiments/bench.py --suite=search --only=host --problems=gsm8k/test.jsonl \\
      --other_python=/path/to/python-with-torch --llama_python=/path/to/python-with-llama_cpp
    python experiments/bench.py --suite=memory
    python experiments/bench.py --suite=train --config=configs/countdown.py

Each line holds `case`, `ours`, `other`, `ratio`, `unit` and what was run. Times are the best of the
repeats (medians beside them); ratios carry over to other machines, times do not. Counts of tokens
are exact. Where the other side is not installed, `other` is null and the line says how to get it.
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import bench_decode
import bench_language
import bench_memory
import bench_search
import bench_timing
import bench_train
import launching
from absl import flags
from ml_collections import config_flags

SUITES = ("decode", "search", "memory", "train")

_SUITE = flags.DEFINE_string("suite", None, f"Which suite: {', '.join(SUITES)}.")
_ONLY = flags.DEFINE_list(
    "only",
    [],
    f"Parts of a suite. search: {', '.join(bench_search.PARTS)} (mctx: the first two; host: the "
    f"last two). memory: {', '.join(bench_memory.PARTS)}. train: {', '.join(bench_train.PARTS)}.",
)
_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/smollm2.py", "Whose model and searches are measured.", lock_config=True
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each side.", lower_bound=1)
_SIDE = flags.DEFINE_float(
    "side_seconds", 60.0, "No side is called again once its calls of a case took so long."
)
_QUIET = flags.DEFINE_float("quiet_seconds", 10.0, "Longest wait for a quiet machine, per case.")
_OTHER = flags.DEFINE_string("other_python", sys.executable, "A Python with torch, transformers.")
_LLAMA = flags.DEFINE_string("llama_python", None, "One with llama_cpp (default: other_python).")
_FORMATS = flags.DEFINE_string("formats", None, "Folder for llama.cpp's files (a gigabyte), kept.")
_ONLY_OURS = flags.DEFINE_bool("only_ours", False, "Leave the other side out.")
_OUT = flags.DEFINE_string("out", None, "A file that gets the lines too.")

# Suite decode (and llama.cpp's part of search).
_ROWS = flags.DEFINE_list("rows", ["1", "4", "16", "64"], "Rows decoded at once.")
_DTYPES = flags.DEFINE_list(
    "dtypes", ["float32", "bfloat16"], "Types of weights and KV; int8: weights, KV float32."
)
_CONTEXT = flags.DEFINE_integer("context", 192, "Tokens of the shared prompt.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 32, "Tokens decoded per row.", lower_bound=2)

# Suite search, small networks.
_BATCHES = flags.DEFINE_list("batches", ["1", "16", "128"], "Trees side by side.")
_SIMULATIONS = flags.DEFINE_list("simulations", ["16", "128", "512"], "Simulations of a tree.")
_LEAVES = flags.DEFINE_list("leaves", ["1", "4", "16"], "Leaves of a tree in one call, ours.")

# Suite search, a language model.
_MODELS = flags.DEFINE_list("models", ["8m", "config"], "8m (random), config, or a model.")
_LANGUAGE_BATCHES = flags.DEFINE_list("language_batches", ["1", "4"], "Prompts side by side.")
_LANGUAGE_LEAVES = flags.DEFINE_list("language_leaves", ["4", "16"], "Leaves in one call, ours.")
_LANGUAGE_SIMULATIONS = flags.DEFINE_integer("language_simulations", 32, "N.", lower_bound=1)
_LANGUAGE_CHILDREN = flags.DEFINE_integer("language_children", 16, "K.", lower_bound=1)
_LANGUAGE_STEP = flags.DEFINE_integer("language_step_tokens", 16, "S.", lower_bound=1)

# Suite search, a list of questions.
_PROBLEMS = flags.DEFINE_string("problems", None, "GSM8K's test.jsonl (default: made-up sums).")
_LIMIT = flags.DEFINE_integer("problems_limit", 16, "Problems searched.", lower_bound=1)
_ALONE = flags.DEFINE_integer(
    "alone_limit", 4, "Those that the one-by-one modes search: their rate is the same.",
    lower_bound=1,
)  # fmt: skip
_EXPANSIONS = flags.DEFINE_integer("expansions", 32, "Expansions per problem.", lower_bound=1)
_CHILDREN = flags.DEFINE_integer("children", 4, "Children per expansion.", lower_bound=1)
_STEP = flags.DEFINE_integer("step_tokens", 32, "Tokens of a step.", lower_bound=1)
_HOST_MODES = flags.DEFINE_list(
    "host_modes", list(bench_search.MODES), "How the other side calls its model.",
)  # fmt: skip
_HOST_LEAVES = flags.DEFINE_list("host_leaves", ["1", "4"], "Leaves in one call, ours.")

# Suite memory.
_MEMORY_MODEL = flags.DEFINE_string("memory_model", "8m", "As --models; of all parts but large.")
_DEPTHS = flags.DEFINE_list("depths", ["4", "16", "64"], "Depths of part nodes.")
_CAPACITIES = flags.DEFINE_list("capacities", ["64", "512", "4096"], "N of part capacity.")
_LARGE = flags.DEFINE_list("large", ["16", "256"], "Structures, and nodes of each, of part large.")
_LARGE_EXPANSIONS = flags.DEFINE_integer(
    "large_expansions", 0, "Expansions of part large, 0 to fill it: the pool is as large anyway."
)
_LARGE_DTYPE = flags.DEFINE_string("large_dtype", "float32", "Type of weights and KV there.")
flags.adopt_module_key_flags(launching)


def main() -> None:
    """Runs a suite and prints its lines as they come."""
    if _SUITE.value not in SUITES:
        raise ValueError(f"--suite={_SUITE.value}: accepted are {', '.join(SUITES)}")
    cases = {
        "decode": _decode_cases,
        "search": _search_cases,
        "memory": _memory_cases,
        "train": _train_cases,
    }
    found = cases[_SUITE.value]()
    launching.use_compilation_cache()
    with contextlib.ExitStack() as stack:
        files = [sys.stdout]
        if _OUT.value:
            files.append(stack.enter_context(pathlib.Path(_OUT.value).open("w")))
        for case in found:
            line = json.dumps({key: _shorten(value) for key, value in case.items()})
            for file in files:
                print(line, file=file, flush=True)


def _decode_cases() -> Iterator[dict[str, Any]]:
    _read_parts(())
    return bench_decode.run_decode(
        launching.read_config(_CONFIG),
        rows=_read_numbers(_ROWS),
        context_tokens=_CONTEXT.value,
        new_tokens=_NEW.value,
        repeats=_REPEATS.value,
        dtypes=_DTYPES.value,
        other_python=None if _ONLY_OURS.value else _OTHER.value,
    )


def _search_cases() -> Iterator[dict[str, Any]]:
    language = bench_language.Sizes(
        batch=1,
        num_simulations=_LANGUAGE_SIMULATIONS.value,
        num_children=_LANGUAGE_CHILDREN.value,
        step_tokens=_LANGUAGE_STEP.value,
        context_tokens=_CONTEXT.value,
    )
    host = bench_search.HostSizes(
        problems=_PROBLEMS.value,
        num_problems=_LIMIT.value,
        num_alone=min(_ALONE.value, _LIMIT.value),
        num_expansions=_EXPANSIONS.value,
        num_children=_CHILDREN.value,
        step_tokens=_STEP.value,
        leaves=_read_numbers(_HOST_LEAVES),
        modes=_HOST_MODES.value,
        context_tokens=_CONTEXT.value,
        new_tokens=_NEW.value,
    )
    llama = _LLAMA.value or _OTHER.value
    return bench_search.run_search(
        launching.read_config(_CONFIG),
        parts=_read_parts(bench_search.PARTS, bench_search.GROUPS),
        small={
            "batches": _read_numbers(_BATCHES),
            "simulations": _read_numbers(_SIMULATIONS),
            "leaves": _read_numbers(_LEAVES),
        },
        language={
            "models": _MODELS.value,
            "batches": _read_numbers(_LANGUAGE_BATCHES),
            "leaves": _read_numbers(_LANGUAGE_LEAVES),
            "sizes": language,
        },
        host=host,
        patience=_read_patience(),
        other_python=None if _ONLY_OURS.value else _OTHER.value,
        llama_python=None if _ONLY_OURS.value else llama,
        formats=_FORMATS.value,
    )


def _memory_cases() -> Iterator[dict[str, Any]]:
    large = _read_numbers(_LARGE)
    if len(large) != 2:
        raise ValueError(f"--large={','.join(_LARGE.value)}: accepted are two numbers")
    sizes = bench_memory.MemorySizes(
        model=_MEMORY_MODEL.value,
        depths=_read_numbers(_DEPTHS),
        capacities=_read_numbers(_CAPACITIES),
        num_structures=large[0],
        large_nodes=large[1],
        large_expansions=_LARGE_EXPANSIONS.value,
        large_dtype=_LARGE_DTYPE.value,
    )
    return bench_memory.run_memory(
        launching.read_config(_CONFIG),
        parts=_read_parts(bench_memory.PARTS),
        sizes=sizes,
        patience=_read_patience(),
    )


def _train_cases() -> Iterator[dict[str, Any]]:
    return bench_train.run_train(
        launching.read_config(_CONFIG),
        parts=_read_parts(bench_train.PARTS),
        patience=_read_patience(),
    )


def _read_patience() -> bench_timing.Patience:
    return bench_timing.Patience(_REPEATS.value, _SIDE.value, _QUIET.value)


def _read_numbers(flag: flags.FlagHolder[Any]) -> list[int]:
    """The numbers of a list flag, all of them at least 1."""
    shown = f"--{flag.name}={','.join(flag.value)}"
    try:
        numbers = [int(number) for number in flag.value]
    except ValueError:
        raise ValueError(f"{shown}: accepted are whole numbers") from None
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{shown}: accepted are numbers >= 1")
    return numbers


def _read_parts(
    parts: Sequence[str], groups: dict[str, tuple[str, ...]] | None = None
) -> Sequence[str]:
    """The parts that --only names, all of them by default; a group's name stands for its parts."""
    groups = groups or {}
    for name in _ONLY.value:
        if name not in parts and name not in groups:
            accepted = ", ".join(dict.fromkeys((*parts, *groups))) or "none for this suite"
            raise ValueError(f"--only={name}: accepted are {accepted}")
    chosen = [part for name in _ONLY.value for part in groups.get(name, (name,))]
    return chosen or parts


def _shorten(value: object) -> object:
    if isinstance(value, dict):
        return {key: _shorten(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shorten(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    launching.launch(main)
