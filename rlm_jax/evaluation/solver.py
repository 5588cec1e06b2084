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
from jax.sharding import Mesh

from rlm_jax.core.types import PyTree
from rlm_jax.data.records import Record, make_record
from rlm_jax.evaluation.programs import Programs, Seats, Shape, compile_programs
from rlm_jax.evaluation.prompts import encode_problem, pad_prompts
from rlm_jax.evaluation.reading import read_findings
from rlm_jax.models.params import param_axes
from rlm_jax.models.quantize import QuantizedMatrix, quantized_axes
from rlm_jax.reasoning.drive import Limits, Search, run_apart
from rlm_jax.reasoning.language import LanguageConfig, LanguageModel, World, make_expand
from rlm_jax.reasoning.protocol import Strategy
from rlm_jax.reasoning.sharding import count_shards, place_params
from rlm_jax.reasoning.structure import UNLIMITED, Structure
from rlm_jax.reasoning.trace import Event, read_events
from rlm_jax.tasks.base import Gold, Problem, Task
from rlm_jax.text.tokenizer import Tokenizer

WaitFn = Callable[[Any], Any]
OnChunk = Callable[[Search, Sequence[int]], None]
SIZES = ("budget_tokens", "batch_size", "bucket_tokens", "page_tokens")


@dataclasses.dataclass(frozen=True, eq=False)
class Solver:
    """What a search over problems needs, fixed for all of them.

    settings: flat scalars that describe the run, for the records. bucket_tokens: prompts are
    padded to a multiple of it. max_expansions: of each search; None leaves the end to tokens and
    nodes. driver: "compiled" or "host". limits: when a search stops early. programs: what was
    compiled, by the width of prompts; solvers that differ in seed, budget_tokens (downwards) and
    max_expansions alone may share them.
    chunk_rounds: rounds between two looks at a running search. trace: whether to keep the operator
    log. mesh: see `spread_solver`.
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
    max_expansions: int | None = None
    driver: str = "compiled"
    limits: Limits = dataclasses.field(default_factory=Limits)
    chunk_rounds: int = 16
    trace: bool = False
    mesh: Mesh | None = None
    programs: dict[int, Programs] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.driver not in ("compiled", "host"):
            raise ValueError(f"driver {self.driver!r}: accepted are compiled, host")
        if self.max_expansions is not None and self.max_expansions < 1:
            raise ValueError(f"max_expansions must be >= 1 or None, got {self.max_expansions}")
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


def spread_solver(solver: Solver, mesh: Mesh) -> Solver:
    """The solver over a mesh: its batch over "replica" and "data", its policy over "model".

    Every shard of the batch searches its own rows. Results do not depend on the mesh.

    Raises:
      ValueError: the shards do not divide batch_size.
    """
    shards = count_shards(mesh)
    if solver.batch_size % shards:
        raise ValueError(
            f"batch_size={solver.batch_size} cannot be split over replica={mesh.shape['replica']} "
            f"* data={mesh.shape['data']} = {shards} shards: accepted are multiples of {shards}"
        )
    lm, cfg = solver.lm, solver.language.model
    quantized = isinstance(lm.policy.embed, QuantizedMatrix)
    axes = quantized_axes(cfg) if quantized else param_axes(cfg, mesh.shape["model"])
    return dataclasses.replace(
        solver, lm=place_params(mesh, lm, policy=axes), mesh=mesh, programs={}
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


class Running(NamedTuple):
    """A batch of searches under way: all that is needed to go on with it.

    slots: of each row, None where it is free. waiting: places of the problems not begun.
    """

    search: Search
    slots: tuple[Slot | None, ...]
    waiting: tuple[int, ...]


class Solved(NamedTuple):
    """A finished problem: its place in the batch, and its events where the solver keeps them."""

    place: int
    record: Record
    events: list[Event] | None = None


def solve_stream(
    solver: Solver,
    batch: Sequence[Encoded],
    golds: Sequence[Gold],
    wait_fn: WaitFn = jax.block_until_ready,
    on_chunk: OnChunk | None = None,
    on_pause: Callable[[Running], None] | None = None,
    resume: Running | None = None,
) -> Iterator[Solved]:
    """Solves problems of one bucket, any number of them; yields each as it is finished.

    The search runs in chunks of rounds. Rows whose problem is finished are handed to the next ones,
    so that a long list keeps all rows busy; when, depends on the searches and not on the chunks.

    Args:
      golds: read after the search, to grade; a record's `seconds` is the problem's share of the
        wall clock.
      wait_fn: waits for a tree of arrays (one that polls lets Ctrl-C through).
      on_chunk: called after each chunk with the search and the place in `batch` of each row's
        problem (-1: none), for progress.
      on_pause: called after each chunk too, once what it finished was taken, with all that a later
        call needs to `resume`; to end there it raises.
    """
    if not batch:
        return
    programs = prepare(solver, max(bucket_width(solver, one) for one in batch))
    running = resume or _open(solver, programs, len(batch))
    while True:
        running = _fill(solver, programs, batch, running)
        started = time.monotonic()
        search = programs.advance(solver.lm, running.search, _count_enough(programs, running))
        wait_fn(search.structure)
        num_taken = sum(slot is not None for slot in running.slots)
        share = (time.monotonic() - started) / max(num_taken, 1)
        slots = [slot and Slot(slot.place, slot.seconds + share) for slot in running.slots]
        if on_chunk is not None:
            on_chunk(search, [-1 if slot is None else slot.place for slot in slots])
        goes_on = np.asarray(search.running)
        done = {row: slot for row, slot in enumerate(slots) if slot and not goes_on[row]}
        if done:
            yield from _read_rows(solver, batch, golds, search, done)
        slots = [None if row in done else slot for row, slot in enumerate(slots)]
        running = Running(search, tuple(slots), running.waiting)
        if not running.waiting and not any(slots):
            return
        if on_pause is not None:
            on_pause(running)


def solve_apart(
    solver: Solver,
    batch: Sequence[Encoded],
    golds: Sequence[Gold],
    *,
    in_flight: int,
    on_round: Callable[[Structure], None] | None = None,
) -> Iterator[Solved]:
    """Solves problems of one bucket by the host driver, each at its own pace (`drive.run_apart`).

    The records are those of `solve_stream`; `batch_size` problems are held at a time, and come out
    together. There is no operator log.

    Args:
      in_flight: how many of them wait for the model at once, each in a thread of its own.
      on_round: called after each round of a problem with its structure, from its thread; to end
        there it raises.

    Raises:
      ValueError: in_flight is below 1, or the solver runs compiled, on a mesh or with a log.
    """
    if solver.driver != "host" or solver.mesh is not None or solver.trace:
        raise ValueError("requests in flight: accepted is the host driver, without mesh and trace")
    alone = dataclasses.replace(solver, batch_size=1, programs={})
    programs = prepare(alone, max(bucket_width(solver, one) for one in batch))
    expand = jax.jit(make_expand(solver.language), donate_argnums=2)
    for first in range(0, len(batch), solver.batch_size):
        places = range(first, min(first + solver.batch_size, len(batch)))
        started = time.monotonic()
        opened = []
        for place in places:
            seats = _make_seats(alone, programs, batch, [(0, place)], 1)
            opened.append(programs.admit(solver.lm, programs.open(), seats))
        structure, worlds = run_apart(
            solver.strategy,
            expand,
            solver.lm,
            _join([one.keys for one in opened]),
            [one.world for one in opened],
            _join([one.structure for one in opened]),
            None if on_round is None else lambda _, structure: on_round(structure),
            in_flight=in_flight,
            limits=_limit_steps(solver),
        )
        seconds = (time.monotonic() - started) / len(places)
        world = dataclasses.replace(worlds[0], tokens=_join([one.tokens for one in worlds]))
        search = dataclasses.replace(opened[0], structure=structure, world=world)
        done = {row: Slot(place, seconds) for row, place in enumerate(places)}
        yield from _read_rows(solver, batch, golds, search, done)


def solve_batch(
    solver: Solver,
    batch: Sequence[Encoded],
    golds: Sequence[Gold],
    wait_fn: WaitFn = jax.block_until_ready,
) -> list[Record]:
    """The records of `solve_stream`, in the order of the problems."""
    done = {one.place: one.record for one in solve_stream(solver, batch, golds, wait_fn)}
    return [done[place] for place in range(len(batch))]


def search_batch(solver: Solver, batch: Sequence[Encoded]) -> tuple[Structure, World]:
    """The search alone: finished structures of up to batch_size problems, and their world."""
    programs = prepare(solver, max(bucket_width(solver, one) for one in batch))
    search = _fill(solver, programs, batch, _open(solver, programs, len(batch))).search
    while np.asarray(search.running).any():
        search = programs.advance(solver.lm, search, [solver.batch_size] * programs.num_groups)
    return search.structure, search.world


def problem_keys(seed: int, problem_ids: Sequence[str]) -> jax.Array:
    """A key per problem that depends on the seed and the problem's id alone, not on its place."""
    numbers = np.asarray([zlib.crc32(name.encode()) for name in problem_ids], np.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(numbers))


