"""SIGTERM ends a command at once until a step has been made, even within what holds no handler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import HANG_S

from kdrl_jax.training import stopping
from kdrl_jax.training.stopping import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EndAtOnce,
    StopRequest,
)

ROOT = Path(__file__).resolve().parent.parent
START = """
import hashlib, os, signal, sys, threading, time
from kdrl_jax.training import stopping
from kdrl_jax.training.stopping import EndAtOnce, StopRequest

def ready_within_a_call():
    # Once the call that follows computes: by the CPU time that the process takes.
    clock = time.CLOCK_PROCESS_CPUTIME_ID
    begun = time.clock_gettime(clock)

    def watch():
        while time.clock_gettime(clock) < begun + 0.3:
            time.sleep(0.01)
        print("ready", flush=True)

    threading.Thread(target=watch, daemon=True).start()
"""


def told(code, number=signal.SIGTERM):
    """Runs `code`, sends a signal once it has printed a line, and returns code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", START + code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        process.send_signal(number)
        _, err = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    return process.returncode, err


def test_before_a_step_the_command_ends_cleanly():
    code = """
stopping.GRACE_S = 3600
with EndAtOnce():
    try:
        print("ready", flush=True)
        time.sleep(3600)
    finally:
        print("tidied", file=sys.stderr)
"""
    found, err = told(code)
    assert found == EXIT_STOPPED
    assert err == "stopped before a step was made; run the same command again\ntidied\n"


def test_what_lets_no_handler_run_is_ended_as_well():
    """A call that keeps the main thread for an hour: Python's handlers wait for its end."""
    code = """
stopping.GRACE_S = 0.2
with EndAtOnce():
    ready_within_a_call()
    hashlib.pbkdf2_hmac("sha512", b"", b"", 2**31 - 1)
"""
    assert told(code) == (EXIT_STOPPED, "")


@pytest.mark.parametrize(
    ("number", "found"), [(signal.SIGTERM, EXIT_STOPPED), (signal.SIGINT, EXIT_INTERRUPTED)]
)
def test_a_compilation_is_left_to_itself(number, found):
    """XLA's thread goes on with it, with a client that must still be there."""
    code = """
import jax
from kdrl_jax.cli import run_entry

def body(x):
    y = x
    for _ in range(4000):
        y = jax.numpy.sin(y @ x)
    return y

def main():
    with EndAtOnce():
        lowered = jax.jit(body).lower(jax.numpy.ones((8, 8)))
        ready_within_a_call()
        lowered.compile()

run_entry(main)
"""
    code, err = told(code, number)
    words = "stopped before a step" if found == EXIT_STOPPED else "interrupted; to go on"
    assert code == found, err
    assert words in err


def test_after_a_step_it_is_the_runs_to_save():
    code = """
stopping.GRACE_S = 0.2
with EndAtOnce(), StopRequest() as stop:
    stop.step_made()
    print("ready", flush=True)
    while not stop:
        time.sleep(0.01)
    time.sleep(1)  # more than the grace
    print("saved", file=sys.stderr)
"""
    assert told(code) == (0, "saved\n")


CTRL_C = """
stopping.GRACE_S = 0.2
heard = threading.Event()
def told(number):
    print("finishing the step", file=sys.stderr, flush=True)
    heard.set()
with EndAtOnce(), StopRequest(told) as stop:
    stop.step_made()
"""


def test_ctrl_c_is_answered_while_the_main_thread_computes():
    """By another thread, and the main one goes on."""
    code = (
        CTRL_C
        + """
    def compute():
        print("ready", flush=True)
        heard.wait()
        time.sleep(1)  # more than the grace
        print("computed", file=sys.stderr)
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    print("saved", bool(stop), file=sys.stderr)
"""
    )
    assert told(code, signal.SIGINT) == (0, "finishing the step\ncomputed\nsaved True\n")


def test_a_second_ctrl_c_interrupts():
    code = (
        CTRL_C
        + """
    print("ready", flush=True)
    while not (stop and heard.is_set()):
        time.sleep(0.01)
    stopping.GRACE_S = 3600
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(3600)
    except KeyboardInterrupt:  # what is open is closed, however long that takes
        print("closed", EndAtOnce.current._left.is_set(), file=sys.stderr)
"""
    )
    assert told(code, signal.SIGINT) == (0, "finishing the step\nclosed True\n")


def test_a_second_ctrl_c_ends_what_lets_no_handler_run():
    code = (
        CTRL_C
        + """
    def again():
        heard.wait()
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=again, daemon=True).start()
    ready_within_a_call()
    hashlib.pbkdf2_hmac("sha512", b"", b"", 2**31 - 1)
"""
    )
    words = "finishing the step\ninterrupted; run the same command again\n"
    assert told(code, signal.SIGINT) == (EXIT_INTERRUPTED, words)


def test_ctrl_c_before_the_first_step_ends_at_once():
    """There is nothing to save."""

    def run():
        with EndAtOnce(), StopRequest():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(HANG_S)

    with pytest.raises(KeyboardInterrupt):
        run()


def test_within_a_run_before_its_first_step():
    def run():
        with EndAtOnce(), StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(HANG_S)

    with pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
        run()


def test_without_it_a_run_is_asked_to_stop():
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert stop


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with EndAtOnce() as now:
        assert signal.getsignal(signal.SIGTERM) != before
        assert EndAtOnce.current is now
    assert signal.getsignal(signal.SIGTERM) == before
    assert EndAtOnce.current is None
    assert signal.set_wakeup_fd(-1) == -1


def test_in_another_thread_it_does_nothing():
    found = []

    def run():
        with EndAtOnce():
            found.append(stopping.EndAtOnce.current)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]
