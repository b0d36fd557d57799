"""Plans for machines that are not at hand: the command, its programs, what it reads off them."""

from __future__ import annotations

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax import plan
from kdrl_jax.config import ROOT, apply_overrides, load_config
from kdrl_jax.planning import run_plan
from kdrl_jax.planning.compiled import Compiled, _too_large
from kdrl_jax.planning.hlo import Module, group_size, shape_bytes
from kdrl_jax.planning.machines import CHIPS, devices_of, parse_topology
from kdrl_jax.planning.outline import OutlineEngine
from kdrl_jax.planning.programs import lowered_programs
from kdrl_jax.planning.run_plan import make_run_plan
from kdrl_jax.planning.table import text_of
from kdrl_jax.rollout import RolloutEngine, request_keys, sampling_params
from kdrl_jax.sharding import make_mesh, put_batch
from kdrl_jax.training.adapters import init_adapters
from kdrl_jax.training.learner import Learner, Weights
from kdrl_jax.training.memory import GIB
from kdrl_jax.training.meshes import Meshes, make_meshes
from kdrl_jax.training.performance import peak_of
from kdrl_jax.training.roles import check_shapes, decoder_of, model_config
from kdrl_jax.training.scoring import Scorer
from kdrl_jax.training.state import init_params, init_state, optimizer_of
from kdrl_jax.training.step import Update
from kdrl_jax.training.validation import validate
from kdrl_jax.types import Prompts, Rollouts, UserError

STAGE2 = f"--config={ROOT}/configs/stage2.py"


# --- machines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "chips"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v5p-32", "v5p:2x2x4", 16),  # v4 and v5p count cores, two a chip
        ("v5p-128", "v5p:4x4x4", 64),
        ("v4-64", "v4:2x4x4", 32),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v6e-64", "v6e:8x8", 64),
        ("V6E:2x4", "v6e:2x4", 8),
        ("h100:8", "h100:8", 8),
        ("a100-80:16", "a100-80:16", 16),
    ],
)
def test_topologies(text, name, chips):
    machine = parse_topology(text)
    assert (machine.name, machine.count) == (name, chips)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("v7e:4x4", "v6e|v5e"),
        ("v5p-33", r"v5p-32 \(v5p:2x2x4\)"),
        ("v5e-100", r"v5e-128 \(v5e:8x16\)"),
        ("v5p:4x4", "3 sides.*v5p:2x2x4"),
        ("h101:8", "h100:8"),
        ("h100:0", "h100:8"),
        ("h100:2x4", "h100:8"),
        ("v5p", "v5p:2x2x4"),
        ("v5e:0x2", "v5e:"),
    ],
)
def test_unknown_topologies_name_the_nearest(text, nearest):
    with pytest.raises(UserError, match=rf"^--topology: '{re.escape(text)}'.*({nearest})"):
        parse_topology(text)


def test_every_chip_has_a_data_sheet_and_a_cpu_no_gpu(monkeypatch):
    assert all(peak_of(chip.kind) for chip in CHIPS.values())
    devices, why = devices_of(parse_topology("h100:1"))
    assert devices is None
    assert "needs 1 x NVIDIA H100" in why
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert parse_topology("a100-40:1").limit == 20 * GIB


# --- published shapes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights"),
    [  # of the models' safetensors on the hub
        ("R1_DISTILL_QWEN_1_5B", 1_777_088_000),
        ("R1_DISTILL_QWEN_7B", 7_615_616_512),
        ("QWEN25_3B", 3_085_938_688),
        ("QWEN25_7B", 7_615_616_512),
        ("QWEN25_32B", 32_763_876_352),
        ("QWEN3_0_6B", 596_049_920),
        ("QWEN3_8B", 8_190_735_360),
    ],
)
def test_published_shapes_have_the_published_number_of_weights(name, weights):
    from configs import shapes

    config = load_config(ROOT / "configs" / "base.py")
    config.student.shape.update(getattr(shapes, name))
    assert model_config(config.student, ids=0, window=64).num_params == weights


