"""Worker processes that write nonsense, read nothing, or cannot start any more; closing; counts."""

import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from commands import HANG_S, wait_until
from hanging import only_hanging_is_timed

from kdrl_jax.rewards import Grader, pool, supervisor
from kdrl_jax.rewards.supervisor import Supervisor

SCRIPT = r"""
import json, os, sys, time
flag = sys.argv[1]
if os.path.exists(flag + ".broken"):
    sys.exit("cannot start")
print(json.dumps("hello"), flush=True)
out = sys.stdout.buffer
def say(raw):
    out.write(raw); out.flush()
for line in sys.stdin:
    answer = json.loads(line)[1]
    if answer == "garbage": say(b"\xff\xfe\x00 not json\n")
    elif answer == "unknown": say(b'"excellent"\n')
    elif answer == "number": say(b"17\n")
    elif answer == "nested": say(b"[" * 60_000 + b"\n")
    elif answer == "huge": say(b"9" * 60_000 + b"\n")
    elif answer == "twice": say(b'"correct"\n"correct"\n')
    elif answer == "flood":
        while True: say(b"x" * 65536)
    elif answer == "half":
        say(b'"cor'); time.sleep(0.05); say(b'rect"\n')
    elif answer == "later":
        say(b'"correct"\n'); time.sleep(0.05); say(b'"correct"\n')
    elif answer == "closed":
        os.close(1); time.sleep(1000)
    elif answer == "hang": time.sleep(1000)
    elif answer == "slow":
        time.sleep(0.3); say(b'"wrong"\n')
    elif answer == "deaf":
        say(b'"wrong"\n'); time.sleep(1000)
    elif answer == "break":
        open(flag + ".broken", "w").close(); os._exit(1)
    else: say(b'"wrong"\n')
"""


def workers(tmp_path: Path, count: int = 1, timeout_s: float = HANG_S) -> Supervisor:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "flag")]
    return Supervisor(command, count, timeout_s, "the script")


def grader_of(tmp_path: Path, count: int = 1, timeout_s: float = HANG_S) -> Grader:
    grader = Grader(workers=count, timeout_s=timeout_s, require_format=False, verify="a:b")
    grader._supervisor.command = workers(tmp_path).command
    return grader


@pytest.mark.parametrize(
    "nonsense", ["garbage", "unknown", "number", "nested", "huge", "twice", "flood"]
)
def test_what_a_worker_writes_never_raises(tmp_path: Path, nonsense: str) -> None:
    crew = workers(tmp_path)
    try:
        found = crew.ask([("g", "a"), ("g", nonsense), ("g", "b")])
        assert found == {("g", "a"): "wrong", ("g", nonsense): "unparsable", ("g", "b"): "wrong"}
        assert (crew.counts.asked, crew.counts.crashes, crew.counts.restarts) == (3, 1, 1)
    finally:
        supervisor.kill_all(crew.workers)


def test_a_reply_in_two_parts_and_one_that_nobody_asked_for(tmp_path: Path) -> None:
    crew = workers(tmp_path)
    try:
        assert crew.ask([("g", "half")]) == {("g", "half"): "correct"}
        assert crew.ask([("g", "later")]) == {("g", "later"): "correct"}
        wait_until(crew.workers[0].has_something_to_read, 'a second "correct"')
        assert crew.ask([("g", "x")]) == {("g", "x"): "wrong"}
        assert crew.counts.restarts == 1
    finally:
        supervisor.kill_all(crew.workers)


def test_a_worker_that_reads_nothing_or_closes_its_output(tmp_path: Path, monkeypatch) -> None:
    only_hanging_is_timed(monkeypatch, "xxx")
    crew = workers(tmp_path, timeout_s=1.0)
    large = "x" * 3_000_000  # many times what a pipe holds
    try:
        assert crew.ask([("g", "deaf")]) == {("g", "deaf"): "wrong"}
        assert crew.ask([("g", large)]) == {("g", large): "timeout"}
        only_hanging_is_timed(monkeypatch, "nothing")
        assert crew.ask([("g", large)]) == {("g", large): "wrong"}  # to one that reads it arrives
        assert crew.ask([("g", "closed")]) == {("g", "closed"): "unparsable"}
        assert crew.counts.timeouts == 1
        assert crew.counts.seconds_max >= 1.0
    finally:
        supervisor.kill_all(crew.workers)


