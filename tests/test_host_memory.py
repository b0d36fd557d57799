"""Memory that nothing needs: given back, and not kept by what saves."""

import gc
import os
import subprocess
import sys

import jax.numpy as jnp
import psutil
import pytest
import tensorstore
from commands import HANG_S

from kdrl_jax.training import tensorstore_leaks
from kdrl_jax.training.checkpoints import CheckpointStore
from kdrl_jax.training.host_memory import _libc, give_back
from kdrl_jax.types import TrainState

needs_glibc = pytest.mark.skipif(
    getattr(_libc("malloc_trim"), "__name__", "") != "malloc_trim", reason="not glibc"
)


@needs_glibc
def test_freed_pieces_are_given_back():
    process = psutil.Process()
    pieces = [bytearray(3000) for _ in range(100_000)]  # 300 MB, each below glibc's own mmap
    full = process.memory_info().rss
    last = pieces[-1]
    del pieces  # the last one keeps the heap from shrinking by itself
    give_back()
    assert len(last) == 3000
    assert process.memory_info().rss < full - 200e6


SHARED = """
import ctypes, io, os, sys, threading
from kdrl_jax.training.host_memory import share_arenas
share_arenas()
libc = ctypes.CDLL(None)
go = threading.Barrier(33)

def work():
    held = [libc.malloc(5000) for _ in range(100)]
    go.wait()
    go.wait()

threads = [threading.Thread(target=work) for _ in range(32)]
[thread.start() for thread in threads]
go.wait()
libc.malloc_stats()
go.wait()
"""


@pytest.mark.parametrize(
    ("told", "arenas"), [({}, max(os.cpu_count() or 1, 2)), ({"MALLOC_ARENA_MAX": "3"}, 3)]
)
@needs_glibc
def test_threads_share_arenas(told, arenas):
    env = {k: v for k, v in os.environ.items() if k not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, "-c", SHARED],
        env=env | told,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Arena ") == arenas


def test_checkpoints_leave_no_objects_behind(tmp_path):
    """212 blocks a save of 48 arrays without the ways around it."""
    params = {f"layer{i}": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)} for i in range(8)}
    state = TrainState(jnp.int32(0), params, (params, params))
    store = CheckpointStore(tmp_path, keep=1)

    def save(steps):
        for step in steps:
            store.save(step, state, {"step": step})
        store.wait()
        gc.collect()
        return sys.getallocatedblocks()

    save(range(10))
    before = save(range(10, 15))
    after = save(range(15, 35))
    store.close()
    assert (after - before) / 20 < 100


def test_specs_read_as_before(tmp_path):
    kinds = [
        {"driver": "file", "path": f"{tmp_path}/"},
        {"driver": "file", "path": f"{tmp_path}/", "file_io_concurrency": {"limit": 2}},
        {"driver": "memory", "path": "a/"},
    ]
    tensorstore_leaks.avoid()
    plain = tensorstore_leaks._originals["to_json"]
    for kind in kinds * 2:
        found = tensorstore.KvStore.Spec(kind).to_json()
        assert found == plain(tensorstore.KvStore.Spec(kind))
        found["path"] = "changed by who asked"
    for kind in kinds:
        spec = tensorstore.KvStore.Spec(kind)
        options = {"include_defaults": True}
        assert spec.to_json(**options) == plain(spec, **options)
