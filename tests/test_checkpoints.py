"""Weights in Orbax: large stacks in chunks of one layer, read back shard by shard, or refused."""

from __future__ import annotations

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import model_cases as cases
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.path import atomicity

from kdrl_jax.models import Decoder, ModelConfig, hf_table, load_hf
from kdrl_jax.sharding import make_mesh, param_shardings, path_name
from kdrl_jax.training.checkpoints import DELETED, CheckpointStore
from kdrl_jax.training.integrity import META, read_meta, seal
from kdrl_jax.training.run_weights import abstract_params, find_params, restore_params, save_params
from kdrl_jax.training.state import init_state
from kdrl_jax.types import TrainState, UserError

CONFIG = cases.CASES["qwen3_untied_yarn"] | {"num_key_value_heads": 2}
GATE = ("layers", "mlp", "gate_proj", "kernel")


@pytest.fixture
def loaded(tmp_path):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    model, params = load_hf(cases.write_folder(tmp_path / "hf", CONFIG), mesh)
    return model, params, mesh


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def test_large_stacks_are_saved_by_layer_whoever_saves(loaded, tmp_path, monkeypatch):
    model, params, mesh = loaded
    monkeypatch.setattr(hf_table, "PIECE_BYTES", 30_000)
    save_params(tmp_path / "alone", params)
    optimizer = optax.adam(1e-3)
    store = CheckpointStore(tmp_path / "run")
    store.save(3, init_state(jax.tree.map(jnp.copy, params), optimizer, mesh), {})
    store.close()
    for folder, step in ((tmp_path / "alone", 0), (tmp_path / "run", 3)):
        found, stored = find_params(folder, model.shapes())
        assert found == step
        pieces = {path_name(p): x.piece for p, x in jax.tree_util.tree_leaves_with_path(stored)}
        assert at(params, GATE).nbytes > 30_000
        assert pieces["layers/mlp/gate_proj/kernel"] == pieces["layers/mlp/down_proj/kernel"] == 1
        assert pieces["layers/attn/k_proj/kernel"] == 3
        assert pieces["embed/embedding"] == 32  # a device's share: nothing to cut by layer
        gate = at(stored, GATE)
        assert gate.piece == 1
        block = gate.read([slice(1, 2), slice(None), slice(3, 5)])
        np.testing.assert_array_equal(block, np.asarray(at(params, GATE))[1:2, :, 3:5])
        back = restore_params(
            folder, abstract_params(model, param_shardings(mesh, params), "bfloat16"), step
        )
        expected = jax.tree.map(lambda x: x.astype("bfloat16"), params)
        jax.tree.map(np.testing.assert_array_equal, back, expected)
        assert jax.tree.map(lambda x: x.sharding, back) == param_shardings(mesh, params)


def test_a_checkpoint_of_another_model_is_named_by_its_parameters(loaded, tmp_path):
    _, params, mesh = loaded
    save_params(tmp_path / "run", params)
    other = Decoder(
        ModelConfig.from_hf(CONFIG | {"tie_word_embeddings": True, "intermediate_size": 96})
    )
    with pytest.raises(UserError) as error:
        restore_params(
            tmp_path / "run",
            abstract_params(other, param_shardings(mesh, other.shapes())),
        )
    problems = error.value.problems
    assert len(problems) == 4
    assert "lm_head/kernel is surplus; use the config.json that belongs" in problems[0]
    assert "down_proj/kernel has shape [3, 80, 48], config.json asks for [3, 96, 48]" in problems[1]


def test_stored_weights_are_plain_orbax_arrays(loaded, tmp_path):
    """What `convert` writes without arrays in memory, Orbax by itself reads."""
    from kdrl_jax.models.hf_files import open_hf
    from kdrl_jax.training.streaming import write_stored

    model, params, _ = loaded
    with open_hf(tmp_path / "hf") as (_, arrays):
        tree = jax.tree_util.tree_map_with_path(
            lambda path, _: arrays[path_name(path)], model.shapes()
        )
        write_stored(tmp_path / "run", tree)
    where = (tmp_path / "run" / "checkpoints" / "0" / "params").resolve()
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(where)
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, params))


