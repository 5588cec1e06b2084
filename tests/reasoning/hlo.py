"""Reads a compiled program's HLO text: what runs inside its loops, what is copied, who talks."""

import dataclasses
import re

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
HOST_OPS = ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")
_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation|branch_computations|"
    r"called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO; `type` is the text of its shape, a tuple's in brackets."""

    name: str
    type: str
    op: str
    line: str

    @property
    def largest_bytes(self) -> int:
        """Size of the largest array among its results (an asynchronous copy lists both ends)."""
        return max(array_bytes(self.type), default=0)


def array_bytes(text: str) -> list[int]:
    """Sizes of all arrays of a shape's text, without the padding of a layout."""
    sizes = []
    for kind, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text):
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
        sizes.append(bits * int(np.prod(_numbers(dims))) // 8)
    return sizes


def read_program(text: str) -> dict[str, list[Instruction]]:
    """The computations of a module, by name, each a list of instructions."""
    program: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = program.setdefault(header[1], [])
        elif found := _INSTRUCTION.match(line):
            current.append(Instruction(*found.groups(), line))
    return program


def instructions(text: str) -> list[Instruction]:
    """Every instruction of a module."""
    return [one for body in read_program(text).values() for one in body]


def loop_instructions(text: str) -> list[Instruction]:
    """Those that run inside a while loop, in whatever is called from its body or condition."""
    program = read_program(text)
    calls = {
        name: {called for one in body for called in _called(one)} for name, body in program.items()
    }
    waiting = [
        called
        for body in program.values()
        for one in body
        if one.op == "while"
        for called in _called(one)
    ]
    inside: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in inside and name in program:
            inside.add(name)
            waiting += calls[name]
    return [one for name in sorted(inside) for one in program[name]]


def _called(one: Instruction) -> list[str]:
    found = _CALLED.findall(one.line)
    return [
        name.strip().lstrip("%") for many, single in found for name in (single or many).split(",")
    ]


def copies(some: list[Instruction]) -> list[Instruction]:
    """The copies among them, asynchronous ones by their start."""
    return [one for one in some if one.op in ("copy", "copy-start")]


def collectives(text: str) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
    """Name and groups of devices of each collective; a permute's groups are its pairs."""
    found = []
    for one in instructions(text):
        op = one.op.removesuffix("-start")
        if op in COLLECTIVES:
            found.append((op, _groups(one.line)))
    return found


def host_transfers(text: str) -> list[str]:
    """Whatever moves data between host and device while the program runs."""
    found = [one.line for one in instructions(text) if one.op in HOST_OPS]
    return found + [line for line in text.splitlines() if "callback" in line]


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line)
    if listed:
        groups = re.findall(r"\{([\d, ]*)\}", listed[1])
        return tuple(tuple(int(d) for d in group.split(",")) for group in groups)
    # [groups, members] <= [dims], T(the order the dims are taken in).
    short = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if short:
        shape, dims, order = (_numbers(part or "") for part in short.groups())
        devices = np.arange(np.prod(dims)).reshape(dims).transpose(order or range(len(dims)))
        return tuple(tuple(row) for row in devices.reshape(shape).tolist())
    # mesh['a'=4,'b'=2] {'a'}: along these axes.
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if not mesh:
        raise ValueError(f"no replica groups in {line}")
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh[2])]
    devices = np.arange(np.prod([int(n) for n in sizes.values()])).reshape(
        [int(n) for n in sizes.values()]
    )
    members = int(np.prod([devices.shape[axis] for axis in along]))
    devices = np.moveaxis(devices, along, range(-len(along), 0))
    return tuple(tuple(row) for row in devices.reshape(-1, members).tolist())


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
