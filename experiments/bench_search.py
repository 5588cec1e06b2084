"""Suite "search" of bench.py: tree search against mctx, host-side search and llama.cpp.

`run_search` gives the parts in order: small networks and a language model against mctx
(`bench_small.py`, `bench_language.py`), the whole search over a list of questions against Python
over transformers in three ways (`bench_host_search.py`), and plain decoding against llama.cpp.
In the last two, steps end by their length alone: all sides decode the same number of tokens.
"""

import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_decode import make_decoder
from bench_host import find_enders, host_search, llama_decode, make_formats, open_host, open_llama
from bench_language import SAMPLING, make_language_model, run_language
from bench_small import run_small
from bench_timing import (
    Compiled,
    Patience,
    compile_call,
    describe_pair,
    time_once,
    time_pair,
    wait_until_quiet,
)

from rlm_jax.evaluation import build
from rlm_jax.evaluation.build import Policy
from rlm_jax.evaluation.prompts import encode_problem, pad_prompts
from rlm_jax.models.load import find_model
from rlm_jax.reasoning.drive import Limits, run_compiled
from rlm_jax.reasoning.language import LanguageConfig, begin, make_expand
from rlm_jax.reasoning.strategies.puct import make_puct
from rlm_jax.tasks import arithmetic, gsm8k
from rlm_jax.tasks.base import Problem

PARTS = ("small", "language", "questions", "llama")
GROUPS = {"mctx": ("small", "language"), "host": ("questions", "llama")}
MODES = ("batched", "path", "text")
_BUCKET_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class HostSizes:
    """The search of parts "questions" and "llama".

    problems: a file of GSM8K's form, None for made-up sums. num_problems: searched side by side.
    num_alone: those of them in the modes that take one after the other, whose rate does not depend
    on their number. leaves: W of ours, one case each. modes: of `MODES`, the other side's. rows,
    context_tokens, new_tokens: of llama.cpp's decoding.
    """

    problems: str | None = None
    num_problems: int = 16
    num_alone: int = 4
    num_expansions: int = 32
    num_children: int = 4
    step_tokens: int = 32
    max_depth: int = 16
    leaves: Sequence[int] = (1, 4)
    modes: Sequence[str] = MODES
    rows: int = 16
    context_tokens: int = 192
    new_tokens: int = 32

    def __post_init__(self):
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"host_modes={mode}: accepted are {', '.join(MODES)}")


def run_search(
    config: Mapping[str, Any],
    *,
    parts: Sequence[str],
    small: Mapping[str, Sequence[int]],
    language: Mapping[str, Any],
    host: HostSizes,
    patience: Patience,
    other_python: str | None,
    llama_python: str | None,
    formats: str | None = None,
) -> Iterator[dict[str, Any]]:
    """The suite's cases, one after the other.

    Args:
      parts: of `PARTS`. small, language: sizes, see `run_small` and `run_language`.
      other_python, llama_python: None leaves the other side out.
      formats: folder for the model in llama.cpp's formats (a gigabyte), None for a temporary one.
    """
    with_other = other_python is not None
    if "small" in parts:
        yield from run_small(**small, patience=patience, with_other=with_other)
    if "language" in parts:
        yield from run_language(config, **language, patience=patience, with_other=with_other)
    if "questions" in parts:
        yield from run_questions(config, host, patience, other_python)
    if "llama" in parts:
        yield from run_llama(config, host, patience, llama_python, formats)


# Against Python over transformers.


def run_questions(
    config: Mapping[str, Any], sizes: HostSizes, patience: Patience, other_python: str | None
) -> Iterator[dict[str, Any]]:
    """One case for each W of ours and each mode of the other side."""
    policy = build.load_policy(config["model"])
    prompts = make_prompts(policy, sizes)
    calls = {lanes: compile_search(policy, sizes, prompts, lanes) for lanes in sizes.leaves}
    for lanes, search in calls.items():
        structure = search.call()
        generated, expansions = (
            int(structure.budget.generated_tokens.sum()),
            int(structure.budget.expansions.sum()),
        )
        assert generated == expansions * sizes.num_children * sizes.step_tokens
        assert expansions == len(prompts) * sizes.num_expansions, (lanes, expansions)
    try:
        if other_python is None:
            raise RuntimeError("left out (--only_ours)")
        if config["model"].startswith("random:"):
            raise RuntimeError("a random model has no file for the other side")
        with open_host(other_python, find_model(config["model"])) as other:
            for mode in sizes.modes:
                for lanes in sizes.leaves:
                    yield _compare_host(
                        policy, sizes, prompts, patience, calls[lanes], lanes, mode, other
                    )
    except RuntimeError as error:
        for lanes in sizes.leaves:
            yield _compare_host(
                policy, sizes, prompts, patience, calls[lanes], lanes, str(error), None
            )