# --- a run's checkpoints --------------------------------------------------------------------


@pytest.fixture
def state():
    mesh = make_mesh(data=1, fsdp=2, tensor=1, devices=jax.devices()[:2])
    whole = NamedSharding(mesh, PartitionSpec())
    params = {
        "layers": {"k": jax.random.normal(jax.random.key(0), (4, 32, 8))},
        "scale": jnp.arange(33, dtype=jnp.bfloat16),
    }
    optimizer = optax.adamw(1e-3)

    def build(params):
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(build, out_shardings=whole)(params)


def after(state, step):
    """A state that tells the steps apart."""
    return jax.tree.map(lambda x: x + step, state)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def saved(folder, state, steps=(2, 4, 6), keep=3):
    store = CheckpointStore(folder, keep)
    for step in steps:
        store.save(step, after(state, step), {"step": step, "data_position": 3 * step})
    store.close()
    return folder / "checkpoints"


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def damage_data(step):
    """Flips a bit in the middle of the largest file: the weights' data."""
    file = max((step / "params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_moments(step):
    for file in (step / "opt_state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "bit": damage_data,
    "truncated": damage_moments,
    "meta": lambda step: (step / "meta" / "metadata").write_bytes(b'{"step": '),
    "half deleted": lambda step: shutil.rmtree(step / "params"),
    "empty": lambda step: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in step.iterdir()],
    "manifest": lambda step: (step / "params" / "manifest.ocdbt").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_said_kept_and_passed_over(damage, state, tmp_path):
    folder = saved(tmp_path, state)
    DAMAGES[damage](folder / "6")
    before = {p.relative_to(folder / "6") for p in (folder / "6").rglob("*")}
    store, said = CheckpointStore(tmp_path), []
    found, meta = store.restore(abstract(state), said.append)
    jax.tree.map(np.testing.assert_array_equal, found, after(state, 4))
    assert (meta["step"], meta["data_position"]) == (4, 12)
    assert said[0].startswith(f"{folder / '6'}: damaged (")
    assert said[0].endswith("; kept as damaged_6")
    assert said[1:] == ["falling back to the checkpoint of step 4"]
    assert names(folder) == ["2", "4", "damaged_6"]
    assert {
        p.relative_to(folder / "damaged_6") for p in (folder / "damaged_6").rglob("*")
    } == before
    # The step is made again, and is a checkpoint like any other.
    store.save(6, after(state, 6), {"step": 6})
    store.close()
    assert names(folder) == ["2", "4", "6", "damaged_6"]
    found, meta = CheckpointStore(tmp_path).restore(abstract(state), said.append)
    assert meta["step"] == 6
    jax.tree.map(np.testing.assert_array_equal, found, after(state, 6))


def test_nothing_is_begun_anew_where_all_is_damaged(state, tmp_path):
    folder = saved(tmp_path, state)
    for step in (2, 4, 6):
        damage_data(folder / str(step))
    for _ in range(2):  # the second time says the same
        store = CheckpointStore(tmp_path)
        assert store.latest_step() == 6
        with pytest.raises(UserError) as error:
            store.restore(abstract(state))
        store.close()
        assert [line.split(": damaged")[0] for line in error.value.problems[:3]] == [
            str(folder / name) for name in "642"
        ]
        assert "no checkpoint can be read" in error.value.problems[3]
        assert names(folder) == ["2", "4", "6"]
    for step in (2, 4, 6):
        (folder / str(step)).rename(folder / f"damaged_{step}")
    with pytest.raises(UserError, match="only damaged_2, damaged_4, damaged_6; use another"):
        CheckpointStore(tmp_path)


def test_another_model_is_not_damage(state, tmp_path):
    folder = saved(tmp_path, state)
    other = abstract(state)
    other.params["scale"] = jax.ShapeDtypeStruct((34,), jnp.bfloat16)
    with pytest.raises(UserError) as error:
        CheckpointStore(tmp_path).restore(other)
    assert len(error.value.problems) == 1
    assert "does not fit this model: params/scale is [[33], 'bfloat16']" in error.value.problems[0]
    assert names(folder) == ["2", "4", "6"]


def test_a_checkpoint_from_before_checksums_is_read_with_a_warning(state, tmp_path):
    folder = saved(tmp_path, state)
    meta = folder / "6" / "meta" / "metadata"
    meta.write_text(json.dumps({"step": 6, "data_position": 18}))
    said = []
    found, _ = CheckpointStore(tmp_path).restore(abstract(state), said.append)
    jax.tree.map(np.testing.assert_array_equal, found, after(state, 6))
    assert said == [f"{folder / '6'}: was written without checksums, so damage to it may go unseen"]


def test_weights_alone_are_compared_too_and_before_they_are_cast(state, tmp_path):
    save_params(tmp_path / "warm", state.params)
    like = abstract(state).params
    back = restore_params(tmp_path / "warm", like)
    jax.tree.map(np.testing.assert_array_equal, back, state.params)
    cast = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), like)
    back = restore_params(tmp_path / "warm", cast)
    for found, x, asked in zip(*map(jax.tree.leaves, (back, state.params, cast)), strict=True):
        assert (found.dtype, found.sharding) == (jnp.bfloat16, asked.sharding)
        np.testing.assert_array_equal(found, x.astype(jnp.bfloat16))
    where = tmp_path / "warm" / "checkpoints" / "0"
    meta = read_meta(where)
    meta["checksums"]["params/scale"][2] = "00000000"
    (where / META).write_text(json.dumps(seal(meta)))
    with pytest.raises(UserError, match="the checksum of params/scale differs"):
        restore_params(tmp_path / "warm", like)
    with pytest.raises(UserError, match="the checksum of params/scale differs"):
        restore_params(tmp_path / "warm", cast)
    (where / META).write_text("{")
    with pytest.raises(UserError, match="damaged or half written"):
        restore_params(tmp_path / "warm", like)


