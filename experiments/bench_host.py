"""Our end of the other sides of `bench.py --suite=search --only=host`.

    with open_host(python, model) as host:
        host_search(host, prompts, "batched", stop_ids=..., final_ids=..., fixed_length=True)

A side is opened once and asked again and again, so that it can alternate with ours in one run
(A/B/A/B); while it is not asked, it sleeps. `bench_host_search.py` says what the modes are.
"""

import contextlib
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

from side_process import SideProcess

HOW_TO_GET_HOST = "pip install torch transformers, or --other_python=PATH of a Python with both"
HOW_TO_GET_LLAMA = (
    'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON" pip install llama-cpp-python, '
    "or --other_python=PATH of a Python with it"
)


def find_enders(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that end a step (they hold a newline) and those that end a solution.

    Unlike our own step rule, the other side ends a step at a newline with nothing before it, too.
    """
    newlines = [t for t in range(tokenizer.vocab_size) if b"\n" in tokenizer.token_bytes(t)]
    return newlines, sorted(tokenizer.eos_ids)


@contextlib.contextmanager
def open_host(python: str, model: str | pathlib.Path, dtype: str = "float32") -> Iterator[Any]:
    """A process that holds `model` (a GGUF file or a checkpoint's folder) and searches over it.

    Raises:
      RuntimeError: torch or transformers is missing there, or they cannot load the model.
    """
    with SideProcess(python, "bench_host_search.py") as host:
        try:
            host.ask("load", model=str(model), dtype=dtype)
        except RuntimeError as error:
            raise RuntimeError(f"not here ({error}): {HOW_TO_GET_HOST}") from error
        yield host


def host_search(
    host: SideProcess,
    prompts: Sequence[Sequence[int]],
    mode: str,
    *,
    stop_ids: Sequence[int],
    final_ids: Sequence[int],
    fixed_length: bool,
    expansions: int = 32,
    children: int = 4,
    step_tokens: int = 32,
    max_depth: int = 16,
    temperature: float = 0.8,
    top_k: int = 32,
    exploration: float = 1.25,
    seed: int = 0,
    return_trees: bool = False,
) -> dict[str, Any]:
    """One tree search per prompt on the other side; its first call is slower than the next.

    Args:
      mode: "text", "path" or "batched". stop_ids: tokens that end a step. final_ids: tokens that
        end a solution. fixed_length: neither ends anything; all steps have `step_tokens`.

    Returns:
      seconds, cpu_seconds, generated_tokens, prefilled_tokens, forwarded_tokens, model_calls,
      expansions, tokens_per_second, and `problems` with the same of each (seconds: None where
      problems share them), and its nodes as `tree` where `return_trees`.
    """
    return host.ask(
        "search",
        mode=mode,
        prompts=[list(map(int, prompt)) for prompt in prompts],
        stop_ids=sorted(map(int, stop_ids)),
        final_ids=sorted(map(int, final_ids)),
        fixed_length=fixed_length,
        expansions=expansions,
        children=children,
        step_tokens=step_tokens,
        max_depth=max_depth,
        temperature=temperature,
        top_k=top_k,
        exploration=exploration,
        seed=seed,
        return_trees=return_trees,
    )


@contextlib.contextmanager
def open_llama(python: str) -> Iterator[Any]:
    """A process with llama.cpp; raises RuntimeError where llama_cpp is missing there."""
    with SideProcess(python, "bench_llama.py") as llama:
        try:
            llama.ask("load")
        except RuntimeError as error:
            raise RuntimeError(f"not here ({error}): {HOW_TO_GET_LLAMA}") from error
        yield llama


def make_formats(
    llama: SideProcess, gguf: str | pathlib.Path, folder: str | pathlib.Path
) -> dict[str, str]:
    """Files of the model in f32, f16 and q8_0, written to `folder` unless they are there.

    The weights are those of `gguf`, whatever its format: nothing is gained by a wider one.
    """
    return llama.ask("convert", gguf=str(gguf), folder=str(folder))


def llama_decode(
    llama: SideProcess,
    gguf: str | pathlib.Path,
    rows: int,
    context: int | Sequence[int],
    new_tokens: int,
    repeats: int,
    vocab_size: int = 49152,
    seed: int = 0,
) -> dict[str, Any]:
    """Decodes greedily behind a prompt that all rows share.

    Args:
      context: the prompt's tokens, or how many random ones below `vocab_size`.

    Returns:
      seconds of each repeat, cpu_seconds (mean), tokens [rows][new_tokens], tokens_per_second (of
      the best repeat), layout of the cache and its trial_seconds.
    """
    if isinstance(context, int):
        numbers = random.Random(seed)
        context = [numbers.randrange(10, vocab_size) for _ in range(context)]
    return llama.ask(
        "decode",
        gguf=str(gguf),
        prompt=[int(token) for token in context],
        rows=rows,
        new_tokens=new_tokens,
        repeats=repeats,
    )
