"""Eight simulated CPU devices, no network, and strict NumPy-style promotion."""

import atexit
import os
import shutil
import signal
import sys
import tempfile

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job has it so, and its children too: for them Ctrl-C would be nothing.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
if "PYTEST_XDIST_WORKER" in os.environ or "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Most of the time goes into compiling: a program that several tests or their commands need is
    # compiled once. Each worker has a folder of its own, in which nobody else writes meanwhile.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kdrl_jax-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def strict_ranks():
    """Silent broadcasting of a mask is the classic bug of an RL loss: make it an error."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def no_modules_left_behind():
    """What a file's tests wrote and imported is no module for the next file in this process."""
    yield
    written = tempfile.gettempdir() + os.sep
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None) or "").startswith(written):
            del sys.modules[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left alone with one at the end."""
    longest = ("train", "processes", "plan", "training", "launch", "rollout", "generate")
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in longest)
