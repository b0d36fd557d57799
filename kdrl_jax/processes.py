"""The processes of a run: how they meet, agree, and share the work of the hosts.

Every process runs the same program, and takes every decision by itself from what all of them see:
none of them leads the others. Only files are written by one of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from kdrl_jax.types import UserError

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables that say what no scheduler says."""


def start(timeout_s: float | None) -> None:
    """Find the other processes of this run, where there are any. Before any device is used.

    TPU pods, SLURM, Kubernetes and Open MPI are recognised by JAX; elsewhere the variables BY_HAND
    say it.

    Args:
      timeout_s: a process that gives no sign of life for so long is lost: the others name it and
        end. Default: 100.

    Raises:
      UserError: only some of the variables are set, or to something else than numbers.
    """
    if jax.distributed.is_initialized():
        return
    if isinstance(timeout_s, int | float):
        _Timeout.seconds = max(1, round(timeout_s))
    seconds = _Timeout.seconds
    options: dict[str, Any] = {
        "heartbeat_timeout_seconds": seconds,
        "shutdown_timeout_seconds": seconds,  # of one that ends alone, by an error of its own
    }
    given = {name: os.environ[name] for name in BY_HAND if os.environ.get(name)}
    if given and not (len(given) == 1 and "JAX_COORDINATOR_ADDRESS" in given):
        problems = [
            f"{name}: not set, but {', '.join(given)} is; set all of {', '.join(BY_HAND)}"
            for name in BY_HAND
            if name not in given
        ] + [
            f"{name}: {given[name]!r} is no number"
            for name in BY_HAND[1:]
            if name in given and not given[name].isdigit()
        ]
        if not problems and not int(given[BY_HAND[2]]) < int(given[BY_HAND[1]]):
            problems = [f"{BY_HAND[2]}: {given[BY_HAND[2]]} must be below {BY_HAND[1]}"]
        if problems:
            raise UserError(*problems)
        if int(given[BY_HAND[1]]) == 1:
            return
        options |= {
            "coordinator_address": given[BY_HAND[0]],
            "num_processes": int(given[BY_HAND[1]]),
            "process_id": int(given[BY_HAND[2]]),
        }
    try:
        jax.distributed.initialize(**options)
    except RuntimeError as error:
        if "before any JAX" not in str(error):
            raise
        # A program that has used devices already is alone, or has met the others itself.
    except ValueError as error:
        if given or "should be defined" not in str(error):
            raise


def leave(code: int) -> NoReturn:
    """End this process at once, with the devices' clients as they are.

    A compilation that a signal has interrupted goes on in a thread of XLA's. Python's own end would
    wait for that and free the client beneath it, which crashes (jax 0.10).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    try:
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
    finally:
        os._exit(code)


def index() -> int:
    """This process's number."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return index() == 0


def mine(number: int) -> bool:
    """Whether the request of this number is this process's to verify."""
    return number % count() == index()


def gather(x: np.ndarray) -> np.ndarray:
    """`[count, ...]`: the small host array that each process has. All of them must call."""
    if count() == 1:
        return np.asarray(x)[None]
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(np.asarray(x)))


def gather_text(text: str) -> list[str]:
    """The text that each process has. All of them must call."""
    data = np.frombuffer(text.encode(), np.uint8)
    longest = int(gather(np.array(len(data))).max())
    padded = np.concatenate([data, np.zeros(longest - len(data), np.uint8)])
    return [bytes(row).rstrip(b"\0").decode() for row in gather(padded)]


