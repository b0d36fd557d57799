"""offline=True: what Python's own record of connections, the kernel and a sealed process say."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import xla_flags
from test_train import TINY, command

from kdrl_jax.cli import run_entry
from kdrl_jax.config import ROOT, load_config
from kdrl_jax.data import read_problems
from kdrl_jax.network import LIBRARIES, OfflineError, is_loopback, set_offline
from kdrl_jax.training.validation import validate
from kdrl_jax.types import UserError


@pytest.fixture
def offline(monkeypatch):
    for name in LIBRARIES:
        monkeypatch.delenv(name, raising=False)
    set_offline(True)
    yield
    set_offline(False)
    assert not any(name in os.environ for name in LIBRARIES)


def test_loopback_is_known_without_asking():
    here = [
        "127.0.0.1",
        "127.8.8.8",
        "::1",
        "localhost",
        "",
        None,
        b"127.0.0.1",
        "::ffff:127.0.0.1",
    ]
    there = [
        "8.8.8.8",
        "10.0.0.1",
        "example.org",
        "localhost.example.org",
        "::ffff:8.8.8.8",
        "0x7f",
    ]
    assert all(is_loopback(host) for host in here)
    assert not any(is_loopback(host) for host in there)


def test_every_way_out_is_refused_before_it_is_tried(offline):
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    tries = {
        "getaddrinfo of 'example.org'": lambda: socket.create_connection(("example.org", 80)),
        "gethostbyname of 'example.org'": lambda: socket.gethostbyname("example.org"),
        "connect of '192.0.2.1'": lambda: socket.socket().connect(("192.0.2.1", 80)),
        "sendto of '192.0.2.1'": lambda: udp.sendto(b"x", ("192.0.2.1", 53)),
        "sendmsg of '192.0.2.1'": lambda: udp.sendmsg([b"x"], [], 0, ("192.0.2.1", 53)),
        "connect of '2001:db8::1'": lambda: socket.socket(socket.AF_INET6).connect(
            ("2001:db8::1", 80)
        ),
    }
    for said, attempt in tries.items():
        with pytest.raises(OfflineError, match="offline: True, but") as caught:
            attempt()
        assert said in caught.value.problems[0]
        assert isinstance(caught.value, UserError)
        assert isinstance(caught.value, OSError)
    udp.close()


def test_this_machine_itself_is_no_network(offline):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        assert client.getpeername() == server.getsockname()
    one, other = socket.socketpair()
    one.sendall(b"x")
    assert other.recv(1) == b"x"
    one.close()
    other.close()


def test_it_can_be_ended_and_children_inherit_it(offline):
    code = "import kdrl_jax, socket; socket.create_connection(('192.0.2.1', 80), 1)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "OfflineError: offline: True, but" in child.stderr
    set_offline(False)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect(("192.0.2.1", 53))  # sends nothing


def test_hub_data_comes_from_the_cache_or_is_named(offline, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert huggingface_hub.constants.is_offline_mode()
    commit = "0123456789" * 4
    at = tmp_path / "datasets--owner--name" / "snapshots" / commit
    at.mkdir(parents=True)
    (at / "some.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    refs = at.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    problems, report = read_problems("hf://owner/name?file=some.jsonl")
    assert [p.answer for p in problems] == ["2"]
    assert report.commit == commit
    assert f"unpinned: this is {commit}; add &revision={commit}" in str(report)
    _, report = read_problems(f"hf://owner/name?file=some.jsonl&revision={commit}")
    assert report.commit == commit
    assert "unpinned" not in str(report)
    with pytest.raises(UserError, match=r"hf://owner/other\?file=x.jsonl: the hub gave nothing"):
        read_problems("hf://owner/other?file=x.jsonl")


def test_a_server_elsewhere_is_refused():
    server = {"rollout.server.url": "http://node7:8000", "rollout.server.model": "m"}
    flags = [f"{key}={value}" for key, value in server.items()]
    demo = ROOT / "configs" / "demo.py"
    with pytest.raises(UserError, match=r"'http://node7:8000' is another machine, and offline=T"):
        validate(load_config(demo, [*flags, "offline=true"]))
    flags[0] = "rollout.server.url=http://127.0.0.1:8000"
    validate(load_config(demo, [*flags, "offline=true"]))


# --- whole runs ----------------------------------------------------------------------------------

GRPO = {"objective": "grpo", "student.sft.steps": 0, "teacher.sft.steps": 0}
RUN = TINY | GRPO | {"steps": 1, "eval.every": 1}


def test_a_run_without_any_network_asks_for_none(tmp_path):
    """In a network namespace of its own there is no interface but a loopback that is down.

    The kernel's account of the run and all its children, C++ included, names no other machine.
    """
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rn", "true"]).returncode:
        pytest.skip("this machine lets nobody make network namespaces")
    log = tmp_path / "calls"
    trace = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg"]
    trace += ["-o", str(log)]
    if not shutil.which("strace") or subprocess.run([*trace, "true"]).returncode:
        trace = []
    else:
        probe = "import socket; s = socket.socket(2, 2); s.connect_ex(('192.0.2.1', 9))"
        subprocess.run([*trace, sys.executable, "-c", probe])
        assert outward(log)  # so that a run without any is no accident
    run = [sys.executable, "-m", "kdrl_jax.train", "--config.offline=true"]
    run += command(tmp_path / "run", tmp_path / "cache", **RUN)
    environment = {**os.environ, "XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-rn", *trace, *run], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "summary.json").exists()
    assert not trace or outward(log) == []


def outward(log: Path) -> list[str]:
    """System calls to an address that is not this machine's."""
    calls = [line for line in log.read_text().splitlines() if "AF_INET" in line]
    return [x for x in calls if 'inet_addr("127.' not in x and '"::1"' not in x]


def test_a_task_that_asks_for_the_network_ends_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "telling.py").write_text(
        "import socket\n"
        "from kdrl_jax.tasks import Task\n"
        "def problems(count, seed, *, split='train'):\n"
        "    socket.create_connection(('192.0.2.1', 80), 1)\n"
        "TASK = Task(problems, None, alphabet='abc')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from kdrl_jax import train

    changes = {"data.task": "telling:TASK", "student.sft.steps": 0, "objective": "grpo"}
    changes |= {"teacher.sft.steps": 0, "offline": "true"}
    try:
        with pytest.raises(SystemExit) as end:
            run_entry(lambda: train.main(command(tmp_path / "run", tmp_path / "cache", **changes)))
    finally:
        set_offline(False)
    assert end.value.code == 2
    assert "error: offline: True, but getaddrinfo of '192.0.2.1'" in capsys.readouterr().err
