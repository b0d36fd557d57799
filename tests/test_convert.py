"""Hugging Face to Orbax and back: every bit, every file, a piece at a time; and what is refused."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import model_cases as cases
import numpy as np
import pytest
import tokenizer_cases
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kdrl_jax import convert
from kdrl_jax.cli import run_entry
from kdrl_jax.config import read_config
from kdrl_jax.models import Decoder, hf_table, load_config, load_hf
from kdrl_jax.sharding import make_mesh, param_shardings, path_name
from kdrl_jax.training.integrity import META, checksums, read_meta, seal
from kdrl_jax.training.roles import check_weights
from kdrl_jax.training.run_weights import abstract_params, restore_params, save_params
from kdrl_jax.training.streaming import OrbaxArray
from kdrl_jax.types import UserError

BF16 = np.dtype(ml_dtypes.bfloat16)
QWEN25 = cases.CASES["qwen2"] | {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}
MODELS = {
    "qwen2_untied": (cases.CASES["qwen2"], "bfloat16"),
    "qwen2_tied": (cases.CASES["qwen2_tied_yarn"], "float32"),
    "qwen2.5": (QWEN25, "float16"),
    "qwen3_tied": (cases.CASES["qwen3_tied"], "bfloat16"),
    "qwen3_untied": (cases.CASES["qwen3_untied_yarn"], "bfloat16"),
}
# Spacing, order and keys that no program of ours would write.
EXTRA = {"transformers_version": "4.43.1", "bos_token_id": 0, "_note": "kept", "eos_token_id": 2}


def write(folder: Path, config: dict, dtype: str, files: int = 3) -> Path:
    """A checkpoint folder as a hub has it: several files, a tokenizer, generation settings."""
    config = {"torch_dtype": dtype} | config | EXTRA | {"vocab_size": 512}
    tensors = cases.random_tensors(config)
    tensors = {k: v.astype(jnp.dtype(dtype)) for k, v in tensors.items()}
    tokenizer_cases.write_hf(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=7))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0],"top_k":7}')
    (folder / "tokenizer_config.json").write_text(
        '{"pad_token": "<|im_end|>",   "eos_token": "<|im_end|>"}\n\n'
    )
    weight_map = {}
    for i in range(files):
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        content = {k: tensors[k] for k in sorted(tensors)[i::files]}
        save_file(content, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def there_and_back(folder: Path, work: Path) -> tuple[Path, Path]:
    run, back = work / "run", work / "back"
    convert.main(["--to=orbax", str(folder), str(run)])
    convert.main(["--to=hf", str(run), str(back)])
    return run, back


@functools.lru_cache
def model_of(folder: Path) -> Decoder:
    return Decoder(load_config(folder))


def like(folder: Path, dtype="float32"):
    model = model_of(folder)
    return abstract_params(model, param_shardings(make_mesh(fsdp=4, data=2), model.shapes()), dtype)


def converts(dtype: str) -> bool:
    """Whether XLA casts from this dtype: with SSE4.2 alone it has no code for float16."""
    try:
        return bool(jnp.ones((), dtype).astype(jnp.float32) == 1)
    except jax.errors.JaxRuntimeError:
        return False


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_keeps_every_bit_and_file(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_table, "PIECE_BYTES", 20_000)  # several pieces even here
    config, dtype = MODELS[name]
    folder = write(tmp_path / "in", config, dtype)
    run, back = there_and_back(folder, tmp_path)
    before = tensors_of(folder)
    assert_same_bits(before, tensors_of(back))
    assert ("lm_head.weight" in tensors_of(back)) == (not config["tie_word_embeddings"])
    kept = {f.name for f in folder.iterdir() if not f.name.startswith("model")}
    assert {f.name for f in back.iterdir()} == kept | {"model.safetensors", "SHA256SUMS"}
    for file in kept:
        assert (back / file).read_bytes() == (folder / file).read_bytes(), file
    with safe_open(back / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    if not converts(dtype):
        return
    # Whoever restores casts, shard by shard, and gets what the folder itself would have given.
    found = restore_params(run, like(folder))
    jax.tree.map(np.testing.assert_array_equal, found, load_hf(folder)[1])
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float32")}


def test_no_direction_reads_more_than_a_layer_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_table, "PIECE_BYTES", 1)
    folder = write(tmp_path / "in", cases.CASES["qwen3_untied_yarn"], "bfloat16")
    read = []
    for kind in (hf_table.HFArray, OrbaxArray):

        def spy(self, *args, _read=kind.read, **kwargs):
            block = _read(self, *args, **kwargs)
            read.append((type(self).__name__, block.nbytes))
            return block

        monkeypatch.setattr(kind, "read", spy)
    there_and_back(folder, tmp_path)
    largest = max(x.nbytes for n, x in tensors_of(folder).items() if ".layers." in n)
    total = sum(x.nbytes for x in tensors_of(folder).values())
    for kind in ("HFArray", "OrbaxArray"):
        sizes = [size for name, size in read if name == kind]
        assert max(sizes) == largest
        assert sum(sizes) == total  # everything once


def test_layers_of_different_dtypes_keep_their_values(tmp_path):
    folder = write(tmp_path / "in", cases.CASES["qwen2"], "bfloat16", files=1)
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    wide = {n: x.astype(np.float32) for n, x in tensors.items() if n.endswith("norm.weight")}
    one = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | wide | {one: tensors[one].astype(np.float32)}, file)
    _, back = there_and_back(folder, tmp_path)
    found = tensors_of(back)
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), value.astype(np.float32))
    assert found["model.norm.weight"].dtype == np.float32
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == np.float32  # as its neighbour
    assert found["model.layers.0.mlp.gate_proj.weight"].dtype == BF16
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3_tied"])
def test_the_export_in_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    config, _ = MODELS[name]
    folder = write(tmp_path / "in", config, "float32")
    _, back = there_and_back(folder, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 12))
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(f)(torch.tensor(tokens)).logits.numpy()
            for f in (back, folder)
        )
    np.testing.assert_array_equal(ours, theirs)
    model, params = load_hf(back)
    hidden = model.apply(params, tokens, np.broadcast_to(np.arange(12), (2, 12)), np.ones((2, 12)))
    assert np.abs(np.asarray(model.logits(params, hidden)) - theirs).max() <= 1e-4
    assert AutoTokenizer.from_pretrained(back).eos_token == "<|im_end|>"
    assert GenerationConfig.from_pretrained(back).top_k == 7


def test_a_chosen_dtype_is_said_in_the_config(tmp_path):
    folder = write(tmp_path / "in", cases.CASES["qwen3_tied"], "bfloat16")
    run, _ = there_and_back(folder, tmp_path)
    convert.main(["--to=hf", str(run), str(tmp_path / "wide"), "--dtype=float32"])
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    assert {x.dtype for x in tensors_of(tmp_path / "wide").values()} == {np.dtype("float32")}


def test_the_exports_of_a_trained_run(tmp_path):
    """Weights trained in float32, saved by a mesh: exported as they are, the config told so."""
    folder = write(tmp_path / "in", cases.CASES["qwen2"], "bfloat16")
    run, _ = there_and_back(folder, tmp_path)
    shutil.rmtree(run / "checkpoints")
    params = jax.tree.map(lambda x: x + 1e-4, load_hf(folder, make_mesh(fsdp=4, data=2))[1])
    save_params(run, params)
    convert.main(["--to=hf", str(run), str(tmp_path / "trained")])
    found = load_hf(tmp_path / "trained")[1]
    jax.tree.map(np.testing.assert_array_equal, found, params)
    config = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}


@pytest.mark.skipif("KDRL_SMOLLM2" not in os.environ, reason="KDRL_SMOLLM2 names no folder")
def test_smollm2_there_and_back(tmp_path):
    folder = Path(os.environ["KDRL_SMOLLM2"])
    _, back = there_and_back(folder, tmp_path)
    assert_same_bits(tensors_of(folder), tensors_of(back))
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name


# --- bad input ------------------------------------------------------------------------------


def refused(capsys, *argv) -> str:
    """The one line that a refused conversion prints."""
    with pytest.raises(SystemExit) as end:
        run_entry(lambda: convert.main([str(a) for a in argv]))
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run folder, made from a Hugging Face one beside it."""
    work = tmp_path_factory.mktemp("convert")
    with jax.numpy_rank_promotion("raise"):
        folder = write(work / "hf", cases.CASES["qwen2"], "bfloat16")
        convert.main(["--to=orbax", str(folder), str(work / "run")])
    return work / "run"


