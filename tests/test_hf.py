"""Checkpoint folders: read into shards, refused by name, written back bit for bit."""

from __future__ import annotations

import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import model_cases as cases
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kdrl_jax.models import (
    Decoder,
    ModelConfig,
    hf_files,
    hf_save,
    hf_table,
    load_config,
    load_eos_ids,
    load_hf,
    save_hf,
)
from kdrl_jax.sharding import make_mesh, param_shardings, path_name
from kdrl_jax.types import KVCache, UserError


@pytest.fixture
def folder(tmp_path):
    """A Qwen3 folder with an untied head, in one file."""
    return cases.write_folder(tmp_path / "checkpoint", CONFIG)


CONFIG = cases.CASES["qwen3_untied_yarn"] | {"num_key_value_heads": 2}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def reshard(folder, parts: int = 3) -> None:
    """Split model.safetensors into several files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(parts):
        name = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        content = {k: tensors[k] for k in sorted(tensors)[i::parts]}
        save_file(content, folder / name)
        weight_map |= dict.fromkeys(content, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_trees_equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rewrite(folder, change) -> None:
    """Apply `change` to the dict of tensors in model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_sharded_file_set_loads_like_one_file(folder):
    _, whole = load_hf(folder)
    reshard(folder)
    model, parts = load_hf(folder, compute_dtype=jnp.bfloat16, remat="full")
    assert_trees_equal(whole, parts)
    assert model == Decoder(load_config(folder), dtype=jnp.bfloat16, remat="full")


def test_loading_onto_a_mesh_gives_the_same_logits(folder, monkeypatch):
    model, one = load_hf(folder)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    reads = []
    read = hf_table.Row.read

    def spy(self, source, index):
        block = read(self, source, index)
        reads.append((self.tensor, block.size))
        return block

    monkeypatch.setattr(hf_table.Row, "read", spy)
    _, params = load_hf(folder, mesh)
    shardings = param_shardings(mesh, model.shapes())
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    assert_trees_equal(one, params)
    # Replicas along `data` are read once, and never more than a quarter of a matrix at a time.
    sizes = dict(cases.tensor_shapes(CONFIG))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert [n for t, n in reads if t == name] == [np.prod(sizes[name]) // 4] * 4
    gate = "model.layers.{layer}.mlp.gate_proj.weight"
    quarter = np.prod(sizes[gate.format(layer=0)]) // 4
    assert [n for t, n in reads if t == gate] == [quarter] * 4 * 3

    rows = tuple(jnp.asarray(x) for x in cases.rows())
    forward = jax.jit(lambda p, *xs: model.logits(p, model.apply(p, *xs)))
    expected = np.asarray(forward(one, *rows))
    with jax.set_mesh(mesh):
        sharded = np.asarray(
            jax.jit(lambda p, *xs: model.logits(p, model.apply(p, *xs)))(params, *rows)
        )
    real = rows[2] > 0
    assert np.abs(sharded - expected)[real].max() <= 1e-4


def test_prefill_and_decode_run_sharded(folder):
    model, one = load_hf(folder)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(one, param_shardings(mesh, one))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, cases.VOCAB, (4, 6)))
    positions, ids = jnp.broadcast_to(jnp.arange(6), (4, 6)), jnp.ones((4, 6), int)

    def run(params):
        hidden, prompt = model.prefill(params, tokens, positions, ids)
        cache = [KVCache(k, v) for k, v in zip(prompt.k, prompt.v, strict=True)]
        lengths, recent = jnp.full(4, 6), model.new_cache(4, 3)
        weights = model.unstack(params)
        logits, _ = model.decode(
            weights, tokens[:, 0], model.angles(lengths, 3), cache, lengths, recent, 0
        )
        return logits, model.logits(params, hidden)

    expected = jax.jit(run)(one)
    with jax.set_mesh(mesh):
        sharded = jax.jit(run)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), expected, sharded)