def prepare(solver: Solver, width: int) -> Programs:
    """The programs of one bucket, made once and compiled ahead of the clock."""
    if width not in solver.programs:
        shape = Shape(
            language=solver.language,
            strategy=solver.strategy,
            limits=_limit_steps(solver),
            batch_size=solver.batch_size,
            width=width,
            driver=solver.driver,
            chunk_rounds=solver.chunk_rounds,
            trace_rounds=_count_rounds(solver) if solver.trace else 0,
            mesh=solver.mesh,
        )
        solver.programs[width] = compile_programs(solver.lm, shape)
    return solver.programs[width]


def _limit_steps(solver: Solver) -> Limits:
    return dataclasses.replace(solver.limits, step_tokens=solver.lm.step_rule.max_tokens)


def _join(trees: Sequence[PyTree]) -> PyTree:
    """Batches end to end."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *trees)


def _count_rounds(solver: Solver) -> int:
    """No search takes more: each round grows a node, judges one anew, or simulates once."""
    return 2 * solver.language.num_nodes + (solver.settings.get("num_simulations") or 0)


def _open(solver: Solver, programs: Programs, num_problems: int) -> Running:
    return Running(programs.open(), (None,) * solver.batch_size, tuple(range(num_problems)))


def _count_free(programs: Programs, slots: Sequence[Slot | None]) -> list[list[int]]:
    """Of each group, the rows without a problem, numbered within the group."""
    size = len(slots) // programs.num_groups
    groups = [slots[g * size : (g + 1) * size] for g in range(programs.num_groups)]
    return [[row for row, slot in enumerate(group) if slot is None] for group in groups]


def _count_enough(programs: Programs, running: Running) -> list[int]:
    """Structures of each group that are to finish before its rows are handed on."""
    wanted = min(programs.num_seats, len(running.waiting))
    size = len(running.slots) // programs.num_groups
    free = _count_free(programs, running.slots)
    return [wanted - len(rows) if wanted > 0 else size for rows in free]


def _fill(
    solver: Solver, programs: Programs, batch: Sequence[Encoded], running: Running
) -> Running:
    """Hands free rows to waiting problems, in groups where a quarter of the rows is free."""
    search, slots, waiting = running.search, list(running.slots), list(running.waiting)
    size = len(slots) // programs.num_groups
    wanted = min(programs.num_seats, len(waiting))
    free = [rows if len(rows) >= wanted else [] for rows in _count_free(programs, slots)]
    while waiting and any(free):
        # Seats are filled group by group, that no group goes without while another has two.
        seats: list[tuple[int, int] | None] = []
        seats += [None] * programs.num_groups * programs.num_seats
        for seat in range(programs.num_seats):
            for group, rows in enumerate(free):
                if rows and waiting:
                    row, place = rows.pop(0), waiting.pop(0)
                    seats[group * programs.num_seats + seat] = row, place
                    slots[group * size + row] = Slot(place, 0.0)
        search = programs.admit(
            solver.lm, search, _make_seats(solver, programs, batch, seats, size)
        )
    return Running(search, tuple(slots), tuple(waiting))


def _make_seats(
    solver: Solver,
    programs: Programs,
    batch: Sequence[Encoded],
    seats: Sequence[tuple[int, int] | None],
    size: int,
) -> Seats:
    """The arrays of (row, place) pairs; an empty seat holds a one-token prompt and no row."""
    taken = [None if seat is None else batch[seat[1]] for seat in seats]
    ids = ["" if one is None else one.problem.id for one in taken]
    prompts, lengths = pad_prompts(
        [(0,) if one is None else one.prompt for one in taken], programs.width
    )
    most = UNLIMITED if solver.max_expansions is None else solver.max_expansions
    return Seats(
        rows=np.asarray([size if seat is None else seat[0] for seat in seats], np.int32),
        keys=problem_keys(solver.seed, ids),
        prompts=prompts,
        lengths=lengths,
        limits=np.full(len(seats), solver.budget_tokens, np.int32),
        expansions=np.full(len(seats), most, np.int32),
    )


def _read_rows(
    solver: Solver,
    batch: Sequence[Encoded],
    golds: Sequence[Gold],
    search: Search,
    done: Mapping[int, Slot],
) -> Iterator[Solved]:
    """Records of finished rows."""
    structure, tokens, trace = jax.device_get((search.structure, search.world.tokens, search.trace))

    def tell(row: int, ids: Sequence[int]) -> str:
        text = solver.tokenizer.decode(ids, skip_special=True)
        problem = batch[done[row].place].problem
        return solver.task.keep_sound(problem, text, solver.language.may_err)

    findings = read_findings(
        solver.strategy,
        solver.task,
        solver.tokenizer,
        structure,
        tokens,
        {row: batch[slot.place].prompt for row, slot in done.items()},
        tell,
    )
    evaluator = solver.language.evaluator
    for row, slot in done.items():
        problem, found = batch[slot.place].problem, findings[row]
        verdict = solver.task.verify(problem, golds[slot.place], found.solution)
        record = make_record(
            id=problem.id,
            question=problem.question,
            answer=found.answer,
            correct=verdict.correct,
            strategy=solver.strategy.name,
            config=solver.settings,
            seed=solver.seed,
            policy_version=solver.policy_version,
            value_version=None if evaluator == "none" else evaluator,
            budget=found.budget,
            seconds=slot.seconds,
            nodes=found.nodes,
            chosen=found.chosen,
        )
        events = None
        if trace is not None:
            events = read_events(trace, structure, row, solver.strategy.num_children)
        yield Solved(slot.place, record, events)
