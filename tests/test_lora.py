"""Adapters beside frozen weights: against PEFT in torch, in training, on meshes, in files."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import model_cases as cases
import numpy as np
import optax
import pytest
import test_train
from local_server import LocalServer
from safetensors.numpy import load_file
from test_memory import HIGH, LOW, bytes_of, config_of, lowered_update, planner_of, shape

from kdrl_jax import convert
from kdrl_jax.config import load_config
from kdrl_jax.evaluation.model import load_policy
from kdrl_jax.models import (
    Decoder,
    ModelConfig,
    load_hf,
    merged_leaves,
    save_hf,
    save_peft,
)
from kdrl_jax.models import load_config as load_shape_of
from kdrl_jax.models.hf_peft import peft_tensors
from kdrl_jax.models.lora import TARGETS, LoRA, join, split
from kdrl_jax.objectives import token_log_probs
from kdrl_jax.planning.machines import parse_topology
from kdrl_jax.planning.run_plan import make_run_plan
from kdrl_jax.planning.shapes import device_bytes
from kdrl_jax.rollout import RolloutEngine, ServerEngine, request_keys, sampling_params
from kdrl_jax.rollout.server import KINDS
from kdrl_jax.rollout.transport import Server
from kdrl_jax.sharding import (
    make_mesh,
    param_shardings,
    path_name,
    placed,
    put,
    put_batch,
)
from kdrl_jax.training.adapters import (
    adapter_shapes,
    init_adapters,
    load_weights,
    read_record,
    write_record,
)
from kdrl_jax.training.batch import rollout_rows
from kdrl_jax.training.integrity import CHECKSUMS, read_meta
from kdrl_jax.training.memory import Levers, Planner
from kdrl_jax.training.meshes import Meshes
from kdrl_jax.training.metrics import read_metrics
from kdrl_jax.training.roles import check_shapes, check_weights, decoder_of
from kdrl_jax.training.run_weights import find_params
from kdrl_jax.training.sft import supervised_batch
from kdrl_jax.training.state import abstract_state, init_state, make_optimizer, make_schedule
from kdrl_jax.training.step import make_hyper, make_update
from kdrl_jax.training.validation import validate
from kdrl_jax.types import Prompts, UserError

ROOT = Path(__file__).resolve().parent.parent
ALL = LoRA(4, 6.0, TARGETS)
SOME = LoRA(3, 3.0, ("q_proj", "v_proj", "o_proj", "up_proj"))
ONE = make_mesh(1, 1, 1, devices=jax.devices()[:1])


def adapters_of(model, size=0.1):
    """Adapters that change what the model says."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(model.init_trained, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.float32(size * rng.standard_normal(x.shape)), shapes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models of each family as Hugging Face folders."""
    at = tmp_path_factory.mktemp("models")
    return {name: cases.write_folder(at / name, cases.CASES[name]) for name in FAMILIES}


FAMILIES = ("qwen2", "qwen3_tied", "llama_tied")


def with_adapters(folder, lora, dtype=jnp.float32):
    model, base = load_hf(folder, compute_dtype=dtype)
    model = dataclasses.replace(model, lora=lora)
    return model, base, adapters_of(model)


def rows_of():
    return [jnp.asarray(x) for x in cases.rows()]


