"""How a host-side search samples steps from a transformers model: text re-sent, or KV kept.

`TextSampler` sends a path's tokens anew for each expansion, to `generate`, as frameworks do that
see the model as a function from text to text. `KeptSampler` never forwards a token twice: every
node keeps the keys and values of its own tokens. An expansion gathers those of the paths into one
preallocated buffer, left-padded so that all paths end in the same column, and appends the new
tokens behind them. It is written to be as fast as transformers allows:

- The K children of a leaf are K queries of one row, not K rows: they share the path's columns, and
  a mask hides the siblings' tokens from each other (tree attention). So the path is neither copied
  nor read K times.
- Query heads that share a KV head are packed into one product (as transformers does for one query).
- A child that has ended leaves the batch as far as the other trees allow.
- A step's last token is forwarded only once its node is expanded, and then once for all children.

For a Python with torch and transformers; nothing of the package is imported.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from host_tree import Step, Tree, join_tokens, trace_path
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

HIDDEN = float("-inf")


@dataclasses.dataclass(frozen=True)
class Rules:
    """How steps are sampled, and what ends them.

    stop_ids end a step, final_ids the whole solution; `fixed_length` lets nothing but
    `step_tokens` end either. temperature: 0 for the likeliest token.
    """

    num_children: int
    step_tokens: int
    stop_ids: frozenset[int]
    final_ids: frozenset[int]
    fixed_length: bool
    temperature: float
    top_k: int

    def __post_init__(self):
        for name in ("num_children", "step_tokens", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are numbers >= 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: accepted are numbers >= 0")

    def ends(self, token: int) -> bool:
        """Whether a step ends with this token, its length aside."""
        return not self.fixed_length and (token in self.stop_ids or token in self.final_ids)

    def finishes(self, token: int) -> bool:
        """Whether the solution ends with this token."""
        return not self.fixed_length and token in self.final_ids


@dataclasses.dataclass
class Work:
    """What was done: counts of tokens and calls, exact.

    generated: tokens of the steps. prefilled: tokens of prompts and of re-sent paths forwarded.
    forwarded: token positions that went through the model in all. model_calls: forward passes.
    """

    generated: int = 0
    prefilled: int = 0
    forwarded: int = 0
    model_calls: int = 0


class TextSampler:
    """Re-sends the path for every expansion."""

    def __init__(self, model: Any, rules: Rules):
        model.set_attn_implementation("sdpa")
        # A checkpoint's own habits (end tokens, penalties, temperature) are not part of the rules.
        model.generation_config = transformers.GenerationConfig()
        self.model, self.rules, self.work = model, rules, Work()

    def plant(self, prompt: Sequence[int]) -> None:
        """Nothing is kept of a prompt."""

    def expand(self, leaves: Sequence[tuple[Tree, int]]) -> list[list[Step]]:
        """K steps for each leaf, one leaf after the other."""
        return [self._expand_one(join_tokens(tree, leaf)) for tree, leaf in leaves]

    def _expand_one(self, path: list[int]) -> list[Step]:
        rules, sample = self.rules, self.rules.temperature > 0
        enders = sorted(rules.stop_ids | rules.final_ids)
        # `generate` takes several returned sequences only where it samples.
        copies = 1 if sample else rules.num_children
        ids = torch.tensor([path] * copies)
        done = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_return_sequences=rules.num_children // copies,
            do_sample=sample,
            temperature=rules.temperature if sample else None,
            top_k=rules.top_k if sample else None,
            top_p=1.0 if sample else None,
            max_new_tokens=rules.step_tokens,
            eos_token_id=None if rules.fixed_length else enders or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        chosen = done.sequences[:, len(path) :]
        logprobs = _logprob(torch.stack(done.logits, 1), chosen).tolist()
        calls, rows = len(done.logits), rules.num_children
        self.work.model_calls += calls
        self.work.prefilled += rows * len(path)
        self.work.forwarded += rows * (len(path) + calls - 1)
        return [self._cut(*row) for row in zip(chosen.tolist(), logprobs, strict=True)]

    def _cut(self, tokens: list[int], logprobs: list[float]) -> Step:
        """The row up to the token that ended it; what follows is padding."""
        ends = [index + 1 for index, token in enumerate(tokens) if self.rules.ends(token)]
        length = ends[0] if ends else len(tokens)
        self.work.generated += length
        finished = self.rules.finishes(tokens[length - 1])
        return Step(tokens[:length], sum(logprobs[:length]), finished)


class KeptSampler:
    """Keeps the keys and values of every node, and expands any number of trees at once."""

    def __init__(self, model: Any, rules: Rules, num_trees: int, room: int):
        """num_trees: how many at most are expanded at once. room: tokens of the longest path.

        Raises:
          ValueError: the model attends by other rules than causally to all that came before.
        """
        kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
        if kinds:
            raise ValueError(f"layers of {', '.join(sorted(kinds))}: accepted is full_attention")
        transformers.AttentionInterface.register("packed", _attend_packed)
        model.set_attn_implementation("packed")
        self.model, self.rules, self.work = model, rules, Work()
        config = model.config
        self.packing = config.num_attention_heads // config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        columns = room + rules.num_children * rules.step_tokens
        # Zeros: what a mask hides must still be finite.
        self.buffer = torch.zeros(
            config.num_hidden_layers, 2, num_trees, config.num_key_value_heads, columns, head_dim,
            dtype=model.dtype,
        )  # fmt: skip

    def plant(self, prompt: Sequence[int]) -> torch.Tensor:
        """Forwards a prompt but for its last token; what the root is to keep."""
        kept = self._make_kept(len(prompt))
        num_tokens = len(prompt) - 1
        if num_tokens:
            ids = torch.tensor([prompt[:-1]])
            cache = transformers.DynamicCache(config=self.model.config)
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for layer, made in enumerate(cache.layers):
                kept[layer, 0, :, :num_tokens] = made.keys[0]
                kept[layer, 1, :, :num_tokens] = made.values[0]
            self.work.model_calls += 1
            self.work.prefilled += num_tokens
            self.work.forwarded += num_tokens
        return kept

    def expand(self, leaves: Sequence[tuple[Tree, int]]) -> list[list[Step]]:
        """K steps for each leaf, all leaves at once."""
        paths = [[tree.nodes[i] for i in trace_path(tree, leaf)] for tree, leaf in leaves]
        lengths = torch.tensor([sum(len(node.tokens) for node in path) for path in paths])
        batch = _Batch(self, lengths)
        for row, path in enumerate(paths):
            batch.load(row, [node.kept for node in path])
        logits = batch.forward_last([path[-1].tokens[-1] for path in paths])
        for row, path in enumerate(paths):
            batch.save_last(row, path[-1].kept)
        return self._sample_steps(batch, logits)

    def _sample_steps(self, batch: "_Batch", logits: torch.Tensor) -> list[list[Step]]:
        """logits: [B V], those behind each path. The loop of one expansion."""
        rules = self.rules
        slots = [list(range(rules.num_children)) for _ in range(len(logits))]
        tokens: list[list[list[int]]] = [[[] for _ in row] for row in slots]
        sums = [[0.0 for _ in row] for row in slots]
        logits = logits[:, None].expand(-1, rules.num_children, -1)
        for count in range(1, rules.step_tokens + 1):
            chosen, logprob = _choose(logits, rules)
            chosen, logprob = chosen.tolist(), logprob.tolist()
            live = []
            for row, children in enumerate(slots):
                for slot, child in enumerate(children):
                    tokens[row][child].append(chosen[row][slot])
                    sums[row][child] += logprob[row][slot]
                live.append([c for c in children if not rules.ends(tokens[row][c][-1])])
            if count == rules.step_tokens or not any(live):
                break
            slots = live
            last = [[tokens[row][child][-1] for child in slots[row]] for row in range(len(slots))]
            logits = batch.forward_children(slots, last, count)
        self.work.generated += sum(len(step) for row in tokens for step in row)
        return [
            self._make_steps(batch, row, *made)
            for row, made in enumerate(zip(tokens, sums, strict=True))
        ]

    def _make_steps(self, batch, row: int, tokens: list[list[int]], sums: list[float]):
        steps = []
        for child, own in enumerate(tokens):
            finished = self.rules.finishes(own[-1])
            kept = None if finished else batch.save_child(row, child, self._make_kept(len(own)))
            steps.append(Step(own, sums[child], finished, kept))
        return steps

    def _make_kept(self, num_tokens: int) -> torch.Tensor:
        """Keys and values of a node's tokens [layers, 2, G, tokens, E]; the last's come later."""
        layers, two, _, heads, _, head_dim = self.buffer.shape
        return self.buffer.new_empty(layers, two, heads, num_tokens, head_dim)


class _Batch:
    """One expansion's buffer: paths that end in the same column, and what is appended to them."""

    def __init__(self, sampler: KeptSampler, lengths: torch.Tensor):
        self.sampler, self.lengths = sampler, lengths
        self.num_trees, self.num_children = len(lengths), sampler.rules.num_children
        self.buffer = sampler.buffer[:, :, : self.num_trees]
        self.end = int(lengths.max())
        columns = self.buffer.shape[4]
        if self.end + self.num_children * (sampler.rules.step_tokens - 1) > columns:
            raise ValueError(f"path of {self.end} tokens: it does not fit {columns} columns")
        # Which columns a child sees, in the form that is added to scores.
        self.visible = torch.full(
            (self.num_trees, self.num_children, columns), HIDDEN, dtype=self.buffer.dtype
        )
        self.columns: list[list[list[int]]] = [
            [[] for _ in range(self.num_children)] for _ in range(self.num_trees)
        ]
        self.window = [0, self.end]
        self.cache = transformers.Cache(
            layers=[_WindowLayer(*layer, self.window) for layer in self.buffer]
        )

    def load(self, row: int, kept: Sequence[torch.Tensor]) -> None:
        """Copies a path's keys and values in, ending at the common end."""
        start = self.end - int(self.lengths[row])
        self.visible[row, :, start : self.end] = 0
        for part in kept:
            stop = start + part.shape[3]
            self.buffer[:, :, row, :, start:stop] = part
            start = stop

    def forward_last(self, tokens: Sequence[int]) -> torch.Tensor:
        """Forwards the last token of each path; the logits behind it [B V]."""
        self.window[:] = self.end - 1, self.end
        ids = torch.tensor(tokens)[:, None]
        return self._forward(ids, self.lengths[:, None] - 1, self.visible[:, :1])[:, 0]

    def forward_children(self, slots, tokens, count: int) -> torch.Tensor:
        """Forwards the newest token of each live child; logits [B width V].

        Args:
          slots: the children that are live, per tree. tokens: theirs. count: tokens they have.
        """
        width = max(len(children) for children in slots)
        start = self.end
        self.end += width
        self.window[:] = start, self.end
        rows, who, at = [], [], []
        for row, children in enumerate(slots):
            for slot, child in enumerate(children):
                rows.append(row)
                who.append(child)
                at.append(start + slot)
                self.columns[row][child].append(start + slot)
        self.visible[rows, who, at] = 0
        # A slot that no child takes repeats child 0: it sees something, and nobody sees it.
        padded = torch.tensor([[*c, *[0] * (width - len(c))] for c in slots])
        ids = torch.tensor([[*t, *[0] * (width - len(t))] for t in tokens])
        visible = self.visible
        if width < self.num_children or any(len(children) < width for children in slots):
            visible = visible.gather(1, padded[..., None].expand(-1, -1, visible.shape[2]))
        positions = (self.lengths[:, None] + count - 1).expand(-1, width)
        return self._forward(ids, positions, visible)

    def save_last(self, row: int, kept: torch.Tensor) -> None:
        """Adds the keys and values of a path's last token to what its node keeps."""
        kept[:, :, :, -1] = self.buffer[:, :, row, :, self.end - 1]

    def save_child(self, row: int, child: int, kept: torch.Tensor) -> torch.Tensor:
        """Fills in the keys and values of a child's tokens but for the last."""
        columns = torch.tensor(self.columns[row][child], dtype=torch.long)
        kept[:, :, :, : len(columns)] = self.buffer[:, :, row].index_select(3, columns)
        return kept

    def _forward(self, ids, positions, visible) -> torch.Tensor:
        mask = visible[:, None, :, : self.end].repeat(1, 1, self.sampler.packing, 1)
        work = self.sampler.work
        work.model_calls += 1
        work.forwarded += ids.numel()
        return self.sampler.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).logits


