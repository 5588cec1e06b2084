"""Batches of problems through one strategy at one budget, and the records that come out.

A solver compiles once per bucket of prompt length and batch size. The search sees prompts and
nothing else; answers are read out of the finished structures, voted on by the strategy, and only
then compared with a gold answer, if there is one.
"""

import dataclasses
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.data.records import BUDGET_FIELDS, NodeColumns, Record, make_record
from rlm_jax.evaluation.prompts import encode_problem, pad_prompts
from rlm_jax.reasoning.drive import Limits, run_compiled, run_host
from rlm_jax.reasoning.language import LanguageConfig, LanguageModel, World, begin, make_expand
from rlm_jax.reasoning.protocol import Strategy
from rlm_jax.reasoning.structure import Operator, Structure, path_to_root
from rlm_jax.tasks.base import Gold, Problem, Task
from rlm_jax.text.tokenizer import Tokenizer

WaitFn = Callable[[Any], Any]
SIZES = ("budget_tokens", "batch_size", "bucket_tokens", "page_tokens")


@dataclasses.dataclass(frozen=True, eq=False)
class Solver:
    """What a search over problems needs, fixed for all of them.

    settings: flat scalars that describe the run, for the records. bucket_tokens: prompts are
    padded to a multiple of it. driver: "compiled" or "host".
    """

    task: Task
    tokenizer: Tokenizer
    lm: LanguageModel
    language: LanguageConfig
    strategy: Strategy
    budget_tokens: int
    batch_size: int
    bucket_tokens: int
    seed: int
    settings: Mapping[str, Any]
    policy_version: str
    driver: str = "compiled"
    programs: dict[tuple[int, int], tuple[Callable, Callable]] = dataclasses.field(
        default_factory=dict
    )

    def __post_init__(self):
        if self.driver not in ("compiled", "host"):
            raise ValueError(f"driver {self.driver!r}: accepted are compiled, host")
        sizes = {name: getattr(self, name) for name in SIZES if name != "page_tokens"}
        check_sizes(sizes | {"page_tokens": self.language.page_tokens})


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Checks what is named in `SIZES`.

    Raises:
      ValueError: one of them is below 1, or bucket_tokens is no multiple of page_tokens.
    """
    for name in SIZES:
        if sizes[name] < 1:
            raise ValueError(f"{name} must be >= 1, got {sizes[name]}")
    if sizes["bucket_tokens"] % sizes["page_tokens"]:
        raise ValueError(
            f"bucket_tokens={sizes['bucket_tokens']} is no multiple of "
            f"page_tokens={sizes['page_tokens']}"
        )


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A problem and its prompt's token ids."""

    problem: Problem
    prompt: tuple[int, ...]


def encode(solver: Solver, problem: Problem) -> Encoded:
    """Encodes a problem for the solver's model.

    Raises:
      ValueError: an empty question, or one that leaves no room for a step in the context.
    """
    prompt = encode_problem(solver.tokenizer, solver.task, problem)
    context = solver.language.model.context_length
    room = context - solver.lm.step_rule.max_tokens
    if len(prompt) > room:
        raise ValueError(
            f"the question makes a prompt of {len(prompt)} tokens; accepted are at most {room} "
            f"(context {context} less one step)"
        )
    return Encoded(problem, tuple(prompt))


