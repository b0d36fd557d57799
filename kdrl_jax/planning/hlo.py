"""What a compiled program says of itself: collectives, loops, the compiler's estimate of cycles.

`cost_analysis` counts a loop's body once. Here every computation counts as often as the loops
around it turn, where the text of the program says how often that is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_SECTION = re.compile(r"^(ENTRY )?%?([\w.\-]+)\b.*\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLS = re.compile(r"\b(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    """Everything after the operands; of constants also the value."""
    root: bool


@dataclasses.dataclass(frozen=True)
class Moved:
    """What collectives of one kind bring to each device, in all turns of the loops around them."""

    count: float = 0.0
    size: float = 0.0
    """Bytes."""

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.count + other.count, self.size + other.size)

    def times(self, turns: float) -> Moved:
        """As often as that."""
        return Moved(self.count * turns, self.size * turns)


@dataclasses.dataclass(frozen=True)
class Account:
    """Sums over a computation, loops included."""

    moved: dict[str, Moved] = dataclasses.field(default_factory=dict)
    """By kind of collective."""
    cycles: float = 0.0
    """The compiler's own estimates; without kernels that it did not make."""
    unknown_loops: int = 0
    """Loops of which nobody knows how often they turn: counted once."""

    def __add__(self, other: Account) -> Account:
        kinds = {**self.moved, **other.moved}
        none = Moved()
        moved = {k: self.moved.get(k, none) + other.moved.get(k, none) for k in kinds}
        cycles, unknown = self.cycles + other.cycles, self.unknown_loops + other.unknown_loops
        return Account(moved, cycles, unknown)

    def times(self, turns: float) -> Account:
        """As often as that."""
        moved = {kind: found.times(turns) for kind, found in self.moved.items()}
        return Account(moved, self.cycles * turns, self.unknown_loops)

    @property
    def size(self) -> float:
        """Bytes that all collectives bring to each device."""
        return sum(found.size for found in self.moved.values())