def test_a_mesh_that_does_not_fit_is_refused(folder):
    with pytest.raises(UserError, match=r"mesh.tensor=8 does not divide axis 2 of layers/attn"):
        load_hf(folder, make_mesh(data=1, tensor=8))


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_hf_to_params_to_hf_keeps_every_bit(name, kind, tmp_path):
    config = cases.CASES[name]
    tensors = {k: v.astype(kind) for k, v in cases.random_tensors(config).items()}
    source = cases.write_folder(tmp_path / "in", config, tensors)
    model, params = load_hf(source)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    save_hf(tmp_path / "out", model, params, dtype=kind)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for key, value in tensors.items():
        assert written[key].dtype == value.dtype
        np.testing.assert_array_equal(written[key].view(np.uint8), value.view(np.uint8))
    assert load_config(tmp_path / "out") == load_config(source)


def test_params_keep_their_own_dtype(folder, tmp_path):
    model, params = load_hf(folder, dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
    save_hf(tmp_path / "out", model, params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_trees_equal(params, load_hf(tmp_path / "out", dtype=jnp.bfloat16)[1])


def test_a_large_export_is_split_and_reads_back(folder, tmp_path):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model, params = load_hf(folder, mesh)
    save_hf(tmp_path / "out", model, params, max_shard_bytes=40_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert {f.name for f in files} == set(index["weight_map"].values())
    assert index["weight_map"].keys() == cases.tensor_shapes(CONFIG).keys()
    assert all(f.stat().st_size < 45_000 for f in files)
    assert_trees_equal(params, load_hf(tmp_path / "out")[1])


def test_export_carries_tokenizer_and_end_tokens(folder, tmp_path):
    (folder / "tokenizer.json").write_text('{"any": "bytes"}')
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "optimizer.pt").write_text("not a tokenizer")
    model, params = load_hf(folder)
    assert load_eos_ids(folder) == ()
    out = tmp_path / "deep" / "out"
    save_hf(out, model, params, tokenizer_folder=folder, eos_ids=(3, 5), pad_id=0)
    assert (out / "tokenizer.json").read_text() == '{"any": "bytes"}'
    assert {f.name for f in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "SHA256SUMS",
    }
    assert load_eos_ids(out) == (3, 5)
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == 0
    (out / "generation_config.json").unlink()
    assert load_eos_ids(out) == (3, 5)


def test_export_replaces_a_folder_only_when_asked(folder, tmp_path):
    model, params = load_hf(folder)
    out = tmp_path / "out"
    out.mkdir()
    save_hf(out, model, params)
    (out / "stale").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty"):
        save_hf(out, model, params)
    assert (out / "stale").exists()
    save_hf(out, model, params, overwrite=True)
    assert not (out / "stale").exists()
    with pytest.raises(UserError, match="no tokenizer files found"):
        save_hf(tmp_path / "other", model, params, tokenizer_folder=out)


def test_a_failed_export_leaves_nothing_new(folder, tmp_path, monkeypatch):
    model, params = load_hf(folder)
    out = tmp_path / "out"
    save_hf(out, model, params)
    before = {f.name: f.read_bytes() for f in out.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(hf_save._Parts, "take", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_hf(out, model, jax.tree.map(lambda x: x + 1, params), overwrite=True)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_missing_surplus_and_misshapen_are_named_at_once(folder):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(80, np.float32)
        tensors["model.layers.3.input_layernorm.weight"] = np.zeros(48, np.float32)
        tensors[Q_PROJ] = np.ascontiguousarray(tensors[Q_PROJ].T)
        tensors["model.embed_tokens.weight"] = np.zeros((64, 48), np.int8)

    rewrite(folder, change)
    with pytest.raises(UserError) as error:
        load_hf(folder)
    text = "\n".join(error.value.problems)
    for line in (
        "model.norm.weight is missing",
        "lm_head.weight is missing",
        "model.layers.0.self_attn.q_proj.bias is surplus",
        "model.layers.3.input_layernorm.weight is surplus",
        f"{Q_PROJ} has shape [48, 80]; config.json asks for [80, 48]",
        "model.embed_tokens.weight is I8; supported: F64, F32, BF16, F16",
    ):
        assert line in text
    assert len(error.value.problems) == 6


def test_long_lists_of_problems_are_counted(folder):
    """A line for each shape that is missing, and no weight goes uncounted."""
    gone = []
    rewrite(folder, lambda tensors: gone.extend(k for k in list(tensors) if ".layers." in k))
    rewrite(folder, lambda tensors: [tensors.pop(k) for k in gone])
    with pytest.raises(UserError) as error:
        load_hf(folder)
    lines = error.value.problems
    others = [int(re.search(r"\(and (\d+) more like it: ", line)[1]) for line in lines]
    assert len(lines) == len({re.search(r"shape .*? by", line)[0] for line in lines}) < 10
    assert len(lines) + sum(others) == len(gone) > 20


def test_old_rotary_buffers_are_passed_over(folder):
    _, before = load_hf(folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: np.ones(10, np.float32)}))
    assert_trees_equal(before, load_hf(folder)[1])


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_files._same, "__defaults__", (20,))
    config = cases.CASES["llama_tied"]
    tensors = cases.random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    folder = cases.write_folder(tmp_path / "tied", config, tensors)
    assert "lm_head" not in load_hf(folder)[1]
    tensors["lm_head.weight"][-1, -1] += 1  # the last of several blocks compared
    cases.write_folder(folder, config, tensors)
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        load_hf(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "..\\x", "a/../../x"])
def test_an_index_cannot_point_outside_its_folder(folder, name):
    reshard(folder)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][Q_PROJ] = name
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match="lies outside the folder; refused"):
        load_hf(folder)