class _WindowLayer(DynamicLayer):
    """One layer's part of the buffer; what is new goes to the window's columns."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, window: list[int]):
        super().__init__()
        self.keys, self.values, self.window = keys, values, window
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        start, stop = self.window
        self.keys[:, :, start:stop] = key_states
        self.values[:, :, start:stop] = value_states
        return self.keys[:, :, :stop], self.values[:, :, :stop]


def _attend_packed(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention with the query heads of one KV head as rows of one product.

    attention_mask: added to scores, [B 1 packed-queries columns]; None in a plain prefill.
    """
    if attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, None, scaling=scaling, is_causal=True
        )
    rows, heads, num_queries, head_dim = query.shape
    packed = query.reshape(rows, key.shape[1], -1, head_dim)
    out = torch.nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, scale=scaling
    )
    out = out.reshape(rows, heads, num_queries, head_dim)
    return out.transpose(1, 2).contiguous(), None


def _choose(logits: torch.Tensor, rules: Rules) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each of [B width V], and its log-probability under the model."""
    logits = logits.float()
    if rules.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        top, ids = logits.topk(min(rules.top_k, logits.shape[-1]), -1)
        weights = (top / rules.temperature).softmax(-1)
        pick = torch.multinomial(weights.flatten(0, 1), 1).view(*ids.shape[:2], 1)
        tokens = ids.gather(-1, pick)[..., 0]
    return tokens, _logprob(logits, tokens)


def _logprob(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