class Module:
    """The text of a compiled program, by computations.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
      turns: of loops in the entry that the text does not tell: bounds that are arguments.
    """

    def __init__(self, text: str, turns: int = 1):
        self._turns = turns
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        found: dict[str, Instruction] = {}
        for line in text.splitlines():
            section = None if line.startswith(" ") else _SECTION.match(line)
            if section:
                found = self._computations.setdefault(section[2], {})
                self._entry = section[2] if section[1] else self._entry
            elif instruction := _instruction(line):
                found[instruction.name] = instruction

    @functools.cached_property
    def account(self) -> Account:
        """Of the whole program on one device."""
        return self._account(self._entry)

    @functools.cache  # noqa: B019 (as long-lived as the program)
    def _account(self, computation: str) -> Account:
        total = Account()
        for instruction in self._computations.get(computation, {}).values():
            total += self._of(instruction, computation)
        return total

    def _of(self, x: Instruction, computation: str) -> Account:
        if x.opcode == "while":
            body = _attribute(x.text, "body")
            turns = self.loop_turns(x, computation)
            if turns is None:
                in_entry = computation == self._entry
                unknown = Account(unknown_loops=0 if in_entry else 1)
                return self._account(body).times(self._turns if in_entry else 1) + unknown
            return self._account(body).times(turns)
        if x.opcode == "conditional":  # the branch that costs most
            return max(
                (self._account(name) for name in _branches(x.text)),
                key=lambda account: (account.size, account.cycles),
                default=Account(),
            )
        found = Account(cycles=_cycles(x.text))
        if kind := _kind(x.opcode):
            return found + Account({kind: Moved(1, _received(kind, x))})
        if x.opcode in ("fusion", "call", "async-start", "custom-call"):
            for name in _CALLS.findall(x.text):
                inner = self._account(name)
                if x.opcode == "fusion":  # its own estimate has that of its parts
                    inner = dataclasses.replace(inner, cycles=0.0)
                    inner = _as_reduce_scatter(x, inner)
                found += inner
        return found

    def loop_turns(self, loop: Instruction, computation: str) -> int | None:
        """How often a loop that counts up to a constant turns; None: another kind of loop."""
        known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.text)
        if known:
            return int(known[1])
        condition = self._computations.get(_attribute(loop.text, "condition"), {})
        root = next((x for x in condition.values() if x.root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.text:
            return None
        counter, bound = (condition.get(name) for name in root.operands)
        if counter is None or bound is None or counter.opcode != "get-tuple-element":
            return None
        last = _constant(bound)
        at = int(_attribute(counter.text, "index"))
        first, step = self._first(loop, computation, at), self._step(loop, at)
        if last is None or first is None or not step:
            return None
        return max(0, math.ceil((last - first) / step))

    def _first(self, loop: Instruction, computation: str, at: int) -> int | None:
        """The value that a counter begins with."""
        here = self._computations[computation]
        start = here.get(loop.operands[0])
        if start is None or start.opcode != "tuple":
            return None
        value = here.get(start.operands[at])
        while value is not None and value.opcode in ("copy", "bitcast", "convert"):
            value = here.get(value.operands[0])
        return None if value is None else _constant(value)

    def _step(self, loop: Instruction, at: int) -> int | None:
        """What a turn adds to a counter."""
        body = self._computations.get(_attribute(loop.text, "body"), {})
        root = next((x for x in body.values() if x.root), None)
        if root is None or root.opcode != "tuple":
            return None
        new = body.get(root.operands[at])
        if new is None or new.opcode != "add":
            return None
        added = [body[name] for name in new.operands if name in body]
        constants = [c for c in map(_constant, added) if c is not None]
        return constants[0] if len(constants) == 1 else None


def _instruction(line: str) -> Instruction | None:
    name = _NAME.match(line)
    if not name:
        return None
    rest = line[name.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, rest = rest.partition("(")
    if not bracket or not re.fullmatch(r"[\w\-]+", opcode):
        return None
    end = _closing("(" + rest) - 2
    inside, after = rest[:end], rest[end + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(
        part.split()[-1] for part in inside.split(", ") if part.strip()
    )
    text = f"{inside} {after}" if opcode == "constant" else after
    return Instruction(name[2], shape, opcode, operands, text, bool(name[1]))


def _closing(text: str) -> int:
    """Where the bracket that `text` begins with has been closed."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return i + 1
    return len(text)


def _attribute(text: str, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", text)
    return found[1] if found else ""


def _branches(text: str) -> Iterator[str]:
    for names in re.findall(r"(?:branch_computations=\{|_computation=)([^}=]*)", text):
        yield from re.findall(r"%?([\w.\-]+)", names.partition(", ")[0] if "{" in names else names)


def _cycles(text: str) -> float:
    found = re.search(r'"estimated_cycles":"(\d+)"', text)
    return float(found[1]) if found else 0.0


def _constant(x: Instruction) -> int | None:
    found = re.match(r"\s*(-?\d+)\b", x.text) if x.opcode == "constant" else None
    return int(found[1]) if found else None


def _kind(opcode: str) -> str | None:
    """Of a collective; its end, where it has one apart, is none."""
    name = opcode.removesuffix("-start")
    if name == "ragged-all-to-all":
        return "all-to-all"
    return name if name in COLLECTIVES else None


def shape_bytes(shape: str) -> float:
    """Bytes of an array, or of a tuple's arrays, as written: 'f32[2,3]{1,0}'."""
    return sum(_bytes(*found) for found in _ARRAY.findall(shape))


def _bytes(dtype: str, dims: str) -> float:
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or (int(digits[0]) if digits else 0)
    return math.prod(int(d) for d in dims.split(",") if d) * bits / 8


def group_size(text: str) -> int:
    """Devices that take part in a collective together."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    return 1


def _received(kind: str, x: Instruction) -> float:
    """Bytes that a device gets from others, by the best known algorithms on rings."""
    size, n = _result_bytes(x), group_size(x.text)
    share = (n - 1) / n
    return {
        "all-gather": size * share,
        "reduce-scatter": size * (n - 1),
        "all-reduce": 2 * size * share,
        "all-to-all": size * share,
        "collective-permute": size,
    }[kind]


def _result_bytes(x: Instruction) -> float:
    """Of what a collective returns; where it begins apart, its arguments stand beside it."""
    arrays = [_bytes(*found) for found in _ARRAY.findall(x.shape)]
    if not x.opcode.endswith("-start") or x.opcode.startswith("all-reduce"):
        return sum(arrays)
    count = len(x.operands)
    return sum(arrays[count : 2 * count])


def _as_reduce_scatter(fusion: Instruction, inner: Account) -> Account:
    """TPUs write a reduce-scatter as a fusion of an all-reduce and the slice that is kept."""
    if "all-reduce" not in inner.moved or "reduce-scatter" not in fusion.name + fusion.text:
        return inner
    rest = {kind: found for kind, found in inner.moved.items() if kind != "all-reduce"}
    whole = inner.moved["all-reduce"]
    halved = Moved(whole.count, whole.size / 2)
    moved = Account(rest) + Account({"reduce-scatter": halved})
    return dataclasses.replace(inner, moved=moved.moved)
