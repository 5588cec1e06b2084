"""The other side of `bench.py`: step decoding with transformers, as a process that obeys.

    python experiments/bench_transformers.py   (started by bench.py, under any Python with torch)

One JSON object a line on stdin, one answer a line on stdout; it ends with its stdin. A process of
its own, so that neither side's threads or memory are in the other's way; between commands it
sleeps in a read. It is the only program here that imports torch, and it imports nothing of ours.

    {"do": "load", "model": FILE_OR_FOLDER, "dtype": "float32"}      -> versions, threads
    {"do": "prefill", "prompt": [ids], "rows": R, "new_tokens": S}   -> the cache that is faster
    {"do": "decode"}                                                 -> seconds, tokens [R][S]

Given: greedy decoding, a hand-written loop without `generate`'s bookkeeping, inference mode, the
default attention (sdpa), and whichever of DynamicCache and StaticCache is faster. The prompt is
forwarded once; its keys and values are copied to all rows outside of the timed part.
"""

import json
import os
import sys
import time
from typing import Any


class Side:
    """A loaded model and what it is to continue."""

    def __init__(self, path: str, dtype: str):
        import torch
        import transformers

        self.torch = torch
        self.transformers = transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        folder, file = (path, None) if os.path.isdir(path) else os.path.split(path)
        kind = getattr(torch, dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=kind, local_files_only=True
        )
        self.model = model.to(kind).eval()

    def describe(self) -> dict[str, Any]:
        return {
            "torch": self.torch.__version__,
            "transformers": self.transformers.__version__,
            "threads": self.torch.get_num_threads(),
        }

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
            seconds[kind] = min(self.decode(num_tokens=8)["seconds"] for _ in range(2))
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
    """Answers commands until stdin ends; a mistake is answered, not raised."""
    # Libraries that print must not break the protocol.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    side: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        try:
            if do == "load":
                side = None  # The old weights make room first.
                side = Side(command["model"], command["dtype"])
                answer = side.describe()
            else:
                answer = {"prefill": side.prefill, "decode": side.decode}[do](**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
