"""The checks of shapes that debug mode installs, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from commands import xla_flags
from jaxtyping import Array, Float, Int

from kdrl_jax import shapes
from kdrl_jax.config import ROOT
from kdrl_jax.shapes import Unshaped, loosened
from kdrl_jax.types import UserError

CALLS = """
import jax, jax.numpy as jnp, numpy as np
from kdrl_jax.objectives import token_weights, kd_weights, group_advantages
from kdrl_jax.types import Rollouts, SamplingParams, TrainState
from jaxtyping import TypeCheckError
mask, groups = jnp.ones((4, 3)), jnp.zeros(4, int)
weights = jax.jit(token_weights)(mask, groups)
token_weights(np.ones((4, 3)), [0, 0, 1, 1]) if False else None
def refused(call):
    try:
        call()
    except TypeCheckError as error:
        return "Type-check error" in str(error)
    return False
assert refused(lambda: kd_weights(weights, jnp.zeros(5), groups))
assert refused(lambda: jax.jit(kd_weights)(weights, jnp.zeros((4, 1)), groups))
assert refused(lambda: group_advantages(jnp.zeros(4)))
z = np.zeros
parts = [z((2, 3), int), z(2, int), z((2, 5, 7), int), z((2, 5, 7), "f"), z((2, 5), int)]
fine = Rollouts(*parts, z((2, 5), int))
jax.tree.map(lambda x: None, fine), jax.tree.map(lambda x: object(), fine)  # no arrays: no shapes
assert refused(lambda: Rollouts(*parts, z((2, 6), int)))
assert refused(lambda: Rollouts(*parts[:3], z((2, 5, 7), int), parts[4], z((2, 5), int)))
print("all refused")
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(), **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)


def test_functions_and_records_are_held_to_their_shapes():
    done = python(CALLS, KDRL_DEBUG="1")
    assert done.stdout == "all refused\n", done.stderr[-2000:]
    assert python(CALLS).stdout == ""  # nothing is checked unless asked for


def test_without_beartype_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "beartype", None)
    with pytest.raises(UserError, match=r"debug: True needs beartype.*'kdrl_jax\[debug\]'"):
        shapes.install()


def test_a_program_of_ones_own_is_not_started_again(monkeypatch):
    monkeypatch.delenv("KDRL_DEBUG", raising=False)
    monkeypatch.setattr(os, "execv", lambda *args: pytest.fail("started again"))
    shapes.require_installed(["--config=x"])
    monkeypatch.setenv("KDRL_DEBUG", "1")
    shapes.require_installed(None)


def test_hints_without_arrays_are_left_to_mypy():
    for hint in (int, str | None, list[int], dict[str, int], tuple[int, ...], "Forward"):
        assert loosened(hint) is not None
        assert repr(loosened(hint)) == "typing.Any"
    assert repr(loosened(Array | Float[Array, "B"])) == "typing.Any"  # any array will do
    found = loosened(Float[Array, "B"] | None)
    assert Unshaped in found.__args__
    assert len(loosened(tuple[Int[Array, " B"], int]).__args__) == 2


def test_what_has_no_shape_passes():
    assert all(isinstance(x, Unshaped) for x in (None, 1, 2.0, "x", [1], {}, object()))
    assert not isinstance(np.zeros(2), Unshaped)
