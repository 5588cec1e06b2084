"""Batches of problems through one strategy at one budget, and the records that come out.

A solver compiles once per bucket of prompt length and batch size. The search sees prompts and
nothing else; answers are read out of the finished structures, voted on by the strategy, and only
then compared with a gold answer, if there is one.
"""

import dataclasses
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.data.records import BUDGET_FIELDS, NodeColumns, Record, make_record
from rlm_jax.evaluation.prompts import encode_problem, pad_prompts
from rlm_jax.reasoning.drive import Limits, Search, advance, replace_rows, run_host, start
from rlm_jax.reasoning.language import (
    LanguageConfig,
    LanguageModel,
    World,
    admit,
    make_expand,
    make_world,
)
from rlm_jax.reasoning.protocol import Strategy
from rlm_jax.reasoning.structure import NO_NODE, Operator, Structure, path_to_root
from rlm_jax.tasks.base import Gold, Problem, Task
from rlm_jax.text.tokenizer import Tokenizer

WaitFn = Callable[[Any], Any]
OnChunk = Callable[[Search, Sequence[int]], None]
SIZES = ("budget_tokens", "batch_size", "bucket_tokens", "page_tokens")


@dataclasses.dataclass(frozen=True, eq=False)
class Solver:
    """What a search over problems needs, fixed for all of them.

    settings: flat scalars that describe the run, for the records. bucket_tokens: prompts are
    padded to a multiple of it. driver: "compiled" or "host". limits: when a search stops early.
    chunk_rounds: rounds between two looks at a running search.
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
    limits: Limits = dataclasses.field(default_factory=Limits)
    chunk_rounds: int = 16
    programs: dict[tuple[int, int], "Programs"] = dataclasses.field(default_factory=dict)

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


class Slot(NamedTuple):
    """A row of a running batch: whose it is, and the seconds it has taken."""

    place: int
    seconds: float


def solve_stream(
    solver: Solver,
    batch: Sequence[Encoded],
    golds: Sequence[Gold],
    wait_fn: WaitFn = jax.block_until_ready,
    on_chunk: OnChunk | None = None,
) -> Iterator[tuple[int, Record]]:
    """Solves problems of one bucket, any number of them; yields each as it is finished.

    The search runs in chunks of rounds. Between chunks, rows whose problem is finished are handed
    to the next ones, so that a long list keeps all rows busy.

    Args:
      golds: read after the search, to grade.
      wait_fn: waits for a tree of arrays (one that polls lets Ctrl-C through).
      on_chunk: called after each chunk with the search and the place in `batch` of each row's
        problem (-1: none), for progress.

    Yields:
      Place in `batch`, and the record; its `seconds` is the problem's share of the wall clock.
    """
    if not batch:
        return
    programs = prepare(solver, max(bucket_width(solver, one) for one in batch))
    waiting = list(range(len(batch)))
    search = programs.open()
    slots: list[Slot | None] = [None] * solver.batch_size
    while True:
        search, waiting, slots = _fill(solver, programs, batch, search, waiting, slots)
        started = time.monotonic()
        search = programs.advance(solver.lm, search, bool(waiting))
        wait_fn(search.structure)
        running = np.asarray(search.running)
        taken = [slot for slot in slots if slot is not None]
        share = (time.monotonic() - started) / max(len(taken), 1)
        slots = [slot and Slot(slot.place, slot.seconds + share) for slot in slots]
        if on_chunk is not None:
            on_chunk(search, [-1 if slot is None else slot.place for slot in slots])
        done = [row for row, slot in enumerate(slots) if slot is not None and not running[row]]
        if done:
            yield from _read_rows(solver, batch, golds, search, slots, done)
            slots = [None if row in done else slot for row, slot in enumerate(slots)]
        if not waiting and not any(slots):
            return


def solve_batch(
    solver: Solver,
    batch: Sequence[Encoded],
    golds: Sequence[Gold],
    wait_fn: WaitFn = jax.block_until_ready,
) -> list[Record]:
    """The records of `solve_stream`, in the order of the problems."""
    done = dict(solve_stream(solver, batch, golds, wait_fn))
    return [done[place] for place in range(len(batch))]


def search_batch(solver: Solver, batch: Sequence[Encoded]) -> tuple[Structure, World]:
    """The search alone: finished structures of up to batch_size problems, and their world."""
    programs = prepare(solver, max(bucket_width(solver, one) for one in batch))
    slots: list[Slot | None] = [None] * solver.batch_size
    waiting = list(range(len(batch)))
    search, waiting, _ = _fill(solver, programs, batch, programs.open(), waiting, slots)
    while np.asarray(search.running).any():
        search = programs.advance(solver.lm, search, False)
    return search.structure, search.world


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


class Programs(NamedTuple):
    """What a bucket compiles to.

    width: of its prompts. open() -> a search without problems. admit(lm, search, rows, keys,
    prompts, lengths, limits) -> the search with new problems in these rows, `num_admitted` at a
    time. advance(lm, search, problems_wait) -> the search one chunk on.
    """

    width: int
    open: Callable[..., Search]
    admit: Callable[..., Search]
    advance: Callable[..., Search]
    num_admitted: int


def prepare(solver: Solver, width: int) -> Programs:
    """The programs of one bucket, made once and compiled ahead of the clock."""
    shape = (solver.batch_size, width)
    if shape in solver.programs:
        return solver.programs[shape]
    cfg, strategy, expand = solver.language, solver.strategy, make_expand(solver.language)
    limits = dataclasses.replace(solver.limits, step_tokens=solver.lm.step_rule.max_tokens)
    num_admitted = -(-solver.batch_size // _REFILLS)

    def open_batch(lm, keys):
        structure, world = make_world(lm, jnp.zeros(keys.shape, jnp.int32), width, cfg=cfg)
        return start(strategy, keys, world, structure, limits=limits)

    def admit_rows(lm, search, rows, keys, prompts, lengths, budgets):
        structure, world = admit(
            lm, search.structure, search.world, rows, prompts, lengths, budgets, cfg=cfg
        )
        return replace_rows(strategy, search, rows, keys, structure, world, limits=limits)

    def advance_chunk(lm, search, max_rounds, min_finished):
        return advance(
            strategy,
            expand,
            lm,
            search,
            limits=limits,
            max_rounds=max_rounds,
            min_finished=min_finished,
        )

    keys = problem_keys(solver.seed, [""] * solver.batch_size)
    empty = jax.eval_shape(open_batch, solver.lm, keys)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    some = jax.ShapeDtypeStruct((num_admitted,), jnp.int32)
    prompts = jax.ShapeDtypeStruct((num_admitted, width), jnp.int32)
    opened = jax.jit(open_batch).lower(solver.lm, keys).compile()
    admitted = jax.jit(admit_rows, donate_argnums=1)
    admitted = admitted.lower(solver.lm, empty, some, keys[:num_admitted], prompts, some, some)
    if solver.driver == "compiled":
        chunk = jax.jit(advance_chunk, donate_argnums=1)
        chunk = chunk.lower(solver.lm, empty, number, number).compile()
    step = jax.jit(expand, donate_argnums=2)

    def advance_fn(lm, search, problems_wait):
        if solver.driver == "compiled":
            enough = num_admitted if problems_wait else solver.batch_size
            return chunk(lm, search, np.int32(solver.chunk_rounds), np.int32(enough))
        structure, world = run_host(
            strategy, step, lm, search.keys, search.world, search.structure, limits=limits
        )
        nodes = jnp.full_like(search.request.nodes, NO_NODE)
        request = dataclasses.replace(search.request, nodes=nodes)
        return dataclasses.replace(search, structure=structure, world=world, request=request)

    programs = Programs(
        width, lambda: opened(solver.lm, keys), admitted.compile(), advance_fn, num_admitted
    )
    solver.programs[shape] = programs
    return programs


_REFILLS = 4  # Finished rows are handed on when a quarter of the batch is.


def _fill(solver, programs, batch, search, waiting, slots):
    """Hands free rows to waiting problems, a group at a time."""
    count = programs.num_admitted
    free = [row for row, slot in enumerate(slots) if slot is None]
    slots = list(slots)
    while free and waiting:
        group = min(count, len(free), len(waiting))
        rows, places = free[:group], waiting[:group]
        free, waiting = free[group:], waiting[group:]
        spare = count - group
        # A spare place holds a one-token prompt and goes to no row.
        ids = [batch[place].problem.id for place in places] + [""] * spare
        prompts, lengths = pad_prompts(
            [batch[place].prompt for place in places] + [(0,)] * spare, programs.width
        )
        search = programs.admit(
            solver.lm,
            search,
            np.asarray(rows + [solver.batch_size] * spare, np.int32),
            problem_keys(solver.seed, ids),
            prompts,
            lengths,
            np.full(count, solver.budget_tokens, np.int32),
        )
        for row, place in zip(rows, places, strict=True):
            slots[row] = Slot(place, 0.0)
    return search, waiting, slots


def _read_rows(solver, batch, golds, search, slots, rows) -> Iterator[tuple[int, Record]]:
    """Places and records of finished rows."""
    structure, tokens = jax.device_get((search.structure, search.world.tokens))
    ids, names = np.full(structure.depth.shape, -1, np.int32), {}
    for row in rows:
        _name_answers(solver, structure, tokens, row, ids, names)
    chosen = jax.device_get(jax.jit(solver.strategy.answer)(structure, ids)).node
    for row in rows:
        place, seconds = slots[row]
        texts = _node_texts(solver, structure, tokens, row)
        record = _make_record(
            solver,
            batch[place],
            golds[place],
            structure,
            tokens,
            row,
            texts,
            int(chosen[row]),
            names,
            seconds,
        )
        yield place, record


def _node_texts(solver: Solver, structure: Structure, tokens: np.ndarray, row: int) -> list[str]:
    lengths = structure.span_length[row]
    steps = [tokens[row, node, : lengths[node]] for node in range(structure.num_nodes[row])]
    return [solver.tokenizer.decode([int(t) for t in step], skip_special=True) for step in steps]


def _name_answers(
    solver: Solver,
    structure: Structure,
    tokens: np.ndarray,
    row: int,
    ids: np.ndarray,
    names: dict[tuple[int, int], str],
) -> None:
    """Gives equal ids to equal answers among a structure's leaves, and keeps their wording."""
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
