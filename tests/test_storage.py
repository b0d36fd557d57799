"""Storage that fails is named with what to do about it; kills leave nothing torn for long."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from commands import HANG_S
from jax.errors import JaxRuntimeError

from kdrl_jax.training import storage
from kdrl_jax.training.storage import (
    check_writable,
    drop_torn_programs,
    storage_explained,
    storage_problem,
    sweep,
    sweep_partial,
    write_atomic,
)
from kdrl_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("number", sorted(storage.REMEDIES))
def test_each_error_is_named_with_its_file_and_remedy(number):
    error = OSError(number, os.strerror(number), "runs/x/metrics.jsonl")
    line = storage_problem(error, Path("runs/x"))
    assert line == f"runs/x/metrics.jsonl: {os.strerror(number)}; {storage.REMEDIES[number]}"
    with pytest.raises(UserError, match=r"metrics\.jsonl"), storage_explained(Path("runs/x")):
        raise error


def test_other_libraries_say_it_in_words_or_in_their_cause():
    there = Path("runs/x/checkpoints")
    text = 'RESOURCE_EXHAUSTED: Error writing "d/12" [OS error 28: ENOSPC No space left on device]'
    assert "No space left" in storage_problem(ValueError(text), there)
    outer = RuntimeError("could not save")
    outer.__cause__ = OSError(errno.EROFS, "Read-only file system")
    assert storage_problem(outer, there).startswith(f"{there}: Read-only file system; mount it")


def test_other_errors_are_not_the_storages():
    for error in (
        None,
        ValueError("shape"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes"),
        UserError("No space left on device"),
    ):
        assert storage_problem(error, Path("x")) is None


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_atomic(file, "old")

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomic(file, "new" * 1000)
    assert error.value.filename == str(file)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_limit_of_the_system_is_explained(tmp_path):
    """The system itself refuses, as a full disk does: no root needed."""
    code = (
        "import resource; from pathlib import Path; from kdrl_jax.training.storage import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"path = Path({str(tmp_path)!r}) / 'a'\n"
        "with storage_explained(Path('x')): write_atomic(path, 'x' * 9999)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S
    )
    assert f"UserError: {tmp_path / 'a'}: File too large; raise the limit" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_writers_go(tmp_path):
    gone = dead_pid()
    keep = [".lock", ".processes", "metrics.jsonl", f".x.{os.getppid()}", ".3"]
    for name in [*keep, f".metrics.jsonl.{gone}", f".summary.json.{os.getpid()}"]:
        (tmp_path / name).write_text("x")
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(keep)


def test_half_written_models_of_killed_runs_go_after_a_while(tmp_path):
    gone, folder = dead_pid(), tmp_path / "teacher-1"
    names = [f".teacher-1.partial-{gone}", f".teacher-1.old-{gone}"]
    others = [f".teacher-1.partial-{os.getppid()}", f".teacher-2.partial-{gone}"]
    for name in [*names, *others]:
        (tmp_path / name / "model").mkdir(parents=True)
    sweep_partial(folder)  # somebody on another host may be writing
    assert len(list(tmp_path.iterdir())) == 4
    sweep_partial(folder, hours=0)
    assert {p.name for p in tmp_path.iterdir()} == set(others)


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match="cannot be written to; give another folder"):
        check_writable(tmp_path / "a" / "b")


def test_torn_programs_are_dropped_and_looked_at_once(tmp_path):
    whole = zlib.compress(b"program" * 1000)
    (tmp_path / "jit_a-1-cache").write_bytes(whole)
    for i, data in enumerate((whole[:-1], whole[:40], b"", whole[:-4] + b"\0\0\0\0")):
        (tmp_path / f"jit_b-{i}-cache").write_bytes(data)
    (tmp_path / "other").write_bytes(b"")
    assert len(drop_torn_programs(tmp_path)) == 4
    assert {p.name for p in tmp_path.iterdir()} == {"jit_a-1-cache", "other", ".checked"}
    old = (tmp_path / ".checked").stat().st_mtime - 1
    (tmp_path / "jit_c-cache").write_bytes(whole[:40])
    os.utime(tmp_path / "jit_c-cache", (old, old))
    assert drop_torn_programs(tmp_path) == []  # as old as that it has been seen
    os.utime(tmp_path / "jit_c-cache")
    assert drop_torn_programs(tmp_path) == ["jit_c-cache"]
    assert drop_torn_programs(tmp_path / "none") == []


def test_jax_mends_what_was_dropped(tmp_path):
    """JAX itself writes the entry; torn it is never replaced, dropped it is."""
    code = (
        "import sys, jax; from pathlib import Path\n"
        "from kdrl_jax.training.storage import drop_torn_programs\n"
        "print(len(drop_torn_programs(Path(sys.argv[1]))))\n"
        "jax.jit(lambda x: x * 2 + 1)(1.0)"
    )
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def once():
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_S
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    assert once() == ("0", "")
    entries = {p: p.read_bytes() for p in tmp_path.glob("*-cache")}
    torn = max(entries, key=lambda p: len(entries[p]))
    torn.write_bytes(entries[torn][:100])
    assert once() == ("1", "")
    assert storage._whole_program(torn)