def gather_rows(rows: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """The lists of 32-bit numbers that each process has. All of them must call."""
    counts = np.array([len(row) for row in rows], np.int32)
    numbers = np.array([number for row in rows for number in row], np.int32)
    sizes = gather(np.array([len(counts), len(numbers)]))
    rows_most, most = sizes.max(axis=0)
    padded = [
        np.pad(counts, (0, rows_most - len(counts))),
        np.pad(numbers, (0, most - len(numbers))),
    ]
    found = []
    for (rows_there, total), lengths, flat in zip(sizes, *map(gather, padded), strict=True):
        ends = np.cumsum(lengths[:rows_there])[:-1]
        found.append([part.tolist() for part in np.split(flat[:total], ends)][:rows_there])
    return found


def any_of(flag: bool) -> bool:
    """Whether it is so in any process. All of them must call."""
    return bool(gather(np.array(flag)).any())


def barrier(name: str) -> None:
    """Wait until all processes have come here."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def hosts() -> list[str]:
    """'0 = HOST' for each process: to know one by its number. All of them must call."""
    return [f"{i} = {name}" for i, name in enumerate(gather_text(socket.gethostname()))]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What goes wrong on one host is an error on all of them: none waits for another.

    Raises:
      UserError: in every process, if any has raised one within; in the others also where one has
        raised anything else, unless it is the devices' or the network's.
    """
    problems: list[str] = []
    other: Exception | None = None
    try:
        yield
    except UserError as error:
        if count() == 1:
            raise
        problems = error.problems
    except jax.errors.JaxRuntimeError:
        raise  # what the others would be told by may be what is broken
    except Exception as error:
        if count() == 1:
            raise
        problems, other = f"{type(error).__name__}: {error}".splitlines(), error
    if count() > 1:
        told = [text.split("\n") if text else [] for text in gather_text("\n".join(problems))]
        names = hosts()
        lines = dict.fromkeys(line for mine in told for line in mine)
        if other is not None:
            raise other
        where = {line: [names[i] for i, x in enumerate(told) if line in x] for line in lines}
        if lines:
            raise UserError(
                *(
                    line if len(of) == count() else f"{line} (process {', '.join(of)})"
                    for line, of in where.items()
                )
            )


def first_does(action: Callable[[], None]) -> None:
    """Have the first process do something that the others then rely on.

    Raises:
      UserError: in every process, if `action` does.
    """
    with together():
        if is_first():
            action()


def agree(where: str, values: Mapping[str, str]) -> None:
    """Make sure that all processes have the same. All of them must call.

    Args:
      where: what the values were taken from, for the error.
      values: names to digests.

    Raises:
      UserError: in every process, with one line for each value that differs.
    """
    if count() == 1:
        return
    everyone = [json.loads(text) for text in gather_text(json.dumps(dict(values)))]
    names, problems = hosts(), []
    for name in values:
        found = [other.get(name) for other in everyone]
        usual = max(found, key=found.count)
        others = [names[i] for i, value in enumerate(found) if value != usual]
        if others:
            problems.append(
                f"{where}: process {', '.join(others)} has another {name} than the rest; start the "
                "same command with the same files everywhere"
            )
    if problems:
        raise UserError(*problems)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say what it means when the connection to another process breaks.

    Raises:
      LostProcess: that, after the coordinator has had its time to name the process and to end
        this one.
    """
    names = hosts()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if count() == 1 or not any(word in str(error) for word in SIGNS):
            raise
        line = str(error).splitlines()[0][:200]
        problem = (
            f"process {index()}: another process of this run is lost ({line}). They are "
            f"{'; '.join(names)}. Start all of them again to continue from the newest checkpoint"
        )
        print(f"error: {problem}", file=sys.stderr, flush=True)
        raise LostProcess(problem) from error


SIGNS = ("Gloo", "NCCL", "heartbeat", "UNAVAILABLE", "DEADLINE_EXCEEDED", "onnection")
"""Words of the errors that collectives end with when a process goes away."""


class LostProcess(Exception):
    """Another process of the run has gone."""


def wait_for_the_coordinator() -> None:
    """Time for it to name the process that is lost: it then ends this one with a message."""
    time.sleep(_Timeout.seconds + 10)


class _Timeout:
    seconds = 100