def test_old_checkpoints_go_by_renaming_after_the_new_one_is_whole(state, tmp_path, monkeypatch):
    """At each renaming away there is a newer whole one, with keep=1 as well."""
    seen = []

    def watched(self, target):
        if DELETED in str(target):
            seen.append((self.name, names(tmp_path / "checkpoints")))
        return replace(self, target)

    kind = type(epath.Path(tmp_path))
    replace = kind.replace
    monkeypatch.setattr(kind, "replace", watched)
    folder = saved(tmp_path, state, keep=1)
    assert names(folder) == ["6"]
    assert [gone for gone, _ in seen] == ["2", "4"]
    for gone, there in seen:
        assert int(gone) < max(int(name) for name in there if name.isdigit())


def test_what_a_kill_left_is_swept_up(state, tmp_path):
    folder = saved(tmp_path, state)
    shutil.copytree(folder / "2", folder / DELETED / "0")
    shutil.copytree(folder / "6", folder / "8.orbax-checkpoint-tmp")
    shutil.rmtree(folder / "8.orbax-checkpoint-tmp" / "opt_state")
    store = CheckpointStore(tmp_path)
    assert store.latest_step() == 6
    assert DELETED not in names(folder)
    store.save(8, after(state, 8), {"step": 8})
    store.close()
    assert names(folder) == ["4", "6", "8"]


@pytest.mark.parametrize("when", ["save", "wait", "close"])
def test_a_save_that_failed_is_told_by_whatever_comes_next(when, state, tmp_path, monkeypatch):
    """The disk is full while Orbax writes in the background; the last good one stays."""
    saved(tmp_path, state, steps=(2,), keep=1)
    store = CheckpointStore(tmp_path, 1)

    async def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "d"))

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", full)
    store.save(4, after(state, 4), {"step": 4})
    then = {"save": lambda: store.save(6, state, {}), "wait": store.wait, "close": store.close}
    with pytest.raises(UserError) as error:
        then[when]()
    assert "No space left on device; free space there" in error.value.problems[0]
    assert error.value.problems[1].endswith("the newest whole checkpoint is step 2")
    monkeypatch.undo()
    found, _ = CheckpointStore(tmp_path, 1).restore(abstract(state))
    jax.tree.map(np.testing.assert_array_equal, found, after(state, 2))
