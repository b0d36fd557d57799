"""Weights in Orbax: large stacks in chunks of one layer, read back shard by shard, or refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import model_cases as cases
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from kdrl_jax.models import Decoder, ModelConfig, hf_table, load_hf
from kdrl_jax.sharding import make_mesh, param_shardings, path_name
from kdrl_jax.training.checkpoints import (
    CheckpointStore,
    abstract_params,
    find_params,
    restore_params,
    save_params,
)
from kdrl_jax.training.state import init_state
from kdrl_jax.types import UserError

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