def test_workers_that_cannot_start_for_a_while(tmp_path: Path, monkeypatch) -> None:
    """Once one has started, a failure is the machine's: wait and try again, in the end say so."""
    monkeypatch.setattr(supervisor, "BACK_OFF_S", 0.2)
    monkeypatch.setattr(supervisor, "LATER_ATTEMPTS", 6)
    crew = workers(tmp_path)
    broken = Path(f"{tmp_path / 'flag'}.broken")
    failures, start_failed = [], Supervisor._start_failed

    def noted(self, *args):
        failures.append(args)
        start_failed(self, *args)

    monkeypatch.setattr(Supervisor, "_start_failed", noted)

    def mend() -> None:
        while not broken.exists():
            time.sleep(0.01)
        while not failures:
            time.sleep(0.01)
        broken.unlink()

    try:
        threading.Thread(target=mend, daemon=True).start()
        assert crew.ask([("g", "break"), ("g", "a")])[("g", "a")] == "wrong"
    finally:
        supervisor.kill_all(crew.workers)
    broken.touch()
    monkeypatch.setattr(supervisor, "BACK_OFF_S", 0.01)
    with pytest.raises(RuntimeError, match="cannot start"):
        crew.ask([("g", "a")])
    assert not crew.workers
    broken.unlink()
    crew.command = [str(tmp_path / "no such program")]
    with pytest.raises(RuntimeError, match="could not be started"):
        crew.ask([("g", "a")])


def test_closing_cancels_what_is_under_way_and_what_waits(tmp_path: Path) -> None:
    grader = grader_of(tmp_path, timeout_s=1e6)
    jobs = [grader.submit([f"\\boxed{{{text}}}"], ["g"]) for text in ("hang", "a", "b")]
    while not any(worker.task for worker in grader._pool):
        time.sleep(0.02)
    grader.close()  # and does not wait for the deadline, which is far away
    for job in jobs:
        with pytest.raises(CancelledError):
            job.result()
    assert not grader._pool
    assert grader.grade(["\\boxed{c}"], ["g"])[0].outcome == "wrong"  # and it may go on
    grader.close()


def test_submit_waits_when_too_many_wait(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pool, "MAX_WAITING", 2)
    with grader_of(tmp_path) as grader:
        jobs = [grader.submit(["\\boxed{slow}"], [f"g{i}"]) for i in range(4)]
        assert sum(job.done() for job in jobs) >= 2  # or the last two could not have been handed in
        assert [job.result()[0].outcome for job in jobs] == ["wrong"] * 4
        for _ in range(4):  # every place is free again
            assert grader.submit(["\\boxed{a}"], ["g"]).result()[0].outcome == "wrong"


def test_counts(tmp_path: Path, monkeypatch) -> None:
    only_hanging_is_timed(monkeypatch, "hang")
    with grader_of(tmp_path, timeout_s=0.5) as grader:
        texts = ["a", "hang", "garbage", "a", "slow"]
        grader.grade([f"\\boxed{{{text}}}" for text in texts], ["g"] * 5)
        counts = grader.take_counts()
        assert (counts.asked, counts.timeouts, counts.crashes) == (4, 1, 1)  # one was known
        assert counts.restarts == 2
        assert 0.5 <= counts.seconds_max <= counts.seconds
        assert grader.take_counts().asked == 0


@pytest.mark.parametrize("secrets", [True, False])
def test_a_worker_for_mathematics_is_told_no_secret(tmp_path: Path, monkeypatch, secrets) -> None:
    for name in ("HF_TOKEN", "KDRL_SERVER_KEY", "AWS_SECRET_ACCESS_KEY", "HARMLESS"):
        monkeypatch.setenv(name, "x")
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        "print(json.dumps(sorted(os.environ)), flush=True)\n"
        "for line in sys.stdin: print(json.dumps('correct'), flush=True)\n"
    )
    one = Supervisor([sys.executable, str(script)], 1, HANG_S, "nothing", secrets=secrets)
    one.ask([("a", "b")])
    told = set(one.workers[0].hello)
    supervisor.kill_all(one.workers)
    assert "HARMLESS" in told
    assert ("HF_TOKEN" in told, "AWS_SECRET_ACCESS_KEY" in told) == (secrets, secrets)
    with Grader(workers=1) as grader:
        grader.grade(["<think>a</think>\\boxed{x+1}"], ["1+x"])
        assert not grader._supervisor._environment.keys() & {"HF_TOKEN", "KDRL_SERVER_KEY"}
