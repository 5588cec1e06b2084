"""The other side of `bench.py`: step decoding with transformers, as a process that obeys.

    python experiments/bench_transformers.py   (started by bench.py, under any Python with torch)

A process of its own, spoken to as `side_process.py` says. The other sides of the benchmarks are the
only programs here that import torch, and they import nothing of the package.

    {"do": "load", "model": FILE_OR_FOLDER, "dtype": "float32"}      -> versions, threads
    {"do": "prefill", "prompt": [ids], "rows": R, "new_tokens": S}   -> the cache that is faster
    {"do": "decode"}                                                 -> seconds, tokens [R][S]

Given: greedy decoding, a hand-written loop without `generate`'s bookkeeping, inference mode, the
default attention (sdpa), and whichever of DynamicCache and StaticCache is faster. The prompt is
forwarded once; its keys and values are copied to all rows outside of the timed part.
"""

import os
import time
from typing import Any

from side_process import serve


def load_model(path: str, dtype: str) -> Any:
    """A causal language model from a GGUF file or a folder of a checkpoint, ready to run."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, file = (path, None) if os.path.isdir(path) else os.path.split(path)
    kind = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=kind, local_files_only=True
    )
    return model.to(kind).eval()


def describe_versions() -> dict[str, Any]:
    """What runs a model on this side."""
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


class Side:
    """A loaded model and what it is to continue."""

    def __init__(self):
        self.model: Any = None

    def load(self, model: str, dtype: str) -> dict[str, Any]:
        """Loads a checkpoint; what runs it."""
        import torch
        import transformers

        self.torch, self.transformers = torch, transformers
        self.model = None  # The old weights make room first.
        self.model = load_model(model, dtype)
        return describe_versions()

    def prefill(self, prompt: list[int], rows: int, new_tokens: int) -> dict[str, Any]:
        """Forwards the prompt once and finds out which cache decodes faster."""
        self.rows, self.new_tokens, self.num_prompt = rows, new_tokens, len(prompt)
        with self.torch.inference_mode():
            cache = self.transformers.DynamicCache(config=self.model.config)
            logits = self.model(
                input_ids=self.torch.tensor([prompt]), past_key_values=cache, use_cache=True
            ).logits
            self.first = logits[:, -1].argmax(-1, keepdim=True).expand(rows, 1).contiguous()
            self.prefix = [(layer.keys, layer.values) for layer in cache.layers]
        seconds = {}
        for kind in ("dynamic", "static"):
            self.kind = kind
            self.decode(num_tokens=2)  # First calls allocate and choose kernels.
            seconds[kind] = min(
                self.decode(num_tokens=min(8, new_tokens))["seconds"] for _ in range(2)
            )
        self.kind = min(seconds, key=lambda kind: seconds[kind])
        return {"cache": self.kind, "trial_seconds": seconds}

    def decode(self, num_tokens: int | None = None) -> dict[str, Any]:
        """Forwards `new_tokens` tokens a row; the first follows the prompt, as on our side."""
        num_tokens = num_tokens or self.new_tokens
        with self.torch.inference_mode():
            cache = self._make_cache()
            token, chosen = self.first, []
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(num_tokens):
                chosen.append(token)
                logits = self.model(input_ids=token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
            tokens = self.torch.cat(chosen, 1).tolist()
            seconds = time.perf_counter() - start
        cpu = time.process_time() - start_cpu
        return {"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens}

    def _make_cache(self):
        config = self.model.config
        if self.kind == "dynamic":
            cache = self.transformers.DynamicCache(config=config)
        else:
            room = self.num_prompt + self.new_tokens
            cache = self.transformers.StaticCache(config=config, max_cache_len=room)
        for layer, (keys, values) in enumerate(self.prefix):
            wide = [array.expand(self.rows, -1, -1, -1).contiguous() for array in (keys, values)]
            cache.update(*wide, layer)
        return cache


def main() -> None:
    """Answers commands until stdin ends."""
    side = Side()
    serve({"load": side.load, "prefill": side.prefill, "decode": side.decode})


if __name__ == "__main__":
    main()
