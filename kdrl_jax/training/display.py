"""What a command says while it works: bars on a terminal, lines elsewhere, JSON where asked for.

On a terminal all open tracks are rows of one region at its foot, which a thread of rich's redraws
REFRESHES times a second from what the host knows anyway: nothing here waits for a device.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import io
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kdrl_jax.training.compiling import COMPILING

LOGS = ("text", "json", "quiet")
REFRESHES = 2  # a second: 0.5 % of a core
BAR = 24  # columns
RECENT = 20  # steps whose pace the time that is left is reckoned from
PATIENCE_S = 5.0
"""What lasts longer is said where no bar shows it."""
HEARTBEAT_S = 10.0
"""Between two lines, or JSON objects, about the same track of parts of a step or of bytes."""


def finite(value: Any) -> Any:
    """`value` with None for numbers that JSON has not, within objects and lists as well."""
    if isinstance(value, Mapping):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Log:
    kind = "text"
    out: TextIO | None = None
    lock = threading.Lock()


def log_kind() -> str:
    """One of LOGS: how this process speaks."""
    return _Log.kind


def emit(event: str, **fields: Any) -> None:
    """One JSON object as a line of stdout; nothing unless that is how the process speaks."""
    if _Log.kind != "json" or _Log.out is None:
        return
    now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
    line = json.dumps({"event": event, "time": now, **finite(fields)}, default=str, allow_nan=False)
    with _Log.lock:
        _Log.out.write(line + "\n")
        _Log.out.flush()


@contextlib.contextmanager
def speaking(kind: str) -> Iterator[None]:
    """Have this process speak in another way.

    With "json" what anybody prints to stdout becomes an event "say" for each line, so that stdout
    holds nothing but JSON; with "quiet" it is dropped. Stderr stays as it is.

    Args:
      kind: one of LOGS.
    """
    before, out = (_Log.kind, _Log.out), sys.stdout
    _Log.kind, _Log.out = kind, out
    if kind != "text":
        sys.stdout = _Lines(out)
    try:
        yield
    finally:
        end_line()
        sys.stdout.flush()
        sys.stdout = out
        _Log.kind, _Log.out = before


def end_line() -> None:
    """Say what was printed last even if its line has no end."""
    if isinstance(sys.stdout, _Lines):
        sys.stdout.write("\n")


class _Lines(io.TextIOBase):
    """Stands for stdout: whole lines become events, or nothing."""

    encoding = "utf-8"

    def __init__(self, out: TextIO):
        self._out, self._rest = out, ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._out.fileno()

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            emit("say", text=line)
        return len(text)


class Display:
    """How a command tells a person, or a program, what it does.

    Args:
      quiet: say nothing: of several processes only one speaks.
      beside: print to stderr, and nothing of compilations: stdout is for something else.

    Attributes:
      kind: one of LOGS.
      live: whether tracks are bars on a screen.
    """

    def __init__(self, quiet: bool = False, beside: bool = False):
        self.kind = "quiet" if quiet else _Log.kind
        stream = sys.stderr if beside else sys.stdout
        self.console = Console(
            file=stream,
            highlight=False,
            quiet=self.kind != "text",
            soft_wrap=not stream.isatty(),
            force_terminal=stream.isatty(),  # whatever CI says of colours: bars need a screen
            force_jupyter=False,
        )
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live &= self.kind == "text"
        self._tracks: list[Track] = []
        self._region: Live | None = None
        if not quiet and not beside:
            COMPILING.lasts = self._compiling

    def say(self, text: str) -> None:
        """Plain text, mostly one line."""
        if self.kind == "json":
            emit("say", text=text)
        else:
            self.console.print(text, markup=False)

    def alert(self, text: str, **fields: Any) -> None:
        """A line that should be noticed; `fields` go with it in JSON."""
        if self.kind == "json":
            emit("alert", text=text, **fields)
        else:
            self.console.print(text, markup=False, style="bold yellow")

    def event(self, event: str, fields: Mapping[str, Any]) -> None:
        """Something for a program to read; nothing in text, where lines say it."""
        if self.kind == "json":
            emit(event, **fields)

    def track(
        self,
        title: str,
        total: float | None,
        start: float = 0,
        *,
        unit: str = "",
        part: bool = False,
    ) -> Track:
        """Something of known length, `start` of it done; several may be open at a time.

        Args:
          total: None: not known.
          unit: "bytes", or of countable things "".
          part: of something that is tracked itself: its row goes when it is closed, and without a
            terminal no lines are written about it.
        """
        track = Track(self, title, total, start, unit, part)
        if self.live:
            self._tracks.append(track)
            if self._region is None:
                self._region = Live(
                    get_renderable=self._rows,
                    console=self.console,
                    refresh_per_second=REFRESHES,
                )
                self._region.start()
        return track

    @contextlib.contextmanager
    def doing(self, title: str, row: bool = True) -> Iterator[None]:
        """Something of unknown length; without a terminal it is said when it lasts.

        Args:
          row: show it on a terminal; False: it shows itself.
        """
        begun, said = time.monotonic(), threading.Event()

        def tell() -> None:
            said.set()
            self.say(f"{title} …")

        timer = threading.Timer(PATIENCE_S, tell)
        timer.daemon = True
        if not self.live:
            timer.start()
        track = self.track(title, None, part=True) if row else None
        try:
            yield
        finally:
            timer.cancel()
            if track:
                track.close()
            if said.is_set():
                self.say(f"{title}: {time.monotonic() - begun:.0f} s")

    @contextlib.contextmanager
    def loading(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Bytes that are read or written: gives a function that is told (done, total)."""
        with self.track(title, 0, unit="bytes", part=True) as track:

            def progress(done: int, total: int) -> None:
                track.total = total
                track.set(done)

            yield progress

    def _compiling(self, program: str, seconds: float, done: bool) -> None:
        """Where no bar shows it: that a program has been compiled for long, or took long.

        The display's own command may be over, and its stream closed.
        """
        if getattr(self.console.file, "closed", False):
            return
        if self._region is None or done:
            self.say(f"compiled {program} in {seconds:.0f} s" if done else f"compiling {program} …")

    def remove(self, track: Track) -> None:
        """Take a closed track's row from the screen; of the last one its last frame stays."""
        if track not in self._tracks:
            return
        others = [other for other in self._tracks if other is not track]
        if any(not other.part for other in others) or (track.part and others):
            self._tracks = others
            return
        assert self._region
        self._tracks, region, self._region = [track], self._region, None
        region.transient = track.part
        region.stop()
        self._tracks = []

    def _rows(self) -> Group:
        """The region as it is now; called by the thread that draws."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, width=BAR)
        table.add_column(no_wrap=True, overflow="ellipsis")
        texts, now = [], time.monotonic()
        for track in list(self._tracks):
            if track.shown:
                table.add_row(track.title, track.bar(now), Text(track.beside(now)))
                if not track.part and track.text:
                    texts.append(Text(track.text, no_wrap=True, overflow="ellipsis"))
        if (running := COMPILING.running) and now - running[1] > 1:
            what = Text(f"{running[0]}  {now - running[1]:.0f} s")
            table.add_row("compiling", ProgressBar(pulse=True, width=BAR), what)
        return Group(table, *texts)


class Track:
    """One thing of known length, or an open one: `Display.track` makes it.

    Attributes:
      done, total: how far it is.
      text: what is said beside it, or beneath the bars.
      active: since when something of unknown length is being done; None: it is not.
      shown: whether it has a row at present.
    """

    def __init__(
        self,
        display: Display,
        title: str,
        total: float | None,
        start: float,
        unit: str,
        part: bool,
    ):
        self._display, self.title, self.total, self.done = display, title, total, start
        self._unit, self.part, self.text, self.shown = unit, part, "", True
        self.active: float | None = time.monotonic()
        self._marks = collections.deque([(self._clock(), start)], RECENT)
        self._begun = self._printed = time.monotonic()

    def advance(self, text: str = "", steps: float = 1, every_s: float = 0.0) -> None:
        """Report `steps` more; without a terminal a line at most each `every_s` seconds."""
        self.set(self.done + steps, text, every_s)

    def set(self, done: float, text: str = "", every_s: float = 0.0) -> None:
        """Report that so much is done, in all."""
        self.done, self.text, now = done, text, time.monotonic()
        self._marks.append((self._clock(), done))
        small = self.part or self._unit == "bytes"
        json_log = self._display.kind == "json"
        every_s = max(every_s, HEARTBEAT_S) if small or json_log else every_s
        if now - self._printed < every_s and (small or done != self.total):
            return
        if json_log:
            counts = {"done": done, "total": self.total, "eta_s": self.eta()}
            unit = {"unit": self._unit} if self._unit else {}
            emit("progress", title=self.title, **counts, **unit, text=text)
        elif not self._display.live and (not self.part or self._unit):
            words = (f"{self.title} {self.count()}", text, self._left())
            self._display.console.print("  ".join(filter(None, words)), markup=False)
        self._printed = now

    def drawn(self, finished: int, tokens: int) -> None:
        """Report rollouts: requests that have ended and tokens drawn, in all; see `Engine`."""
        seconds = time.monotonic() - (self.active or 0.0)
        self.set(finished, f"{tokens:,} tokens  {tokens / max(seconds, 1e-9):,.0f}/s")

    def eta(self) -> float | None:
        """Seconds that are left at the pace of the last steps; None: nobody knows."""
        (begun, first), (last, done) = self._marks[0], self._marks[-1]
        if self.total is None or done <= first:
            return None
        pace = (last - begun) / (done - first)
        return max(round(pace * (self.total - done) - (self._clock() - last), 1), 0.0) + 0.0

    def count(self) -> str:
        """'3/50', or '1.2 GB/14.0 GB'."""
        if self._unit == "bytes":
            return f"{decimal(int(self.done))}/{decimal(int(self.total or 0))}"
        return f"{self.done:,.0f}/{self.total or 0:,.0f}"

    def beside(self, now: float) -> str:
        """What stands beside the bar."""
        if self.total is None:
            elapsed = "" if self.active is None else f"{now - self.active:.1f} s"
            return "  ".join(filter(None, (elapsed, self.text)))
        if not self.total:
            return ""
        more = self.text if self.part and not self._unit else self._left()
        return "  ".join(filter(None, (self.count(), more)))

    def bar(self, now: float) -> ProgressBar:
        """The bar as it is now."""
        if self.total is None:
            busy = self.active is not None
            return ProgressBar(1, self.done, BAR, pulse=busy, animation_time=now)
        return ProgressBar(max(self.total, 1), min(self.done, self.total), BAR)

    def close(self) -> None:
        """Take its row from the screen; the last track of all stays there."""
        self._display.remove(self)

    def __enter__(self) -> Track:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _clock() -> float:
        """Seconds without those of compilations, which say nothing of the steps to come."""
        return time.monotonic() - COMPILING.seconds

    def _left(self) -> str:
        if self.done == self.total:
            seconds = round(time.monotonic() - self._begun)
            return f"took {datetime.timedelta(seconds=seconds)}"
        left = self.eta()
        return "" if left is None else f"ETA {datetime.timedelta(seconds=round(left))}"
