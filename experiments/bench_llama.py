"""The other side of `bench.py --suite=search`: decoding with llama.cpp, many rows at once.

    python experiments/bench_llama.py   (started by bench.py, under any Python with llama_cpp)

A process that obeys (`side_process.py`). A shared prompt is prefilled once in one sequence and
shared with all the others (`llama_memory_seq_cp`), then each step is one `llama_batch` with one
token of every row: the fastest form that llama.cpp's C interface has for this. Rows are continued
greedily, all of them to the end, and the choice among the logits is part of the time.

    {"do": "load"}                                      -> version, what is built in, threads
    {"do": "convert", "gguf": FILE, "folder": FOLDER}   -> {"f32": FILE, "f16": ..., "q8_0": ...}
    {"do": "decode", "gguf": FILE, "prompt": [ids], "rows": R, "new_tokens": S, "repeats": N}
        -> seconds (one each repeat), tokens [R][S], and the cache layout that was faster

Build llama-cpp-python with CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON ..." and without AMX
where that crashes; `load`'s answer names what was built in.
"""

import contextlib
import ctypes
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from side_process import serve

FORMATS = {"f32": "LLAMA_FTYPE_ALL_F32", "f16": "LLAMA_FTYPE_MOSTLY_F16",
           "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}  # fmt: skip
# One buffer that all rows attend to with a mask, or one each, the prompt copied; and whether
# attention is fused. None is the fastest for all numbers of rows.
LAYOUTS = {
    "unified": (True, 0),
    "unified_flash": (True, 1),
    "per_row": (False, 0),
    "per_row_flash": (False, 1),
}


def describe() -> dict[str, Any]:
    """What runs a model on this side."""
    import llama_cpp

    built = llama_cpp.llama_print_system_info().decode()
    return {"llama_cpp_python": llama_cpp.__version__, "system": built, "threads": _num_threads()}


def convert(gguf: str, folder: str) -> dict[str, Any]:
    """Writes a GGUF file in each of FORMATS, from whatever format it has; keeps those there are.

    Raises:
      FileNotFoundError: there is no such file. RuntimeError: llama.cpp could not convert it.
    """
    import llama_cpp

    source = pathlib.Path(gguf)
    if not source.is_file():
        raise FileNotFoundError(f"no GGUF file {gguf}")
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    made = {}
    for name, kind in FORMATS.items():
        target = pathlib.Path(folder) / f"{source.name.split('.')[0]}.{name}.gguf"
        made[name] = str(target)
        if target.exists():
            continue
        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread = _num_threads()
        params.ftype = getattr(llama_cpp, kind)
        params.allow_requantize = True
        params.pure = True  # Or some tensors would stay in a format of the file's own.
        part = target.with_suffix(".part")
        failed = llama_cpp.llama_model_quantize(
            str(source).encode(), str(part).encode(), ctypes.byref(params)
        )
        if failed:
            raise RuntimeError(f"llama.cpp could not write {gguf} as {name}")
        part.rename(target)
    return made


def decode(
    gguf: str, prompt: Sequence[int], rows: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Times `repeats` decodings of the same prompt, in the layout that a trial favours."""
    if min(rows, new_tokens, repeats, len(prompt)) < 1:
        raise ValueError("decode: accepted are a prompt, rows, new_tokens and repeats of 1 or more")
    with _load(gguf) as model:
        shape = (prompt, rows, new_tokens)
        # The whole length each: a buffer that rows share grows with all of them.
        trial = {layout: min(_time_layout(model, layout, *shape, 1)[0]) for layout in LAYOUTS}
        best = min(trial, key=lambda layout: trial[layout])
        seconds, cpu, tokens = _time_layout(model, best, *shape, repeats)
    return {
        "seconds": seconds, "cpu_seconds": cpu, "tokens": tokens,
        "tokens_per_second": rows * new_tokens / min(seconds), "layout": best,
        "trial_seconds": trial,
    }  # fmt: skip


def _time_layout(model, layout: str, prompt, rows: int, new_tokens: int, repeats: int):
    """Seconds of each repeat, mean processor seconds, and the last repeat's tokens."""
    with _open_context(model, layout, len(prompt), rows, new_tokens) as context:
        first = _prefill(model, context, prompt, rows)
        args = (model, context, first, len(prompt), rows)
        _decode_once(*args, min(4, new_tokens))  # First calls allocate.
        start = time.process_time()
        runs = [_decode_once(*args, new_tokens) for _ in range(repeats)]
        cpu = (time.process_time() - start) / repeats
    return [run[0] for run in runs], cpu, runs[-1][1]


@contextlib.contextmanager
def _load(gguf: str) -> Iterator[Any]:
    import llama_cpp

    if not pathlib.Path(gguf).is_file():
        raise FileNotFoundError(f"no GGUF file {gguf}")
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(gguf.encode(), params)
    if not model:
        raise ValueError(f"{gguf}: llama.cpp cannot load it")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


@contextlib.contextmanager
def _open_context(model, layout: str, num_prompt: int, rows: int, new_tokens: int):
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    unified, params.flash_attn_type = LAYOUTS[layout]
    each = num_prompt + new_tokens
    params.n_ctx = num_prompt + rows * new_tokens if unified else rows * _round_up(each, 256)
    params.n_batch = params.n_ubatch = max(num_prompt, rows)
    params.n_seq_max = rows
    params.n_threads = params.n_threads_batch = _num_threads()
    params.kv_unified = unified
    params.no_perf = True
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise ValueError(f"llama.cpp cannot hold {rows} rows of {each} tokens")
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)


def _prefill(model, context, prompt: Sequence[int], rows: int) -> int:
    """Forwards the prompt in row 0 and shares it with the others; the token that follows it."""
    import llama_cpp

    with _make_batch(len(prompt)) as batch:
        for index, token in enumerate(prompt):
            _put(batch, index, token, index, 0, wanted=index == len(prompt) - 1)
        _run(context, batch)
    memory = llama_cpp.llama_get_memory(context)
    for row in range(1, rows):
        llama_cpp.llama_memory_seq_cp(memory, 0, row, -1, -1)
    return int(_read_logits(model, context, 1).argmax())


def _decode_once(model, context, first: int, num_prompt: int, rows: int, new_tokens: int):
    """Seconds, and the tokens [rows][new_tokens]; the rows are as before the call afterwards.

    Every token is forwarded, `first`, which follows the prompt in every row, before all.
    """
    import llama_cpp

    newest = [first] * rows
    chosen = []
    with _make_batch(rows) as batch:
        start = time.perf_counter()
        for position in range(num_prompt, num_prompt + new_tokens):
            chosen.append(newest)
            for row, token in enumerate(newest):
                _put(batch, row, token, position, row, wanted=True)
            _run(context, batch)
            newest = _read_logits(model, context, rows).argmax(1).tolist()
        seconds = time.perf_counter() - start
    memory = llama_cpp.llama_get_memory(context)
    for row in range(rows):
        llama_cpp.llama_memory_seq_rm(memory, row, num_prompt, -1)
    return seconds, [list(row) for row in zip(*chosen, strict=True)]


def _read_logits(model, context, rows: int):
    """The logits of the last forward pass [rows V], where llama.cpp keeps them."""
    import llama_cpp
    import numpy as np

    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (rows, vocab_size))


@contextlib.contextmanager
def _make_batch(room: int):
    import llama_cpp

    batch = llama_cpp.llama_batch_init(room, 0, 1)
    batch.n_tokens = room
    try:
        yield batch
    finally:
        llama_cpp.llama_batch_free(batch)


def _put(batch, index: int, token: int, position: int, row: int, *, wanted: bool) -> None:
    batch.token[index] = token
    batch.pos[index] = position
    batch.n_seq_id[index] = 1
    batch.seq_id[index][0] = row
    batch.logits[index] = wanted


def _run(context, batch) -> None:
    import llama_cpp

    code = llama_cpp.llama_decode(context, batch)
    if code:
        raise RuntimeError(f"llama_decode answered {code} for {batch.n_tokens} tokens")


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _num_threads() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    """Answers commands until stdin ends."""
    serve({"load": describe, "convert": convert, "decode": decode})


if __name__ == "__main__":
    main()