def bucket_width(solver: Solver, encoded: Encoded) -> int:
    """The padded prompt width; problems of one width share a compiled program."""
    return -(-len(encoded.prompt) // solver.bucket_tokens) * solver.bucket_tokens


def solve_batch(
    solver: Solver,
    batch: Sequence[Encoded],
    golds: Sequence[Gold],
    wait_fn: WaitFn = jax.block_until_ready,
) -> list[Record]:
    """Solves up to batch_size problems of one bucket.

    Args:
      golds: read after the search, to grade.
      wait_fn: waits for a tree of arrays (one that polls lets Ctrl-C through).

    Returns:
      A record per problem; `seconds` is the batch's wall clock over the number of its problems.
    """
    prepare(solver, max(bucket_width(solver, one) for one in batch))
    started = time.monotonic()
    structure, world = search_batch(solver, batch)
    tokens = world.tokens
    del world  # Its pages are free again before the next batch begins.
    wait_fn((structure, tokens))
    seconds = (time.monotonic() - started) / len(batch)
    structure, tokens = jax.device_get((structure, tokens))
    texts = [_node_texts(solver, structure, tokens, row) for row in range(len(batch))]
    ids, names = _answer_ids(solver, structure, tokens, len(batch))
    chosen = jax.device_get(jax.jit(solver.strategy.answer)(structure, ids)).node
    return [
        _make_record(
            solver, one, gold, structure, tokens, row, texts[row], int(chosen[row]), names, seconds
        )
        for row, (one, gold) in enumerate(zip(batch, golds, strict=True))
    ]


def search_batch(solver: Solver, batch: Sequence[Encoded]) -> tuple[Structure, World]:
    """The search alone: finished structures of up to batch_size problems, and their world."""
    width = max(bucket_width(solver, one) for one in batch)
    begin_fn, search_fn = prepare(solver, width)
    spare = solver.batch_size - len(batch)
    # Spare rows hold a one-token prompt and no budget: they never ask for anything.
    prompts, lengths = pad_prompts([one.prompt for one in batch] + [(0,)] * spare, width)
    limits = np.asarray([solver.budget_tokens] * len(batch) + [0] * spare, np.int32)
    keys = problem_keys(solver.seed, [one.problem.id for one in batch] + [""] * spare)
    structure, world = begin_fn(solver.lm, prompts, lengths, limits)
    return search_fn(solver.lm, keys, world, structure)


def problem_keys(seed: int, problem_ids: Sequence[str]) -> jax.Array:
    """A key per problem that depends on the seed and the problem's id alone, not on its place."""
    numbers = np.asarray([zlib.crc32(name.encode()) for name in problem_ids], np.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(numbers))


def path_tokens(structure: Structure, tokens: np.ndarray, row: int, node: int) -> list[int]:
    """Generated token ids from below the root to `node`."""
    ids: list[int] = []
    for step in path_to_root(structure, row, node)[1:]:
        ids += [int(t) for t in tokens[row, step, : structure.span_length[row, step]]]
    return ids


def prepare(solver: Solver, width: int) -> tuple[Callable, Callable]:
    """The jitted prefill and search for one bucket, made once and compiled ahead of the clock."""
    shape = (solver.batch_size, width)
    if shape in solver.programs:
        return solver.programs[shape]
    expand = make_expand(solver.language)
    step_tokens = solver.lm.step_rule.max_tokens

    def begin_batch(lm, prompts, lengths, limits):
        return begin(lm, prompts, lengths, limits, cfg=solver.language)

    def search(lm, keys, world, structure):
        return run_compiled(
            solver.strategy,
            expand,
            lm,
            keys,
            world,
            structure,
            limits=Limits(step_tokens=step_tokens),
        )

    rows = jax.ShapeDtypeStruct((solver.batch_size,), jnp.int32)
    prompts = jax.ShapeDtypeStruct(shape, jnp.int32)
    keys = problem_keys(solver.seed, [""] * solver.batch_size)
    begin_fn = jax.jit(begin_batch).lower(solver.lm, prompts, rows, rows).compile()
    if solver.driver == "compiled":
        structure, world = jax.eval_shape(begin_batch, solver.lm, prompts, rows, rows)
        jitted = jax.jit(search, donate_argnums=2)
        search_fn = jitted.lower(solver.lm, keys, world, structure).compile()
    else:
        step = jax.jit(expand, donate_argnums=2)

        def search_fn(lm, keys, world, structure):
            return run_host(
                solver.strategy,
                step,
                lm,
                keys,
                world,
                structure,
                limits=Limits(step_tokens=step_tokens),
            )

    solver.programs[shape] = begin_fn, search_fn
    return begin_fn, search_fn


def _node_texts(solver: Solver, structure: Structure, tokens: np.ndarray, row: int) -> list[str]:
    lengths = structure.span_length[row]
    steps = [tokens[row, node, : lengths[node]] for node in range(structure.num_nodes[row])]
    return [solver.tokenizer.decode([int(t) for t in step], skip_special=True) for step in steps]


def _answer_ids(
    solver: Solver, structure: Structure, tokens: np.ndarray, num_problems: int
) -> tuple[np.ndarray, dict[tuple[int, int], str]]:
    """Equal ids for equal answers among a structure's leaves, and the answers by row and node."""
    ids = np.full(structure.depth.shape, -1, np.int32)
    names: dict[tuple[int, int], str] = {}
    for row in range(num_problems):
        known: dict[str, int] = {}
        alive = np.flatnonzero(structure.alive[row])
        inner = set(structure.parent[row, alive].tolist())
        for node in alive:
            if node == 0 or node in inner:
                continue
            path = path_tokens(structure, tokens, row, int(node))
            answer = solver.task.extract(solver.tokenizer.decode(path, skip_special=True))
            if answer is not None:
                ids[row, node] = known.setdefault(answer, len(known))
                names[row, int(node)] = answer
    return ids, names


def _make_record(
    solver: Solver,
    encoded: Encoded,
    gold: Gold,
    structure: Structure,
    tokens: np.ndarray,
    row: int,
    texts: list[str],
    node: int,
    names: Mapping[tuple[int, int], str],
    seconds: float,
) -> Record:
    problem = encoded.problem
    chosen = path_to_root(structure, row, node) if node >= 0 else []
    solution = path_tokens(structure, tokens, row, max(node, 0))
    text = solver.tokenizer.decode(solution, skip_special=True)
    verdict = solver.task.verify(problem, gold, text)
    budget = {name: int(getattr(structure.budget, name)[row]) for name in BUDGET_FIELDS}
    return make_record(
        id=problem.id,
        question=problem.question,
        answer=names.get((row, node)),
        correct=verdict.correct,
        strategy=solver.strategy.name,
        config=solver.settings,
        seed=solver.seed,
        policy_version=solver.policy_version,
        value_version=None if solver.language.evaluator == "none" else solver.language.evaluator,
        budget=budget,
        seconds=seconds,
        nodes=_node_columns(solver, encoded, structure, tokens, row, texts),
        chosen=chosen,
    )


def _node_columns(
    solver: Solver,
    encoded: Encoded,
    structure: Structure,
    tokens: np.ndarray,
    row: int,
    texts: list[str],
) -> NodeColumns:
    count = int(structure.num_nodes[row])

    def column(name: str) -> np.ndarray:
        return getattr(structure, name)[row, :count]

    lengths = column("span_length")
    steps = [tokens[row, node, : lengths[node]] for node in range(count)]
    return NodeColumns(
        parents=np.asarray(structure.parents[row, :count]),
        op=[Operator(op).name.lower() for op in column("operator")],
        owner=column("owner"),
        depth=column("depth"),
        text=[solver.tokenizer.decode(list(encoded.prompt)), *texts[1:]],
        tokens=[encoded.prompt, *steps[1:]],
        logprob=column("logprob"),
        visits=column("visits"),
        value={"model": column("model_value"), "search": column("value")},
        prior=column("prior"),
        reward=column("reward"),
        terminal=column("terminal"),
        alive=column("alive"),
        budget=column("created_at"),
    )
