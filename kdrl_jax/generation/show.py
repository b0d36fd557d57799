"""Answers for a person: text as it comes, two beside each other, tokens with their log-probs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kdrl_jax.generation.asking import means
from kdrl_jax.training.compiling import COMPILING, CompileCounter

WIDE = 100
"""Columns of a terminal from which two answers stand beside each other."""
_SAVE, _RESTORE = "\x1b7", "\x1b8\x1b[J"


class CompileNotice:
    """Says on stderr that a program is being compiled, for as long as there is nothing else to say.

    On a terminal the word goes where text will, and is wiped away before it.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._on, self._counter = False, CompileCounter()

    def __enter__(self) -> CompileNotice:
        COMPILING.begins = self._begun
        return self

    def __exit__(self, *_: object) -> None:
        COMPILING.begins = lambda: None
        self.clear()

    def clear(self) -> None:
        """Something else is about to be written."""
        if self._on and self._live:
            self._write(_RESTORE)
        elif self._on:
            self._write(f"compiled in {self._counter.seconds:.1f} s\n")
        self._on = False

    def _begun(self) -> None:
        if not self._on:
            self._on, self._counter = True, CompileCounter()
            sys.stdout.flush()
            self._write(f"{_SAVE}\x1b[2mcompiling…\x1b[0m" if self._live else "compiling…\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Columns:
    """Two answers beside each other on a terminal: their ends while they are drawn, then all."""

    def __init__(self, console: Console, names: Sequence[str]):
        self._console, self._names = console, names
        self._texts = [""] * len(names)
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> Columns:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)
        self._console.print(self._table(None))

    def add(self, speaker: int, text: str) -> None:
        """More of one of the answers."""
        self._texts[speaker] += text
        self._live.update(self._table(self._console.height - 5), refresh=True)

    def _table(self, most: int | None) -> Table:
        table = Table(expand=True)
        width = self._console.width // len(self._names) - 4
        cells = []
        for name, text in zip(self._names, self._texts, strict=True):
            table.add_column(Text(name), ratio=1)
            lines = Text(text).wrap(self._console, width)
            cells.append(Text("\n").join(lines[-most:] if most else lines))
        table.add_row(*cells)
        return table


def side_by_side(console: Console) -> bool:
    """Whether two answers fit beside each other."""
    return console.is_terminal and console.width >= WIDE


def show_tokens(console: Console, records: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """A table of tokens with their log-probs, and the means."""
    two = len(names) > 1
    table = Table()
    table.add_column("token")
    for name in names:
        table.add_column(Text(f"log π {name}"), justify="right")
    if two:
        table.add_column("ℓ", justify="right")
    keys = ("log_prob", "beside_log_prob", "log_ratio") if two else ("log_prob",)
    for record in records:
        cells = [_cell(record[key], key == "log_ratio") for key in keys]
        table.add_row(Text(repr(record["token"])[1:-1]), *cells)
    console.print(table)
    mean = means(records)
    said = [f"{mean[key]:.3f} {name}" for key, name in zip(keys, names, strict=False)]
    line = f"{len(records)} tokens; mean log π: {', '.join(said)}"
    if "k2" in mean:
        line += f"; ℓ {mean['log_ratio']:+.3f}, ½ℓ² {mean['k2']:.3f} nats per token"
    console.print(line, markup=False)


def _cell(value: float | None, ratio: bool) -> Text:
    if value is None:
        return Text("-", style="dim")
    if ratio:
        style = "red" if abs(value) > 1 else "yellow" if abs(value) > 0.1 else "dim"
        return Text(f"{value:+.3f}", style=style)
    return Text(
        f"{value:.3f}", style="green" if value > -0.1 else "yellow" if value > -1 else "red"
    )