def test_a_shape_says_its_vocabulary():
    config = load_config(ROOT / "configs" / "demo.py")
    assert model_config(config.student, ids=65, window=64).vocab_size == 128
    config.student.shape.update(vocab_size=100, tie_embeddings=False)
    shape = model_config(config.student, ids=65, window=64)
    assert (shape.vocab_size, shape.tie_embeddings) == (100, False)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with pytest.raises(UserError, match=r"student.shape.vocab_size: has 100 .* 101 ids"):
        check_shapes(config, validate(config), 101, Meshes(mesh, mesh, mesh))
    with pytest.raises(UserError, match=r"teacher.shape.vocab_size: -1 must not be negative"):
        validate(apply_overrides(config, ["teacher.shape.vocab_size=-1"]))


def test_a_plan_needs_no_sources_and_a_run_does():
    none = {"student.path": "", "teacher.path": "", "data.eval_path": ""}
    config = load_config(ROOT / "configs" / "stage2.py", none)
    assert validate(config, sources=False).rollouts == 1024
    with pytest.raises(UserError) as error:
        validate(config)
    named = {line.partition(":")[0] for line in error.value.problems}
    assert {"student.path", "teacher.path", "data.eval_path"} <= named
    with pytest.raises(UserError, match="micro_batch: 60 does not divide"):
        validate(apply_overrides(config, ["micro_batch=60"]), sources=False)


# --- what a compiled program says of itself ----------------------------------------------------


def test_collectives_against_hand_counts():
    """Of a program whose every collective is written out, on 8 devices, 5 turns of a loop."""
    mesh = make_mesh(1, 8, 1)

    def turn(_, x):  # on each device [8, 16]
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)  # [64, 16]
        part = jax.lax.psum_scatter(whole, "fsdp", tiled=True)  # [8, 16]
        total = jax.lax.psum(part, "fsdp")  # [8, 16]
        other = jax.lax.all_to_all(total, "fsdp", 0, 0, tiled=True)  # [8, 16]
        return jax.lax.ppermute(other, "fsdp", [(i, (i + 1) % 8) for i in range(8)])

    def loop(count, x):
        return jax.lax.fori_loop(0, count, turn, x)

    spec = jax.P("fsdp")
    shape = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=jax.NamedSharding(mesh, spec))

    def text(f, *args):
        mapped = jax.shard_map(
            f, mesh=mesh, in_specs=(*(jax.P(),) * len(args), spec), out_specs=spec, check_vma=False
        )
        return jax.jit(mapped).lower(*args, shape).compile().as_text()

    array = 8 * 16 * 4
    expected = {
        "all-gather": 7 * array,
        "reduce-scatter": 7 * array,
        "all-reduce": 2 * array * 7 / 8,
        "all-to-all": array * 7 / 8,
        "collective-permute": array,
    }
    known = Module(text(lambda x: loop(5, x))).account
    assert known.unknown_loops == 0
    assert {k: (m.count, m.size) for k, m in known.moved.items()} == {
        k: (5, 5 * size) for k, size in expected.items()
    }
    # A bound that is an argument: `turns` says it.
    count = jax.ShapeDtypeStruct((), jnp.int32)
    told = Module(text(loop, count), turns=3).account
    assert {k: m.size for k, m in told.moved.items()} == {k: 3 * s for k, s in expected.items()}