def test_links_of_a_download_cache_are_followed(folder, tmp_path):
    _, before = load_hf(folder)
    shutil.move(folder / "model.safetensors", tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    assert_trees_equal(before, load_hf(folder)[1])


def test_damaged_folders_say_what_to_do(folder, tmp_path):
    with pytest.raises(UserError, match=r"config\.json: not found; give a folder with"):
        load_hf(tmp_path / "nowhere")

    reshard(folder)
    parts = sorted(folder.glob("model-*"))
    content = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(UserError, match=r"00002-of-00003\.safetensors: missing, but listed"):
        load_hf(folder)
    parts[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"00002-of-00003\.safetensors: unreadable"):
        load_hf(folder)
    shutil.copy(parts[0], parts[1])
    with pytest.raises(UserError, match="is in another file as well"):
        load_hf(folder)

    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        load_hf(folder)


def test_an_unsupported_config_is_refused_before_any_weight(folder):
    config = CONFIG | {"use_sliding_window": True, "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="use_sliding_window: true found") as error:
        load_hf(folder)
    assert len(error.value.problems) == 2


def test_every_parameter_has_one_row():
    paths = [path for path, _, _ in hf_table.ROWS]
    assert len(set(paths)) == len(paths)
    for config in cases.CASES.values():
        shapes = Decoder(ModelConfig.from_hf(config)).shapes()
        names = {path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(shapes)}
        rows = hf_table.table_rows(ModelConfig.from_hf(config), shapes)
        assert rows.keys() == names
        layers = config["num_hidden_layers"]
        written = {t: r.hf_shape for r in rows.values() for t in r.tensors(layers)}
        assert written == cases.tensor_shapes(config)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float32, np.float16])
def test_copies_by_tiles_are_copies(axes, kind, rng):
    array = rng.standard_normal((3, 11, 14)).astype(ml_dtypes.bfloat16).transpose(axes)
    out = np.empty(array.shape, kind)
    hf_table.copy_into(out, array, tile=4)
    np.testing.assert_array_equal(out, array.astype(kind))


def test_large_stacks_are_filled_on_the_devices_layer_by_layer(folder, monkeypatch):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    _, expected = load_hf(folder, mesh)
    reads = []
    read = hf_table.HFArray.read

    def spy(self, *args):
        block = read(self, *args)
        reads.append((self.row, block.shape))
        return block

    monkeypatch.setattr(hf_table.HFArray, "read", spy)
    monkeypatch.setattr(hf_table, "PIECE_BYTES", 2 * 24 * 40 * 4)  # two layers of an MLP's share
    _, params = load_hf(folder, mesh)
    assert_trees_equal(expected, params)
    assert jax.tree.map(lambda x: x.sharding, params) == param_shardings(mesh, params)
    gate = [shape for row, shape in reads if "gate_proj" in row.tensor]
    assert gate == [(2, 24, 40)] * 4 + [(1, 24, 40)] * 4
