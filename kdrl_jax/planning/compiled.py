"""What the compiler makes of a program: memory of a device, collectives, time."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax

from kdrl_jax.planning.hlo import Account, Module
from kdrl_jax.planning.programs import Program
from kdrl_jax.training.memory_check import out_of_memory

_SIZE = r"([\d.]+)([KMGT]?)"
# "Used 40.1G of 31.25G hbm", "… temporaries (240.00G) exceeds available HBM (95.74G)"
_TOO_MUCH = (
    re.compile(rf"Used {_SIZE}i?B? of {_SIZE}i?B? hbm"),
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program's account, in bytes of one device.

    Attributes:
      program: its name; phase: the phase it belongs to.
      arguments, results, temporary: results without those that take the place of arguments.
      beside: what else is on the device meanwhile.
      account: collectives and cycles, loops included; None: it was not made, or is not known.
      flops, accessed, optimal_seconds: XLA's `cost_analysis`, in which a loop's body counts once.
      seconds: that compiling took.
      error: why it was not made; "": it was.
      no_text: why it has no account although it was made: the compiler gives no text of it.
      limit: of a device's memory, where the compiler said so.
    """

    program: str
    phase: str
    beside: float
    arguments: float = 0.0
    results: float = 0.0
    temporary: float = 0.0
    account: Account | None = None
    flops: float = 0.0
    accessed: float = 0.0
    optimal_seconds: float = 0.0
    seconds: float = 0.0
    error: str = ""
    no_text: str = ""
    limit: float | None = None

    @property
    def need(self) -> float:
        """Bytes of a device while it runs."""
        return self.beside + self.arguments + self.results + self.temporary

    def fits(self, limit: float) -> bool:
        """Whether it was made and leaves room for what is beside it."""
        return not self.error and self.need <= limit

    def to_json(self) -> dict[str, Any]:
        """Everything, with the collectives by kind."""
        found = dataclasses.asdict(self) | {"need": self.need}
        del found["account"]
        if self.account:
            found["cycles"] = self.account.cycles
            found["unknown_loops"] = self.account.unknown_loops
            found["collectives"] = {
                kind: {"count": x.count, "bytes": x.size} for kind, x in self.account.moved.items()
            }
        return found


def compile_program(program: Program) -> Compiled:
    """Compile it and read what the compiler says of it; nothing is kept."""
    start, names = time.perf_counter(), (program.name, program.phase, 0.0)
    try:
        names = (program.name, program.phase, sum(program.beside().values()))
        made = program.lower().compile()
    except Exception as error:  # of many types: what matters is whether it was memory
        seconds = time.perf_counter() - start
        found = _too_large(str(error)) if out_of_memory(error) else None
        if found is None:
            return Compiled(*names, error=_first_line(error), seconds=seconds)
        used, limit = found
        line = _first_line(error)
        return Compiled(*names, temporary=used, limit=limit, error=line, seconds=seconds)
    memory, costs = made.memory_analysis(), _costs(made)
    assert memory is not None
    text, no_text = _text(made)
    return Compiled(
        *names,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        account=None if no_text else Module(text, program.turns).account,
        flops=costs.get("flops", 0.0),
        accessed=costs.get("bytes accessed", 0.0),
        optimal_seconds=costs.get("optimal_seconds", 0.0),
        seconds=time.perf_counter() - start,
        no_text=no_text,
    )


def _text(made: jax.stages.Compiled) -> tuple[str, str]:
    """Returns the text of a program and "", or "" and why there is none.

    A compiler newer than jaxlib may write what jaxlib cannot read; that says nothing against the
    program.
    """
    try:
        text = made.as_text()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        return "", _first_line(error)
    return (text, "") if text else ("", "none")


def _costs(made: jax.stages.Compiled) -> dict[str, float]:
    try:
        costs = made.cost_analysis()
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # read from the text by some jaxlibs
        return {}
    return dict(costs) if costs else {}


def _first_line(error: Exception) -> str:
    line = next((x for x in str(error).splitlines() if x.strip()), type(error).__name__)
    return line[:300]


def _too_large(message: str) -> tuple[float, float] | None:
    """(bytes that a program wants, bytes that there are) of the compiler's refusal."""
    for pattern in _TOO_MUCH:
        if found := pattern.search(message):
            used, unit, limit, limit_unit = found.groups()
            return _size(used, unit), _size(limit, limit_unit)
    return None


def _size(number: str, unit: str) -> float:
    return float(number) * 2 ** (10 * " KMGT".index(unit or " "))