TPU_TEXT = """HloModule jit_f, is_scheduled=true

%fused_scatter (p: f32[64,8]) -> f32[4,8] {
  %p = f32[64,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,8]{1,0:T(8,128)} all-reduce(%p), replica_groups=[1,16]<=[16], to_apply=%add
  ROOT %cut = f32[4,8]{1,0} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={4,8}
}

%cond (s: (u32[], bf16[4,8])) -> pred[] {
  %nine = u32[]{:T(128)} constant(9)
  %s = (u32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %at = u32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %nine), direction=LT
}

%body (s: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %two = u32[]{:T(128)} constant(2)
  %s = (u32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %at = u32[]{:T(128)} get-tuple-element(%s), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%s), index=1
  %next = u32[]{:T(128)} add(%at, %two)
  %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0:S(1)}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0}}
  %y = bf16[4,8]{1,0} collective-permute-done(%start)
  %work = bf16[4,8]{1,0} fusion(%y), kind=kLoop, calls=%inner, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %out = (u32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%next, %work)
}

ENTRY %main (a: bf16[4,8], b: f32[64,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[64,8]{1,0} parameter(1)
  %one = u32[] constant(1)
  %one.copy = u32[] copy(%one)
  %init = (u32[], bf16[4,8]{1,0}) tuple(%one.copy, %a)
  %loop = (u32[], bf16[4,8]{1,0}) while(%init), condition=%cond, body=%body
  %all-reduce-scatter.1 = f32[4,8]{1,0} fusion(%b), kind=kCustom, calls=%fused_scatter, \
backend_config={"window_config":{"estimated_cycles":"7"}}
  %gather = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%a), \
replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0'}, dimensions={0}
  ROOT %r = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_what_tpu_programs_write():
    """Counters with steps, beginnings apart from ends, reduce-scatter as a fusion, cycles."""
    account = Module(TPU_TEXT).account
    turns = 4  # 1, 3, 5, 7 below 9
    assert account.unknown_loops == 0
    assert account.cycles == turns * 100 + 7
    sizes = {kind: (moved.count, moved.size) for kind, moved in account.moved.items()}
    assert sizes == {
        "collective-permute": (turns, turns * 64),
        "reduce-scatter": (1, 64 * 8 * 4 * 15 / 16),
        "all-gather": (1, 64 * 3 / 4),
    }
    unknown = Module(TPU_TEXT.replace("direction=LT", "direction=NE"), turns=2).account
    assert unknown.cycles == 2 * 100 + 7


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x=1", 8),
        ("channel_id=1", 1),
    ],
)
def test_groups_of_devices(text, size):
    assert group_size(text) == size


def test_sizes_of_shapes():
    assert shape_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4], pred[5], s4[8], u32[])") == 24 + 8 + 9 + 4


def test_refusals_of_the_compiler():
    told = "Ran out of memory in memory space hbm. Used 40.1G of 31.25G hbm. Exceeded by 8.8G"
    assert _too_large(told) == (40.1 * GIB, 31.25 * GIB)
    told = "the total memory required for HLO temporaries (512.0M) exceeds available HBM (15.75G)."
    assert _too_large(told) == (GIB / 2, 15.75 * GIB)
    assert _too_large("something else") is None


# --- the programs are those that training runs -------------------------------------------------


def tiny(**changes):
    """A run of 2 problems x 4 rollouts, that this machine could make."""
    settings = {
        "student.shape.vocab_size": 64,
        "teacher.shape.vocab_size": 64,
        "data.task": "arithmetic",
        "data.prompt_buckets": "(8,)",
        "data.max_prompt_tokens": 8,
        "rollout.prompts_per_step": 2,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 8,
        "micro_batch": 4,
        "student.dtype": "float32",
        "teacher.dtype": "float32",
        "eval.every": 0,
        "student.shape.num_layers": 1,
        "teacher.shape.num_layers": 1,
        "mesh.fsdp": 2,
        "mesh.data": 2,
        "teacher_mesh.fsdp": 4,
        "teacher_mesh.data": 1,
        **changes,
    }
    demo = load_config(ROOT / "configs" / "demo.py")
    return apply_overrides(demo, [f"{key}={value}" for key, value in settings.items()])


def bare(lowered) -> str:
    """A program without names of arguments and places in files."""
    return re.sub(r" loc\(.*?\)|#loc.*|module @\S+", "", lowered.as_text())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch": 8},  # padded rows
        {"kd_estimator": "topk", "kd_topk.k": 3, "mini_batches": 2},  # old student and support
        {"kd_estimator": "full", "reference_coef": 0.1},
        {"teacher.dtype": "int8"},
        {"student.lora.rank": 2, "reference_coef": 0.1, "mini_batches": 2},
    ],
    ids=["packed", "padded", "topk", "full", "int8", "lora"],
)
def test_programs_are_those_of_a_step(changes, monkeypatch, rng):
    config = tiny(**changes)
    sizes, ids = validate(config, sources=False), 60
    devices = jax.devices()[:4]
    meshes = make_meshes(config, devices)
    mesh, teacher_mesh = meshes.student, meshes.teacher
    shapes = check_shapes(config, sizes, ids, meshes)
    job = (config, sizes, shapes, meshes)
    planned = {
        p.name: p.lower() for p in lowered_programs(*job, ids) if p.phase in ("score", "update")
    }
    run: dict[str, jax.stages.Lowered] = {}

    def spy_update(self, *args, **kwargs):
        run["update"] = self.lower(*args, **kwargs)
        return call(self, *args, **kwargs)

    def spy_score(self, score, params, *args, **kwargs):
        def noting(*args, **kwargs):
            name = "score teacher" if self.model is teacher.model else "score old student"
            name = "score reference" if params is reference.params else name
            run[name] = score.lower(*args, **kwargs)
            return score(*args, **kwargs)

        return scored(self, noting, params, *args, **kwargs)

    call, scored = Update.__call__, Scorer._run
    monkeypatch.setattr(Update, "__call__", spy_update)
    monkeypatch.setattr(Scorer, "_run", spy_score)
    student = decoder_of(config.student, shapes["student"], sizes.lora)
    optimizer = optimizer_of(config.optimizer, config.steps * sizes.updates)
    params = init_params(student.base, jax.random.key(0), mesh)
    model = decoder_of(config.teacher, shapes["teacher"])
    frozen = init_params(model, jax.random.key(1), teacher_mesh)
    if config.teacher.dtype == "int8":
        from kdrl_jax.models import quantize

        frozen = quantize(jax.tree.map(lambda x: x.astype("bfloat16"), frozen))
    teacher = Weights(model, frozen, teacher_mesh)
    reference = Weights(student.base, student.cast(params), mesh)
    base = reference.params if student.lora else None
    trained = init_adapters(student, jax.random.key(2), mesh) if student.lora else params
    state = init_state(trained, optimizer, mesh)
    learner = Learner(
        config,
        sizes,
        student,
        optimizer,
        mesh,
        teacher=teacher,
        reference=reference if config.reference_coef else None,
        base=base,
        valid_vocab=ids,
        mask_final_eos=False,
    )
    p, g, t, s = 2, 4, 8, 8
    host = Rollouts(
        prompt_tokens=rng.integers(0, ids, (p, s)).astype(np.int32),
        prompt_lengths=np.array([5, 8], np.int32),
        tokens=rng.integers(0, ids, (p, g, t)).astype(np.int32),
        log_probs=rng.normal(size=(p, g, t)).astype(np.float32),
        lengths=rng.integers(1, t + 1, (p, g)).astype(np.int32),
        finish_reason=np.zeros((p, g), np.int32),
    )
    placed = put_batch(mesh, host)
    rows, hyper = learner.rows(host, placed), learner.hyper(0, None)
    scores = learner.score(state.params, rows, 1.0, hyper.temperature)
    learner.learn(state, rows, placed, np.ones((p, g), np.float32), scores, hyper)
    assert planned.keys() == run.keys()
    for name, lowered in run.items():
        assert bare(planned[name]) == bare(lowered), name


def test_programs_are_those_of_a_rollout():
    config, ids = tiny(), 60
    sizes = validate(config, sources=False)
    mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
    shapes = check_shapes(config, sizes, ids, Meshes(mesh, mesh, mesh))
    model = decoder_of(config.student, shapes["student"])
    engine = RolloutEngine(model, valid_vocab=ids, prompt_buckets=(8,), max_new_tokens=8, mesh=mesh)
    params = init_params(model, jax.random.key(0), mesh)
    run: dict[str, jax.stages.Lowered] = {}

    def noting(name, program):
        def call(*args):
            run[name] = program.lower(*args)
            return program(*args)

        return call

    for name in ("_unstack", "_prefill", "_decode"):
        setattr(engine, name, noting(name, getattr(engine, name)))
    engine.generate(
        params,
        Prompts(np.ones((2, 8), np.int32), np.array([4, 8], np.int32)),
        request_keys(0, 0, np.arange(2), 4),
        sampling_params((2, 4), (1, 2), max_new_tokens=8, temperature=1.0),
    )
    outline = OutlineEngine(model, mesh, config=config, ids=ids)
    outline.seat(jax.tree.map(abstract, params), 2, 4)
    outline.windows = outline.windows[:1]  # as far as this rollout came
    assert bare(outline.lower_unstack()) == bare(run["_unstack"])
    assert bare(outline.lower_prefill()) == bare(run["_prefill"])
    assert bare(outline.lower_decode()) == bare(run["_decode"])
    whole = 4 * shapes["student"].num_params  # over nothing: mesh.tensor is 1
    assert outline.copy_bytes == pytest.approx(whole, rel=1e-3)


def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


# --- the whole plan ----------------------------------------------------------------------------


def test_a_plan_with_a_compiler(monkeypatch):
    """The devices here stand in for a machine's: every program compiles and is accounted for."""
    machine = parse_topology("h100:8")
    monkeypatch.setattr(run_plan, "devices_of", lambda machine: (jax.devices()[:8], ""))
    config = tiny(**{"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "teacher_mesh.fsdp": 8})
    config.teacher_mesh.tensor = 1
    config = apply_overrides(
        config,
        ["micro_batch=8", "rollout.group_size=8", "student.shape.num_kv_heads=2",
         "student.shape.mlp_size=128"],
    )  # fmt: skip
    found = make_run_plan(config, machine, report=lambda line: None)
    assert found.fits
    assert [*found.compiled] == ["weights", "prefill", "grow", "decode", "score teacher", "update"]
    shapes = model_config(config.student, 63, 16)
    update = found.compiled["update"]
    # Float32 weights and both moments, over fsdp x tensor; norms and biases are on every device.
    assert 3 * 4 * shapes.num_params / 8 < update.arguments < 1.2 * 3 * 4 * shapes.num_params / 8
    assert update.need == update.beside + update.arguments + update.results + update.temporary
    # The weights for decoding are gathered over fsdp, in float32, a quarter being here already.
    gathered = found.compiled["weights"].account.moved["all-gather"].size
    assert gathered == pytest.approx(4 * shapes.num_params / 2 * 3 / 4, rel=0.1)
    assert "all-reduce" in update.account.moved
    assert found.compiled_need("update") == update.need
    assert found.compiled_need("eval") is None
    read = json.loads(json.dumps(found.to_json()))
    assert read["compiled"]["update"]["need"] == update.need
    text = text_of(found)
    for part in ("moments", "KV cache", "score teacher", "all-gather", "by the compiler", "fits"):
        assert part in text
    small = make_run_plan(
        apply_overrides(config, [f"memory_gib={update.need / 2 / GIB}"]),
        machine,
        ("update",),
        report=lambda line: None,
    )
    assert not small.fits
    assert any(line.startswith("update: by the compiler") for line in small.problems)
    assert "update" in small.compiled
    assert "decode" not in small.compiled


def test_what_fails_to_compile_does_not_fit(monkeypatch):
    devices = (jax.devices()[:1], "")
    monkeypatch.setattr(run_plan, "devices_of", lambda machine: devices)
    refused = Compiled("update", "update", beside=1.0, temporary=90.0 * GIB, error="x", limit=GIB)
    broken = Compiled("update", "update", beside=1.0, error="INTERNAL: no")
    config = tiny(**{"mesh.data": 1, "mesh.fsdp": 1, "teacher_mesh.fsdp": 1})
    for made, told in ((refused, "update: by the compiler 90.0 GiB"), (broken, "INTERNAL: no")):
        monkeypatch.setattr(run_plan, "compile_program", lambda program, made=made: made)
        machine = parse_topology("h100:1")
        found = make_run_plan(config, machine, ("update",), report=lambda line: None)
        assert not found.fits
        assert told in "".join(found.problems)
        assert ("too large" if made.limit else "failed") in text_of(found)


@pytest.mark.parametrize("unread", ["all", "update"])
def test_without_the_text_of_a_program(monkeypatch, unread):
    """Memory and costs are the same; what only the text tells is not made up."""
    machine = parse_topology("h100:2")
    monkeypatch.setattr(run_plan, "devices_of", lambda machine: (jax.devices()[:2], ""))
    config = tiny(**{"mesh.data": 1, "mesh.fsdp": 2, "teacher_mesh.fsdp": 2})
    names = ("weights", "update")
    whole = make_run_plan(config, machine, names, report=lambda line: None)
    read, left = jax.stages.Compiled.as_text, [unread == "all", True]
    reason = "INTERNAL: RET_CHECK failure: async-update should have 1 operands but sees 3"

    def as_text(made):
        if left.pop(0):
            raise jax.errors.JaxRuntimeError(f"\n{reason}\n*** a stack ***")
        return read(made)

    monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
    found = make_run_plan(config, machine, names, report=lambda line: None)
    assert not left
    assert found.fits
    for name in names:
        new, old = found.compiled[name], whole.compiled[name]
        assert (new.need, new.arguments, new.temporary) == (old.need, old.arguments, old.temporary)
        assert (new.flops, new.accessed) == (old.flops, old.accessed)
    assert found.compiled["update"].flops > 0
    assert found.compiled["update"].account is None
    assert found.step_seconds("compiler") is None
    without = "weights, update" if unread == "all" else "update"
    (note,) = set(found.notes) - set(whole.notes)
    assert note.startswith(f"{without}: collectives and the compiler's time are not known")
    assert note.endswith(f"({reason})")
    text = text_of(found)
    assert f"note: {note}" in text
    assert "failed" not in text
    if unread == "all":
        assert "Collectives: not known" in text
    else:
        rows = text.partition("Collectives: GB")[2].splitlines()
        assert "?" not in rows[2]
        assert {*rows[3].split()} == {"update", "?"}
    written = json.loads(json.dumps(found.to_json()))["compiled"]["update"]
    assert "collectives" not in written
    assert written["no_text"] == reason


def test_check_says_by_its_exit_whether_a_run_fits(tmp_path, capsys):
    output = tmp_path / "plan.json"
    plan.main([STAGE2, "--topology=v5p-32", "--check", "--compile=none", f"--output={output}"])
    assert capsys.readouterr().out.rstrip().endswith("fits")
    read = json.loads(output.read_text(encoding="utf-8"))
    assert read["fits"]
    assert (read["machine"], read["chips"], read["mesh"]["fsdp"]) == ("v5p:2x2x4", 16, 16)
    assert read["estimate"]["update"]["weights"] == 4 * 1_777_088_000 / 16
    assert read["estimate"]["score"]["teacher"] == 2 * 7_615_616_512 / 16
    # 1024 caches of 28 layers, 2 heads of 128, keys and values of 2 bytes, over 16 chips.
    columns = read["estimate"]["rollout"]["KV cache"] / (64 * 28 * 2 * 128 * 2 * 2)
    assert 21_504 + 32 <= columns <= 1.6 * 21_504  # the larger window, and the next smaller one
    with pytest.raises(SystemExit) as exit_code:
        plan.main([STAGE2, "--topology=h100:8", "--check", "--compile=none"])
    assert exit_code.value.code == plan.EXIT_DOES_NOT_FIT == 1
    out = capsys.readouterr().out
    assert "does not fit: rollout.slots=1024" in out
    slots = re.search(r"what fits: rollout.slots=(\d+)", out)[1]
    plan.main(
        [
            STAGE2,
            "--topology=h100:8",
            "--check",
            "--compile=none",
            f"--config.rollout.slots={slots}",
        ]
    )
    plan.main([STAGE2, "--topology=h100:8", "--compile=none"])  # without --check it only says so


def test_bounds_of_speed():
    config = load_config(ROOT / "configs" / "stage2.py")
    found = make_run_plan(config, parse_topology("h100:64"), ())
    tokens, rows, peak = 1024 * 21_504, 1024, 64 * 989e12
    layers, heads, width = 28, 12, 128
    # The layers' matrices of R1-Distill-Qwen-1.5B: without table, head, biases and norms.
    matrices = 1_777_088_000 - 2 * 151_936 * 1536 - 28 * (2 * 1536 + 2048) - 1536
    attention = 4 * layers * heads * width * rows * 21_504 * 21_505 / 2
    head = 2 * 151_936 * 1536 * 1024 * 20_480
    forward = 2 * matrices * tokens + head + attention
    assert found.speed["update"].compute == pytest.approx(3 * forward / peak, rel=1e-6)
    # A drawn token reads the weights once with its 16 neighbours, and its own cache.
    cache = 2 * layers * 2 * width * 2 * (1024 + (20_480 - 1) / 2)
    read = (matrices + 151_936 * 1536) * 2 / 16 + cache
    seconds = 1024 * 20_480 / 64 * read / 3352e9
    assert found.speed["rollout"].memory == pytest.approx(seconds, rel=1e-6)
    assert found.speed["rollout"].limited_by == "memory"
    assert found.speed["update"].limited_by == "compute"
    assert found.speed["update"].compiler is None
    assert math.isclose(found.step_seconds("bound"), sum(x.bound for x in found.speed.values()))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--topology=v9:1"], ["--topology: 'v9:1'"]),
        (["--topology=v5p-32", "--compile=upd"], ["--compile: 'upd': no such program"]),
        (
            ["--topology=v5x:2", "--config.micro_batch=60", "--config.nosuch=1"],
            ["--config.nosuch", "micro_batch: 60", "--topology"],
        ),
        (["--topology=v5e-256", "--compile=none"], ["micro_batch: 64 is not a multiple of mesh"]),
        (["--topology=h100:8", "--compile=update"], ["--compile: h100:8: needs 8 x NVIDIA"]),
        (["--topology=h100:6", "--config.mesh.fsdp=4"], ["mesh.fsdp=4"]),
    ],
)
def test_mistakes_are_named_all_at_once(args, told):
    with pytest.raises(UserError) as error:
        plan.main([STAGE2, *args])
    assert all(any(x in line for line in error.value.problems) for x in told)