def without_params(step):
    shutil.rmtree(step / "params")


def half_written(step):
    step.rename(step.with_name("0.orbax-checkpoint-tmp-1"))


def without_manifest(step):
    (step / "params" / "manifest.ocdbt").unlink()


def truncated(step):
    for file in (step / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def of_another_shape(step):
    file = step.parent.parent / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"vocab_size": 640}))


def without_checkpoints(step):
    shutil.rmtree(step.parent)


DAMAGE = [
    (without_params, "holds no params/; give a checkpoint that"),
    (half_written, "holds no whole checkpoint; let the run reach its first save"),
    (without_manifest, "damaged or half written"),
    (truncated, "damaged or half written"),
    (of_another_shape, "has shape [512, 48], config.json asks for [640, 48]"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_a_damaged_run(run, damage, said, tmp_path, capsys):
    bad = tmp_path / "run"
    shutil.copytree(run, bad)
    damage(bad / "checkpoints" / "0")
    model = Decoder(load_config(bad / "model"))
    if damage is of_another_shape:  # tied models have one such line
        config = json.loads((bad / "model" / "config.json").read_text())
        lines = check_weights(bad, model)
        assert not config["tie_word_embeddings"]
        assert [said in line for line in lines] == [True, True]
        return
    line = refused(capsys, "--to=hf", bad, tmp_path / "out")
    assert said in line
    assert str(bad) in line
    assert not (tmp_path / "out").exists()
    assert [f.name for f in tmp_path.iterdir()] == ["run"]
    # The same line before anything is allocated, where the headers show it.
    if damage is not truncated:
        assert line.removeprefix("error: ") in check_weights(bad, model)


def test_a_converted_folder_has_the_checksums_of_a_run(run, tmp_path):
    params = restore_params(run, like(run / "model", "bfloat16"))
    meta = read_meta(run / "checkpoints" / "0")
    assert meta["checksums"] == checksums({"params": params})
    meta["checksums"]["params/final_norm/scale"][2] = "0" * 8
    bad = shutil.copytree(run, tmp_path / "run")
    (bad / "checkpoints" / "0" / META).write_text(json.dumps(seal(meta)))
    for dtype in ("bfloat16", "float32"):
        with pytest.raises(UserError, match="the checksum of params/final_norm/scale differs"):
            restore_params(bad, like(run / "model", dtype))


@pytest.mark.parametrize("piece", [20_000, 2**30])
def test_weights_that_are_not_what_was_saved(run, piece, tmp_path, capsys, monkeypatch):
    """One number differs, in files that can be read: as Orbax alone would take them."""
    monkeypatch.setattr(hf_table, "PIECE_BYTES", piece)
    good, other = tmp_path / "good", tmp_path / "other"
    params = restore_params(run, like(run / "model", "bfloat16"))
    name = "layers/mlp/down_proj/kernel"
    changed = jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[1, 5, 3].add(0.5) if path_name(path) == name else x, params
    )
    for folder, content in ((good, params), (other, changed)):
        shutil.copytree(run / "model", folder / "model")
        save_params(folder, content)
    convert.main(["--to=hf", str(good), str(tmp_path / "out")])
    shutil.rmtree(good / "checkpoints/0/params")
    shutil.copytree(other / "checkpoints/0/params", good / "checkpoints/0/params")
    line = refused(capsys, "--to=hf", good, tmp_path / "out2")
    assert f"the checksum of params/{name} differs from what was saved" in line
    assert not (tmp_path / "out2").exists()
    for dtype in ("bfloat16", "float32"):
        with pytest.raises(UserError, match=f"the checksum of params/{name} differs"):
            restore_params(good, like(run / "model", dtype))


def test_a_run_that_is_not_there(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert "no such folder; give a run's folder" in refused(
        capsys, "--to=hf", tmp_path / "nowhere", out
    )
    assert "holds no model/config.json" in refused(capsys, "--to=hf", tmp_path, out)
    said = refused(capsys, "--to=hf", run, out, "--step=3")
    assert "holds no checkpoint 3; there are [0]" in said
    bad = tmp_path / "run"
    shutil.copytree(run, bad)
    shutil.rmtree(bad / "checkpoints")
    assert "holds no checkpoints/ folder" in refused(capsys, "--to=hf", bad, out)
    assert "not an empty folder" in refused(capsys, "--to=hf", run, bad)
    assert not out.exists()


def test_a_folder_that_is_not_a_whole_model(run, tmp_path, capsys):
    out = tmp_path / "out"
    said = refused(capsys, "--to=orbax", tmp_path / "nowhere", out)
    assert "nowhere; give a Hugging Face model folder" in said
    folder = tmp_path / "hf"
    shutil.copytree(run.parent / "hf", folder)
    file = folder / "model-00002-of-00003.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    assert "unreadable" in refused(capsys, "--to=orbax", folder, out)
    file.unlink()
    said = refused(capsys, "--to=orbax", folder, out)
    assert "missing, but listed in model.safetensors.index.json; download it again" in said
    assert said.removeprefix("error: ") in check_weights(folder, Decoder(load_config(folder)))
    file.write_bytes(whole)
    assert check_weights(folder, Decoder(load_config(folder))) == []
    said = refused(capsys, "--to=orbax", folder, out, "--dtype=bfloat16")
    assert "--dtype: goes with --to=hf only" in said
    assert not out.exists()


def test_bad_weights_of_student_and_teacher_are_refused_together(run, tmp_path):
    """In one go, and before anything is allocated: only headers were read."""
    from kdrl_jax.data import load_tokenizer
    from kdrl_jax.training.meshes import make_meshes
    from kdrl_jax.training.roles import check_roles
    from kdrl_jax.training.validation import validate

    student, teacher = tmp_path / "student", tmp_path / "teacher"
    shutil.copytree(run, student)
    without_params(student / "checkpoints" / "0")
    shutil.copytree(run.parent / "hf", teacher)
    (teacher / "model-00001-of-00003.safetensors").unlink()
    changes = [f"student.path={student}", f"teacher.path={teacher}", "student.sft.steps=0"]
    changes += ["teacher.sft.steps=0", "rollout.max_new_tokens=32"]
    root = Path(__file__).parent.parent
    config, problems = read_config(root / "configs" / "demo.py", changes)
    assert not problems
    meshes = make_meshes(config, jax.devices()[:1])
    with pytest.raises(UserError) as error:
        check_roles(config, validate(config), load_tokenizer(teacher), meshes)
    assert len(error.value.problems) == 2
    assert "student/checkpoints/0: holds no params/" in error.value.problems[0]
    assert "model-00001-of-00003.safetensors: missing" in error.value.problems[1]


# --- the files of a run ---------------------------------------------------------------------


def test_a_run_keeps_the_config_that_its_student_came_with(tmp_path):
    from kdrl_jax.data import load_tokenizer
    from kdrl_jax.training.roles import write_model_files

    folder = write(tmp_path / "in", cases.CASES["qwen2"], "bfloat16")
    shape = load_config(folder)
    write_model_files(tmp_path / "run", shape, load_tokenizer(folder), folder)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "run" / "model" / file).read_bytes() == (folder / file).read_bytes()
    # Its checkpoint is a run's too, and a run may be another run's student.
    write_model_files(tmp_path / "next", shape, load_tokenizer(folder), tmp_path / "run")
    kept = (tmp_path / "next" / "model" / "config.json").read_bytes()
    assert kept == (folder / "config.json").read_bytes()


def test_a_run_with_another_tokenizer_ends_texts_as_that_does(tmp_path):
    from kdrl_jax.data import load_tokenizer
    from kdrl_jax.training.roles import write_model_files

    folder = write(tmp_path / "in", cases.CASES["qwen2"], "bfloat16")
    tokenizer_cases.write_hf(tmp_path / "other", template=None)
    tokenizer = load_tokenizer(tmp_path / "other")
    assert tokenizer.stop_ids == (0,)  # config.json says 2
    write_model_files(tmp_path / "run", load_config(folder), tokenizer, folder)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["eos_token_id"] == [0]
    assert config["_note"] == "kept"
    assert load_tokenizer(tmp_path / "run" / "model").stop_ids == (0,)