def make_prompts(policy: Policy, sizes: HostSizes) -> list[list[int]]:
    """GSM8K prompts of the first problems of the file, or of sums.

    Raises:
      ValueError: the file holds fewer, or is none of GSM8K.
    """
    if sizes.problems is None:
        assert arithmetic.TASK.generate is not None
        examples = arithmetic.TASK.generate(0, sizes.num_problems, 0.5)
    else:
        examples = gsm8k.load(sizes.problems)[: sizes.num_problems]
    if len(examples) < sizes.num_problems:
        raise ValueError(
            f"{sizes.problems} holds {len(examples)} problems; wanted are {sizes.num_problems}"
        )
    problems = [Problem(problem.question, id=problem.id) for problem, _ in examples]
    return [encode_problem(policy.tokenizer, gsm8k.TASK, problem) for problem in problems]


def compile_search(
    policy: Policy, sizes: HostSizes, prompts: Sequence[Sequence[int]], num_lanes: int
) -> Compiled:
    """Our search of all prompts in one batch, prefill and all."""
    language = LanguageConfig(
        model=policy.cfg,
        sampling=SAMPLING,
        evaluator="likelihood",
        num_nodes=1 + sizes.num_expansions * sizes.num_children,
        max_depth=sizes.max_depth,
        max_new_tokens=sizes.num_expansions * sizes.num_children * sizes.step_tokens,
        page_tokens=next(size for size in (16, 8, 4, 2, 1) if sizes.step_tokens % size == 0),
    )
    strategy = make_puct(
        num_children=sizes.num_children, num_lanes=num_lanes, max_depth=sizes.max_depth
    )
    expand = make_expand(language)
    lm = make_language_model(policy, sizes.step_tokens)
    width = -(-max(map(len, prompts)) // _BUCKET_TOKENS) * _BUCKET_TOKENS
    tokens, lengths = map(jnp.asarray, pad_prompts(prompts, width))
    keys = jax.random.split(jax.random.key(0), len(prompts))

    def search(lm, tokens, lengths):
        structure, world = begin(lm, tokens, lengths, cfg=language)
        structure, _ = run_compiled(
            strategy,
            expand,
            lm,
            keys,
            world,
            structure,
            limits=Limits(step_tokens=sizes.step_tokens),
        )
        return structure

    return compile_call(search, lm, tokens, lengths)


def _compare_host(policy, sizes, prompts, patience, search: Compiled, lanes, mode, other):
    tokens = sizes.num_expansions * sizes.num_children * sizes.step_tokens
    stop_ids, final_ids = find_enders(policy.tokenizer)
    chosen = prompts if mode == "batched" else prompts[: sizes.num_alone]
    settings = {
        "stop_ids": stop_ids,
        "final_ids": final_ids,
        "fixed_length": True,
        "children": sizes.num_children,
        "step_tokens": sizes.step_tokens,
        "max_depth": sizes.max_depth,
    }
    answers = []

    def search_there():
        answer = host_search(other, chosen, mode, expansions=sizes.num_expansions, **settings)
        assert answer["generated_tokens"] == len(chosen) * tokens, answer
        answers.append(answer)

    if other is not None:
        # Its first calls set things up: not part of what is compared.
        host_search(other, prompts[:1], mode, expansions=1, **settings)
    times = time_pair(search.call, None if other is None else search_there, patience)
    return {
        "case": f"questions_{mode}" if other is not None else "questions",
        **describe_pair(times, len(prompts) * tokens, len(chosen) * tokens),
        "unit": "decoded tokens/s",
        "batch": len(prompts),
        "other_batch": len(chosen),
        "simulations": sizes.num_expansions,
        "leaves": lanes,
        "children": sizes.num_children,
        "step_tokens": sizes.step_tokens,
        "other_is": f"Python over transformers, {mode}" if other is not None else mode,
        "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
        "other_forwarded_tokens": answers[0]["forwarded_tokens"] if answers else None,
        "other_model_calls": answers[0]["model_calls"] if answers else None,
        "problems": sizes.problems and pathlib.Path(sizes.problems).name,
        "compile_seconds": search.seconds,
    }


# Against llama.cpp.


def run_llama(
    config: Mapping[str, Any],
    sizes: HostSizes,
    patience: Patience,
    llama_python: str | None,
    formats: str | None,
) -> Iterator[dict[str, Any]]:
    """Two cases of plain decoding: float32 on both sides, and int8 against their best format."""
    policy = build.load_policy(config["model"])
    rng = np.random.default_rng(0)
    vocab_size = policy.cfg.vocab_size
    prompt = [int(t) for t in rng.integers(10, vocab_size - 10, sizes.context_tokens)]
    calls = {}
    for name, quantize in (("float32", None), ("int8", "int8")):
        weights = (
            policy if quantize is None else build.load_policy(config["model"], "float32", name)
        )
        calls[name], _ = make_decoder(weights, sizes.rows, prompt, sizes.new_tokens)
        jax.block_until_ready(calls[name]())
    with tempfile.TemporaryDirectory() as folder:
        try:
            if llama_python is None:
                raise RuntimeError("left out (--only_ours)")
            if config["model"].startswith("random:"):
                raise RuntimeError("a random model has no file for the other side")
            with open_llama(llama_python) as llama:
                gguf = find_model(config["model"])
                files = {"own": str(gguf), **make_formats(llama, gguf, formats or folder)}

                def decode(file: str) -> dict[str, Any]:
                    shape = (sizes.rows, prompt, sizes.new_tokens, patience.repeats)
                    return llama_decode(llama, file, *shape)

                ours, theirs, busy = _time_llama(calls, files, decode, patience)
            note = None
        except RuntimeError as error:
            ours, theirs, busy = _time_llama(calls, {}, None, patience)
            note = str(error)
    yield from describe_llama(sizes, ours, theirs, note, busy)


def describe_llama(
    sizes: HostSizes,
    ours: Mapping[str, Sequence[float]],
    theirs: Mapping[str, Sequence[float]],
    note: str | None,
    busy: float | None,
) -> Iterator[dict[str, Any]]:
    """The two cases, from the seconds of calls by our dtypes and by their formats.

    Args:
      note: why `theirs` is empty.
    """
    tokens = sizes.rows * sizes.new_tokens
    best = min(theirs, key=lambda name: min(theirs[name]), default=None)
    for name, other in (("float32", "f32" if theirs else None), ("int8", best)):
        other_seconds = theirs[other] if other is not None else []
        rate = tokens / min(ours[name])
        other_rate = tokens / min(other_seconds) if other_seconds else None
        yield {
            "case": f"llama_{name}",
            "ours": rate,
            "other": other_rate,
            "ratio": rate / other_rate if other_rate else None,
            "unit": "decoded tokens/s",
            "ours_median": tokens / statistics.median(ours[name]),
            "other_median": tokens / statistics.median(other_seconds) if other_seconds else None,
            "other_is": note or f"llama.cpp, {other} weights",
            "batch": sizes.rows,
            "simulations": None,
            "leaves": None,
            "context": sizes.context_tokens,
            "new_tokens": sizes.new_tokens,
            "all_formats": {f: tokens / min(seconds) for f, seconds in theirs.items()},
            "machine_busy_before": busy,
        }


def _time_llama(calls, files, decode, patience):
    """Seconds of every call, by our dtypes and by their formats, taken in turn, twice."""
    busy = wait_until_quiet(patience.quiet_seconds)
    ours: dict[str, list[float]] = {name: [] for name in calls}
    theirs: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(2):
        for name, call in calls.items():
            ours[name] += [time_once(call) for _ in range(patience.repeats)]
        for name, file in files.items():
            theirs[name] += decode(file)["seconds"]
    return ours, theirs, busy