def test_without_a_known_vocabulary():
    with pytest.raises(UserError, match=r"student.shape.vocab_size: 0, and student.path is empty"):
        plan.main([STAGE2, "--topology=h100:64", "--config.student.shape.vocab_size=0"])


def test_a_tpu_that_is_not_there():
    pytest.importorskip("libtpu", reason="needs libtpu, the compiler of the extra `tpu`")
    config = tiny(**{"student.dtype": "bfloat16", "mesh.data": 1, "mesh.fsdp": 4})
    found = make_run_plan(config, parse_topology("v5e:2x2"), report=lambda line: None)
    assert found.fits
    assert [*found.compiled] == ["weights", "prefill", "grow", "decode", "score teacher", "update"]
    assert all(x.account.cycles > 0 and not x.error for x in found.compiled.values())
    assert found.compiled["update"].account.unknown_loops == 0
    assert found.step_seconds("compiler") > 0
    large = apply_overrides(config, ["student.shape.vocab_size=1000000000"])
    found = make_run_plan(large, parse_topology("v5e:2x2"), ("update",), report=lambda line: None)
    assert not found.fits


def test_a_shipped_config_fits_a_slice_by_its_compiler(capsys):
    """The others are compiled by benchmarks/plans.py."""
    pytest.importorskip("libtpu", reason="needs libtpu, the compiler of the extra `tpu`")
    plan.main([STAGE2, "--topology=v5p-32", "--check", "--compile=score,update"])
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "fits"
    for program in ("score teacher", "update"):
        sizes = next(x for x in shown.splitlines() if x.startswith(f"{program} "))
        assert sizes.count("GiB") >= 3, sizes
    assert "too large" not in shown
    assert "failed" not in shown
