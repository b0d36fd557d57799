"""Meshes and the one table: sizes that are inferred, what cannot be split, where arrays go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.base import get_config
from kdrl_jax import processes
from kdrl_jax.config import apply_overrides
from kdrl_jax.models import Decoder, ModelConfig
from kdrl_jax.sharding import (
    AXES,
    activation_spec,
    infer_sizes,
    make_mesh,
    nearest_divisor,
    param_shardings,
    put,
    state_shardings,
    to_mesh,
)
from kdrl_jax.training.meshes import make_meshes
from kdrl_jax.training.roles import mesh_problems
from kdrl_jax.training.state import abstract_state, make_optimizer
from kdrl_jax.types import UserError

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "mlp_size": 48}
SHAPE = ModelConfig(**SMALL, num_kv_heads=2, head_dim=8)


def sizes(data=1, fsdp=1, tensor=1, context=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (sizes(), None),
        (sizes(data=-1), sizes(data=8)),
        (sizes(fsdp=-1, tensor=2), sizes(fsdp=4, tensor=2)),
        (sizes(context=-1, tensor=2, fsdp=2), sizes(context=2, tensor=2, fsdp=2)),
        (sizes(data=2, fsdp=2, context=2), sizes(data=2, fsdp=2, context=2)),
    ],
)
def test_one_size_is_inferred(given, found):
    if found is None:
        with pytest.raises(UserError, match=r"1 does not make the 8 devices present"):
            infer_sizes(given, 8)
    else:
        assert infer_sizes(given, 8) == found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (sizes(data=-1, fsdp=-1), "at most one -1"),
        (sizes(data=0), "sizes must be positive"),
        (sizes(data=-2), "sizes must be positive"),
        (sizes(fsdp=3, data=-1), r"3 does not divide the 8 devices present; mesh.fsdp=2 does"),
        (sizes(fsdp=6), r"6 does not make the 8 devices present; mesh.fsdp=8 does"),
        (
            sizes(fsdp=4, tensor=3),
            r"12 does not make .* the product of the others",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_devices(given, said):
    with pytest.raises(UserError, match=said):
        infer_sizes(given, 8)


def test_the_nearest_divisor():
    assert [nearest_divisor(n, 12) for n in (1, 5, 7, 8, 9, 40)] == [1, 4, 6, 6, 6, 12]


def test_what_of_a_model_a_mesh_cannot_split():
    assert mesh_problems("mesh", make_mesh(2, 2, 2), "student", SHAPE) == []
    problems = mesh_problems("teacher_mesh", make_mesh(1, 1, 8), "teacher", SHAPE)
    assert problems == [
        "teacher_mesh.tensor: 8 does not divide the teacher's key/value heads, 2; the nearest that "
        "does is 2"
    ]


def test_axes_split_what_the_table_says():
    mesh = make_mesh(data=1, fsdp=2, tensor=2, context=2)
    assert tuple(mesh.axis_names) == AXES
    shape = (4, 16, 4, 8)
    spec = activation_spec(mesh, shape, "batch", "length", "heads", None)
    assert spec == P(("data", "fsdp"), "context", "tensor", None)
    # What does not divide is left whole.
    assert activation_spec(mesh, (3, 16), "batch", "length") == P(None, "context")


def test_moments_are_split_over_all_copies_of_a_weight():
    mesh = make_mesh(data=2, fsdp=2, context=2)
    optimizer = make_optimizer(
        lambda step: 1e-3, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0
    )
    state = abstract_state(Decoder(SHAPE), optimizer, mesh)
    weight = state.params["layers"]["mlp"]["gate_proj"]["kernel"]
    adam = next(
        x
        for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(x, "mu")
    )
    moment = adam.mu["layers"]["mlp"]["gate_proj"]["kernel"]
    assert weight.sharding.shard_shape(weight.shape) == (2, 16, 48)
    assert moment.sharding.shard_shape(moment.shape) == (2, 4, 48)
    # A device's part of a moment is of its own part of the weight.
    own, part = (x.sharding.devices_indices_map(x.shape) for x in (weight, moment))
    for device in mesh.devices.flat:
        assert own[device][1].start or part[device][1].start >= 0
        assert part[device][1].stop <= (own[device][1].stop or 32)
    assert state_shardings(mesh, state).step.spec == P()


def test_arrays_go_to_another_mesh_as_they_are_split():
    mesh, other, model = make_mesh(1, 4, 2), make_mesh(2, 2, 2), Decoder(SHAPE)
    shardings = param_shardings(mesh, model.shapes())
    params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
    moved = to_mesh(other, params)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(x, y)
        assert y.sharding.is_equivalent_to(NamedSharding(other, x.sharding.spec), y.ndim)
    leaf = jax.tree.leaves(params)[0]
    assert put(leaf, leaf.sharding) is leaf  # nothing is copied without need


def meshes(*overrides):
    return make_meshes(apply_overrides(get_config(), list(overrides)))


def test_arrays_go_to_fewer_devices_while_copies_are_guarded():
    """JAX takes such an array through the host, which training allows nobody but us."""
    mesh = make_mesh(1, 2, 1, 2, devices=jax.devices()[:4])
    other = make_mesh(2, 1, devices=jax.devices()[4:6])
    weights = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    x = put(weights, NamedSharding(mesh, P("fsdp", "context")))
    with jax.transfer_guard("disallow"):
        moved = to_mesh(other, x)
        again = put(moved, NamedSharding(mesh, P("context", "fsdp")))
    assert moved.sharding.device_set == {*jax.devices()[4:6]}
    np.testing.assert_array_equal(moved, weights)
    np.testing.assert_array_equal(again, weights)


def test_rollouts_take_data_and_context_for_one_axis_and_move_nothing():
    found = meshes("mesh.fsdp=2", "mesh.context=2", "mesh.tensor=2")
    assert dict(found.rollout.shape) == {"data": 2, "context": 1, "fsdp": 2, "tensor": 2}
    assert found.teacher == found.student
    weight = jax.device_put(jnp.ones((4, 8)), NamedSharding(found.student, P("fsdp", "tensor")))
    moved = to_mesh(found.rollout, weight)
    assert moved.sharding.mesh == found.rollout
    for x, y in zip(weight.addressable_shards, moved.addressable_shards, strict=True):
        assert x.data.unsafe_buffer_pointer() == y.data.unsafe_buffer_pointer()


def test_meshes_of_their_own():
    found = meshes(
        *("mesh.devices=0:4", "rollout_mesh.devices=4:6", "teacher_mesh.devices=6:"),
        *("rollout_mesh.fsdp=1", "teacher_mesh.fsdp=2"),
    )
    ids = [
        [d.id for d in mesh.devices.flat] for mesh in (found.student, found.rollout, found.teacher)
    ]
    assert ids == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert found.apart == {"teacher", "rollout"}
    own = meshes("mesh.fsdp=4", "mesh.data=2", "teacher_mesh.data=1", "teacher_mesh.tensor=2")
    assert dict(own.teacher.shape) == {"data": 1, "context": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("mesh.devices=0:4x",),
            r"mesh.devices: '0:4x' is no range of the 8 devices; write FIRST:END",
        ),
        (("mesh.devices=4:12",), "mesh.devices: '4:12' is no range"),
        (("mesh.devices=8:",), "mesh.devices: '8:' is no range"),
        (("mesh.fsdp=3",), r"mesh.data=1, mesh.fsdp=3, mesh.tensor=1, mesh.context=1: 3"),
        (
            ("teacher_mesh.fsdp=3", "rollout_mesh.tensor=5"),
            r"(?s)teacher_mesh.fsdp=3.*rollout_mesh.tensor=5",
        ),
    ],
)
def test_meshes_that_cannot_be(overrides, said):
    with pytest.raises(UserError, match=said):
        meshes(*overrides)


def test_of_several_processes_all_meshes_have_the_same_devices(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(UserError, match=r"^rollout_mesh.devices: '4:8', but there are 2 processes"):
        meshes("rollout_mesh.devices=4:8")