# --- the computation -------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "lora"), [("qwen2", ALL), ("qwen3_tied", SOME), ("llama_tied", ALL)]
)
def test_logits_and_gradients_are_those_of_peft(family, lora, folders, tmp_path):
    """Of what `convert --to=peft` writes, beside the same base; and what `--to=hf` writes."""
    torch = pytest.importorskip("torch", reason="torch is not installed (the `parity` extra)")
    peft = pytest.importorskip("peft", reason="peft is not installed (the `parity` extra)")
    import transformers

    model, base, adapters = with_adapters(folders[family], lora)
    save_peft(tmp_path / "peft", model.config, lora, jax.device_get(adapters), "the/base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(folders[family], dtype=torch.float32, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft", is_trainable=True)
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(lora.targets) * model.config.num_layers

    ids = cases.segments()[1]
    logits = theirs(torch.tensor(ids)[None]).logits
    logits.square().mean().backward()
    row = [jnp.asarray(x)[None] for x in (ids, np.arange(len(ids)), np.ones(len(ids), np.int32))]

    def loss(adapters):
        weights = join(base, adapters)
        ours = model.logits(weights, model.apply(weights, *row))
        return jnp.square(ours).mean(), ours

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(adapters)
    np.testing.assert_allclose(ours, logits.detach().numpy(), atol=1e-4)
    found = peft_tensors(model.config, gradients)
    for name, parameter in trained.items():
        mine = found[name.replace(".default", "")]
        np.testing.assert_allclose(mine, parameter.grad.numpy(), atol=2e-4, rtol=1e-3)

    save_hf(tmp_path / "merged", model.base, merged_leaves(model, join(base, adapters)))
    merged = load(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        of_merged = merged(torch.tensor(ids)[None]).logits.numpy()
    np.testing.assert_allclose(of_merged, ours, atol=1e-4)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "the/base"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fresh_adapters_change_no_bit(dtype, folders):
    model, base, _ = with_adapters(folders["qwen3_tied"], ALL, dtype)
    fresh = jax.jit(model.init_trained)(jax.random.key(0))
    for path, x in jax.tree_util.tree_leaves_with_path(fresh):
        fan_in = np.prod(x.shape[1:-1])  # of A; B is zero
        if path[-1].key == "lora_a":
            assert 0.9 < float(jnp.abs(x).max()) * np.sqrt(fan_in) <= 1, "U(±1/sqrt(fan-in))"
        else:
            assert not x.any()
    mine = jax.jit(model.apply)(join(base, fresh), *rows_of())
    np.testing.assert_array_equal(mine, jax.jit(model.base.apply)(base, *rows_of()))


def test_trees_are_split_and_joined(folders):
    model, base, adapters = with_adapters(folders["qwen2"], SOME)
    both = join(base, adapters)
    assert jax.tree.structure(both) == jax.tree.structure(model.shapes())
    apart = split(both)
    assert jax.tree.structure(apart) == jax.tree.structure((adapters, base))
    pairs = zip(jax.tree.leaves(apart), jax.tree.leaves((adapters, base)), strict=True)
    assert all(x is y for x, y in pairs)
    sizes = sum(x.size for x in jax.tree.leaves(adapters))
    assert sizes == SOME.num_params(model.config)


def test_a_merged_kernel_is_rounded_once(folders, tmp_path):
    """Small changes survive where float32 is asked for; in the base's bfloat16 most are lost."""
    model, base, adapters = with_adapters(folders["qwen2"], ALL, jnp.bfloat16)
    base, adapters = model.base.cast(base), jax.tree.map(lambda x: 0.05 * x, adapters)
    down, pair = (x["layers"]["mlp"]["down_proj"] for x in (base, adapters))
    kernel = np.asarray(down["kernel"][2].astype(jnp.float32), np.float64)
    a, b = (np.asarray(pair[name][2], np.float64) for name in ("lora_a", "lora_b"))
    lost = {}
    for dtype in ("float32", "bfloat16"):
        leaves = merged_leaves(model, join(base, adapters))
        save_hf(tmp_path / dtype, model.base, leaves, dtype=jnp.dtype(dtype))
        tensors = load_file(tmp_path / dtype / "model.safetensors")
        change = tensors["model.layers.2.mlp.down_proj.weight"].astype(np.float64).T - kernel
        lost[dtype] = (change == 0).mean()
        if dtype == "float32":
            np.testing.assert_allclose(change, ALL.scale * a @ b, atol=1e-6)
    assert lost["float32"] < 0.01
    assert lost["bfloat16"] > 0.5


def test_no_frozen_weight_has_a_gradient(folders):
    """No product of the backward pass has a kernel's shape; with all weights trained some have."""
    model, base, adapters = with_adapters(folders["qwen2"], ALL)
    c = model.config
    d, f, q = c.hidden_size, c.mlp_size, c.num_heads * c.head_dim
    of_kernels = {(d, f), (f, d), (d, q), (q, d), (d, q // 2), (q // 2, d)}
    of_kernels |= {(c.vocab_size, d), (d, c.vocab_size)}

    def products(loss, *args):
        text = jax.jit(jax.grad(loss)).lower(*args).as_text()
        shapes = re.findall(r"stablehlo\.dot_general.*-> tensor<([\dx]+)xf32>", text)
        assert shapes
        return {tuple(map(int, shape.split("x"))) for shape in shapes} & of_kernels

    def loss(adapters, base):
        return jnp.square(model.apply(join(base, adapters), *rows_of())).sum()

    def of_all(base):
        return jnp.square(model.base.apply(base, *rows_of())).sum()

    assert not products(loss, adapters, base)
    assert {(d, f), (f, d)} & products(of_all, base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_draws_is_what_is_trained(dtype, folders):
    """On a mesh: merged weights in float32, adapters beside them in bfloat16."""
    model, base, adapters = with_adapters(folders["qwen2"], SOME, jnp.dtype(dtype))
    base = jax.jit(model.base.cast)(base)
    params, prompts, length = join(base, adapters), 4, 8
    layer = jax.eval_shape(model.unstack, params).layers[0]
    beside = [getattr(layer, f"{name}_lora") for name in ("qkv", "out", "gate_up", "down")]
    assert [x is not None for x in beside] == [dtype == "bfloat16"] * 3 + [False]
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    engine = RolloutEngine(
        model, valid_vocab=60, prompt_buckets=(8,), max_new_tokens=length, mesh=mesh
    )
    tokens = np.random.default_rng(0).integers(2, 60, (prompts, 8)).astype(np.int32)
    out = engine.generate(
        put(params, param_shardings(mesh, params)),
        Prompts(tokens, np.full(prompts, 8, np.int32)),
        request_keys(0, 0, range(prompts), 2),
        sampling_params((prompts, 2), (1,), max_new_tokens=length, temperature=1.0),
    )
    drawn = np.arange(length) < out.lengths[..., None]
    difference = np.abs(out.log_probs - trainer_log_probs(model, params, out))[drawn]
    assert difference.max() < (1e-4 if dtype == "float32" else 0.1)
    of_base = np.abs(out.log_probs - trainer_log_probs(model.base, base, out))[drawn]
    assert of_base.mean() > 10 * difference.mean()


def trainer_log_probs(model, params, out):
    """[P, G, T] by the full forward pass that training uses."""
    rows, length = rollout_rows(out), out.tokens.shape[-1]

    @jax.jit
    def found(params):
        states = model.apply(params, *rows[:3])[:, -length - 1 : -1]
        targets = rows.tokens[:, -length:]
        head = {"temperature": 1.0, "valid_vocab": 60}
        return token_log_probs(states, model.head(params), targets, **head)[0]

    return np.asarray(found(params)).reshape(out.log_probs.shape)


def test_a_server_is_given_merged_weights(folders, tmp_path):
    model, base, adapters = with_adapters(folders["llama_tied"], SOME)
    with LocalServer(folders["llama_tied"]) as server:
        made = ServerEngine(
            Server(server.url, timeout_s=60.0, concurrency=4, wait_s=0.01, key=server.key),
            KINDS["vllm"]("student"),
            model,
            weights=tmp_path / "weights",
            tokenizer_folder=None,
            stop_ids=(1,),
            valid_vocab=60,
            prompt_buckets=(8,),
            max_new_tokens=6,
        )
        tokens = np.random.default_rng(0).integers(2, 60, (2, 8)).astype(np.int32)
        asked = (
            Prompts(tokens, np.full(2, 8, np.int32)),
            request_keys(0, 0, range(2), 2),
            sampling_params((2, 2), (1,), max_new_tokens=6, temperature=1.0),
        )
        other = jax.tree.map(lambda x: 1.5 * x, adapters)
        for trained in (adapters, adapters, other):  # the base is the same array throughout
            params = join(base, trained)
            out = made.generate(params, *asked)
            drawn = np.arange(6) < out.lengths[..., None]
            expected = np.where(drawn, trainer_log_probs(model, params, out), 0)
            np.testing.assert_allclose(out.log_probs, expected, atol=1e-4)
        assert len(server.loads) == 2


# --- updates ---------------------------------------------------------------------------------

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_positions": 64}
SMALL = ModelConfig(vocab_size=32, hidden_size=16, num_layers=2, mlp_size=24, **SHAPE)
STUDENT = Decoder(SMALL, "float32", "full", LoRA(2, 4.0, TARGETS))


def supervised(mesh, rows=8):
    rng = np.random.default_rng(1)
    prompts, completions = (rng.integers(2, 30, (rows, n)).astype(np.int32) for n in (4, 12))
    lengths = np.full(rows, 4, np.int32), np.full(rows, 12, np.int32)
    return supervised_batch(*put_batch(mesh, (prompts, lengths[0], completions, lengths[1])))


def updates(mesh, optimizer, count, micro_batches=2):
    """The state after some updates on one batch, and −mean log π before each."""
    base = STUDENT.base.init(jax.random.key(0))
    base = put(base, param_shardings(mesh, base))
    state = init_state(init_adapters(STUDENT, jax.random.key(1), mesh), optimizer, mesh)
    head = {"valid_vocab": 30, "chunk": 16}
    update = make_update(STUDENT, optimizer, mesh, micro_batches=micro_batches, **head)
    batch, hyper, found = supervised(mesh), make_hyper(mesh, beta=0.0, temperature=1.0), []
    for _ in range(count):
        state, metrics = update(state, batch, hyper, base=base)
        found.append(-float(metrics["log_probs/mean"]))
    return state, found


@pytest.fixture(scope="module")
def learnt():
    with jax.numpy_rank_promotion("raise"):
        return updates(ONE, optax.adam(3e-2), 12)


def test_adapters_learn(learnt):
    state, losses = learnt
    assert losses[-1] < losses[0] - 0.5
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    assert {name.split("/")[-1] for name in names} == {"lora_a", "lora_b"}


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 2, 2, 2)], ids=["data", "context"])
def test_a_mesh_changes_nothing(sizes, learnt):
    mesh = make_mesh(*sizes)
    state, losses = updates(mesh, optax.adam(3e-2), 3)
    np.testing.assert_allclose(losses, learnt[1][:3], atol=2e-5)
    a = state.params["layers"]["attn"]["q_proj"]["lora_a"]
    assert a.sharding.spec[1] == "fsdp"
    moments = state.opt_state[0].mu["layers"]["attn"]["q_proj"]["lora_a"]
    whole = moments.size / np.prod(sizes[:2] + sizes[3:])
    assert moments.addressable_shards[0].data.size == whole, "moments are split over data too"


# --- memory and plans ------------------------------------------------------------------------


def planned(mesh, config, model):
    sizes = validate(config)
    both = {"student": model, "teacher": model}
    return Planner(config, sizes, both, Meshes(mesh, mesh, mesh), False).plan(Levers.of(config))


def test_memory_of_adapters_is_what_arrays_take():
    changes = {"student.lora.rank": 8, "student.dtype": "bfloat16", "student.sft.steps": 1}
    config = config_of(**changes)
    model, mesh = shape(), make_mesh(2, 2, 2)
    student = decoder_of(config.student, model, validate(config).lora)
    optimizer = make_optimizer(
        make_schedule(1e-3, 0, "constant", 9),
        **{"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0},
    )
    state = abstract_state(student, optimizer, mesh)
    cast = jax.eval_shape(student.base.cast, student.base.shapes())
    base = placed(cast, param_shardings(mesh, cast))
    parts = planned(mesh, config, model).phases["update"]
    weights = device_bytes(state.params) + device_bytes(base)
    assert parts["weights"] == pytest.approx(weights, rel=0.01)
    assert parts["moments"] == pytest.approx(device_bytes(state.opt_state), rel=0.01)
    config.student.lora.rank = 0
    whole = planned(mesh, config, model).phases["update"]
    assert parts["moments"] < whole["moments"] / 10
    assert parts["gradients"] < whole["gradients"] / 10


def test_an_update_of_adapters_beside_xla():
    """Its largest part is gone: neither the layers' gradients nor the head's is in the program."""
    changes = {"student.lora.rank": 8, "student.remat": "full", "student.sft.steps": 1}
    config, model = config_of(**changes), shape(151_936)
    lora = validate(config).lora
    found = bytes_of(lowered_update(config, model, ONE, lora))
    parts = planner_of(config, model).plan(Levers.of(config)).phases["update"]
    ratio = (sum(parts.values()) - parts["teacher"]) / found
    assert LOW < ratio < HIGH, f"estimate / XLA = {ratio:.2f}"


def test_a_7b_student_fits_one_gpu_of_80_gb():
    machine = parse_topology("h100:1")
    config = load_config(f"{ROOT / 'configs' / 'stage2.py'}:lora_7b")
    assert make_run_plan(config, machine, ()).fits
    config.student.lora.rank = 0
    assert not make_run_plan(config, machine, ()).fits


# --- whole runs ------------------------------------------------------------------------------

CHANGES = {
    "steps": 4,
    "student.lora.rank": 2,
    "student.lora.targets": "('all-linear',)",
    "reference_coef": 1e-3,
    "optimizer.learning_rate": 3e-2,
    "optimizer.warmup_steps": 0,
    "eval.every": 4,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run from beginning to end."""
    with jax.numpy_rank_promotion("raise"):
        workdir = tmp_path_factory.mktemp("whole") / "run"
        test_train.run(workdir, cache, **CHANGES)
    return workdir


def test_a_run_keeps_adapters_alone(whole, cache):
    rows = read_metrics(whole / "metrics.jsonl")
    for row in rows[1:]:
        assert abs(row["mismatch/kl"]) < 1e-4
        assert row["params/update_norm"] > 0
    assert rows[1]["kl/reference"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl/reference"] > 1e-5
    record = read_record(whole)
    assert record.base.folder.parent == cache
    shape = load_shape_of(whole / "model")
    _, stored = find_params(whole, adapter_shapes(Decoder(shape, lora=record.lora)))
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(stored)]
    assert {name.split("/")[-1] for name in names} == {"lora_a", "lora_b"}


def test_a_resumed_run_is_an_uninterrupted_one(whole, cache, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert test_train.run(tmp_path / "run", cache, **CHANGES) == test_train.rows(whole)
    ends = [read_meta(run / "checkpoints" / "4") for run in (whole, tmp_path / "run")]
    assert ends[0][CHECKSUMS] == ends[1][CHECKSUMS]


def logits_of(model, params, row):
    return jax.jit(lambda params: model.logits(params, model.apply(params, *row)))(params)


def test_every_reader_finds_base_and_adapters(whole, tmp_path):
    """Evaluation, export, PEFT's folder, and the run as another's student or teacher."""
    model, params, tokenizer = load_policy(whole, ONE, "float32")
    ids = tokenizer.encode("1+2=")
    row = [jnp.asarray(x)[None] for x in (ids, np.arange(len(ids)), np.ones(len(ids), np.int32))]
    expected, bare = logits_of(model, params, row), split(params)[1]
    of_base = logits_of(model.base, bare, row)
    assert float(jnp.abs(of_base - expected).max()) > 0.01, "the run has learnt something"

    convert.main(["--to=hf", str(whole), str(tmp_path / "merged")])
    merged, weights = load_hf(tmp_path / "merged")
    np.testing.assert_allclose(logits_of(merged, weights, row), expected, atol=1e-4)
    assert check_weights(whole, model.base) == []
    weights = load_weights(whole, model.base, make_mesh(1, 8, 1), jnp.float32)
    np.testing.assert_allclose(logits_of(model.base, weights, row), expected, atol=1e-4)

    convert.main(["--to=peft", str(whole / "checkpoints" / "4"), str(tmp_path / "peft")])
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    a = split(params)[0]["layers"]["attn"]["o_proj"]["lora_a"][1]
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], np.asarray(a).reshape(-1, 2).T)
    with pytest.raises(UserError, match="trained all weights"):
        convert.main(["--to=peft", str(read_record(whole).base.folder), str(tmp_path / "none")])


def test_another_base_is_refused(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    record = read_record(run)
    moved = shutil.copytree(record.base.folder, tmp_path / "moved")
    write_record(run, record.lora, dataclasses.replace(record.base, folder=moved))
    load_policy(run, ONE, "float32")  # a copy will do
    write_record(run, record.lora, dataclasses.replace(record.base, folder=whole, step=2))
    with pytest.raises(UserError, match=r"base\.json: .*have changed.*\"folder\""):
        load_policy(run, ONE, "float32")
    gone = tmp_path / "gone"
    write_record(run, record.lora, dataclasses.replace(record.base, folder=gone))
    with pytest.raises(UserError, match=r"base\.json: .*no longer there.*\"folder\""):
        convert.main(["--to=hf", str(run), str(tmp_path / "merged")])
    [line] = check_weights(run, Decoder(load_shape_of(run / "model")))
    assert "no longer there" in line


def test_a_run_on_another_base_does_not_go_on(whole, cache, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    record = read_record(run)
    write_record(run, record.lora, dataclasses.replace(record.base, digest="another"))
    with pytest.raises(UserError, match="trained on other weights"):
        test_train.run(run, cache, **CHANGES | {"steps": 5})


def test_an_attempt_without_a_checkpoint_leaves_nothing_behind(whole, cache, tmp_path):
    """What its folder says of adapters does not outlive it: the next attempt trains all weights."""
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    record = read_record(whole)
    write_record(run, record.lora, dataclasses.replace(record.base, folder=tmp_path / "gone"))
    test_train.run(run, cache, **CHANGES | {"steps": 2, "student.lora.rank": 0})
    assert read_record(run) is None
    load_policy(run, ONE, "float32")


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": "('q_prj',)"}, r"student.lora.targets: 'q_prj' .* nearest is 'q_proj'"),
        ({"targets": "()"}, r"student.lora.targets: empty"),
        ({"rank": -1}, r"student.lora.rank: -1 must not be negative"),
        ({"alpha": 0.0}, r"student.lora.alpha: 0.0 must be positive"),
    ],
)
def test_bad_keys_are_refused(changes, said):
    changes = {"rank": 4} | changes
    config = config_of(**{f"student.lora.{key}": value for key, value in changes.items()})
    with pytest.raises(UserError, match=said):
        validate(config, sources=False)


def test_what_nothing_can_be_added_to_is_refused():
    config = config_of(**{"student.lora.rank": 4})
    with pytest.raises(UserError, match=r"student\.lora\.rank: .*random weights"):
        validate(config)
    config.student.shape.update(num_kv_heads=1, head_dim=8)
    config.student.lora.rank, config.student.shape.vocab_size = 9, 64
    config.teacher.shape.vocab_size = 64
    mesh = ONE
    sizes = validate(config, sources=False)
    with pytest.raises(UserError, match=r"student\.lora\.rank: 9 exceeds .* k_proj, 8"):
        check_shapes(config, sizes, 60, Meshes(mesh, mesh, mesh))
