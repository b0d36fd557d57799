"""Building the student and the teacher: from a folder, or from a shape and worked solutions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdrl_jax import processes
from kdrl_jax.config import digest
from kdrl_jax.data import (
    Tokenizer,
    check_tokenizer_pair,
    encode_prompt,
    encode_prompts,
    load_tokenizer,
)
from kdrl_jax.models import Decoder, ModelConfig, load_config, quantize
from kdrl_jax.models.hf_files import CONFIG, open_hf
from kdrl_jax.models.hf_save import whole_folder
from kdrl_jax.models.lora import LoRA
from kdrl_jax.sharding import batch_parts, nearest_divisor, param_shardings
from kdrl_jax.tasks.registry import get_task, task_problems
from kdrl_jax.training.adapters import check_run, load_weights, rank_problems
from kdrl_jax.training.display import Display
from kdrl_jax.training.meshes import Meshes
from kdrl_jax.training.run_weights import abstract_params, is_run, restore_params, save_params
from kdrl_jax.training.sft import Example, train_supervised
from kdrl_jax.training.state import init_params
from kdrl_jax.training.storage import sweep_partial, write_atomic
from kdrl_jax.training.validation import Sizes
from kdrl_jax.types import Params, Problem, UserError


def model_folder(path: str | Path) -> Path:
    """Where config.json and the tokenizer are: the folder itself, or a run's `model/`."""
    folder = Path(path)
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def read_model_config(path: str | Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder or a run's folder, without its weights.

    Raises:
      UserError: no config.json, or a model that is not supported.
    """
    folder = model_folder(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{path}: holds no config.json; give a Hugging Face or run folder")
    return load_config(folder)


def model_config(role: ConfigDict, ids: int, window: int) -> ModelConfig:
    """The shape of a role's model: read from its folder, or from `shape`.

    Args:
      ids: of the tokenizer; how many rows the vocabulary needs where `shape` does not say.
    """
    if role.path:
        return read_model_config(role.path)
    shape = role.shape
    return ModelConfig(
        vocab_size=shape.vocab_size or -(-ids // 64) * 64,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        mlp_size=shape.mlp_size,
        rope_theta=10_000.0,
        rope_scaling=None,
        norm_eps=1e-6,
        qkv_bias=shape.model_type == "qwen2",
        qk_norm=shape.model_type == "qwen3",
        tie_embeddings=shape.tie_embeddings,
        max_positions=window,
        model_type=shape.model_type,
    )


def decoder_of(role: ConfigDict, shape: ModelConfig, lora: LoRA | None = None) -> Decoder:
    """The decoder of a role; weights in 8 bits compute in bfloat16."""
    dtype = "bfloat16" if role.dtype == "int8" else role.dtype
    return Decoder(shape, dtype, role.remat, lora)


def check_roles(
    config: ConfigDict, sizes: Sizes, tokenizer: Tokenizer, meshes: Meshes
) -> dict[str, ModelConfig]:
    """The shape of each role's model, after everything that can stand against it was checked.

    Raises:
      UserError: a window that is too short, a vocabulary that does not fit, heads or a micro-batch
        that the mesh cannot split, a teacher that maps ids otherwise; one line each.
    """
    shapes = check_shapes(config, sizes, tokenizer.size, meshes)
    if sizes.method.uses_teacher and config.teacher.path:
        check_tokenizer_pair(tokenizer, load_tokenizer(model_folder(config.teacher.path)))
    return shapes


def check_shapes(
    config: ConfigDict, sizes: Sizes, ids: int, meshes: Meshes, *, weights: bool = True
) -> dict[str, ModelConfig]:
    """`check_roles` without a tokenizer, of which only the number of `ids` counts.

    Args:
      weights: whether the models' weights must be in their folders; a plan does without.
    """
    budgets = {"rollout.max_new_tokens": config.rollout.max_new_tokens}
    if config.eval.every:  # by the student alone
        budgets["eval.max_new_tokens"] = config.eval.max_new_tokens
    window = config.data.max_prompt_tokens + max(budgets.values())
    roles = ["student", "teacher"] if sizes.method.uses_teacher else ["student"]
    shapes = {name: model_config(config[name], ids, window) for name in roles}
    problems: list[str] = []
    for name, shape in shapes.items():
        for key, budget in budgets.items() if name == "student" else [*budgets.items()][:1]:
            if (length := config.data.max_prompt_tokens + budget) > shape.max_positions:
                problems.append(
                    f"data.max_prompt_tokens + {key}: {length} exceeds the {name}'s "
                    f"window of {shape.max_positions}; lower one of them"
                )
        if ids > shape.vocab_size:
            key = "path" if config[name].path else "shape.vocab_size"
            problems.append(
                f"{name}.{key}: has {shape.vocab_size} vocabulary rows, the tokenizer "
                f"{ids} ids; use the tokenizer that belongs to the model"
            )
    distils = sizes.method.kd and config.kd_estimator == "topk"
    if distils and config.kd_topk.k > ids:
        problems.append(
            f"kd_topk.k: {config.kd_topk.k} exceeds the {ids} ids of the tokenizer; "
            "use that many at most"
        )
    problems += rank_problems(sizes.lora, shapes["student"])
    for name in roles:
        if config[name].path and weights:
            problems += check_weights(config[name].path, Decoder(shapes[name]))
    of: dict[str, tuple[str, Mesh]]
    of = {"mesh": ("student", meshes.student), "rollout_mesh": ("student", meshes.rollout)}
    if sizes.method.uses_teacher:
        of["teacher_mesh"] = ("teacher", meshes.teacher)
    for key, (name, mesh) in of.items():
        problems += mesh_problems(key, mesh, name, shapes[name])
        ways = batch_parts(mesh)
        rows = sizes.rollouts // config.mini_batches
        if key != "rollout_mesh" and not config.micro_batch and rows % ways:
            problems.append(
                f"{key}.data x {key}.fsdp: {ways} does not divide the {rows} rollouts of an "
                f"update, so micro_batch=0 finds none; {nearest_divisor(ways, rows)} does"
            )
        if key != "rollout_mesh" and config.micro_batch % ways:
            fits = [n for n in range(ways, rows + 1, ways) if rows % n == 0]
            near = min(fits, key=lambda n: abs(n - config.micro_batch), default=None)
            hint = (
                f"micro_batch={near} is the nearest that works"
                if near
                else (f"{key}.data x {key}.fsdp={nearest_divisor(ways, config.micro_batch)} works")
            )
            problems.append(
                f"micro_batch: {config.micro_batch} is not a multiple of {key}.data x {key}.fsdp "
                f"= {ways}; {hint}"
            )
    if problems:
        raise UserError(*problems)
    return shapes


def mesh_problems(key: str, mesh: Mesh, name: str, shape: ModelConfig) -> list[str]:
    """What of a model a mesh cannot split evenly: a line for each, with the nearest size."""
    split = (
        ("tensor", "key/value heads", shape.num_kv_heads),
        ("tensor", "MLP width", shape.mlp_size),
        ("tensor", "vocabulary rows", shape.vocab_size),
        ("fsdp", "width", shape.hidden_size),
    )
    return [
        f"{key}.{axis}: {mesh.shape[axis]} does not divide the {name}'s {what}, {size}; the "
        f"nearest that does is {nearest_divisor(mesh.shape[axis], size)}"
        for axis, what, size in split
        if size % mesh.shape[axis]
    ]


def build_role(
    name: str,
    config: ConfigDict,
    model: Decoder,
    tokenizer: Tokenizer,
    mesh: Mesh,
    display: Display,
) -> Params:
    """The weights of a role's model, sharded on `mesh`.

    They come from `path` or are random; then `sft.steps` of supervised training on worked
    solutions follow. What comes out of that is kept in `cache_dir` under a name made of all keys
    that shape it.

    Args:
      name: 'student' or 'teacher', a section of `config`.
    """
    role = config[name]
    shardings = param_shardings(mesh, model.shapes())
    # Float32 master weights to train; a teacher that only scores has its compute dtype.
    final = jnp.dtype("float32" if name == "student" else model.dtype)
    dtype = jnp.dtype("float32") if role.sft.steps else final
    keep_small = quantize if role.dtype == "int8" else lambda params: params
    kept = kept_folder(name, config, tokenizer)
    if role.sft.steps and kept.is_dir():
        display.say(f"{name}: from {kept}")
        try:
            with processes.together():
                return keep_small(restore_params(kept, abstract_params(model, shardings, final)))
        except UserError as error:  # it can be made again
            display.say(f"{error.problems[0]}: making it again")
    if role.sft.steps and processes.is_first():
        sweep_partial(kept)
    if not role.path:
        params = init_params(model, jax.random.key(role.sft.seed), mesh)
    else:
        with display.loading(f"{name}: weights") as progress:
            params = load_weights(Path(role.path), model, mesh, dtype, progress=progress)
    if role.sft.steps:
        params = _fine_tune(name, config, model, params, tokenizer, mesh, display)
        source = Path(role.path) if role.path else None
        keep_model(kept, model.config, tokenizer, lambda at: save_params(at, params), source)
    return keep_small(jax.tree.map(lambda x: x.astype(final), params))


def kept_folder(name: str, config: ConfigDict, tokenizer: Tokenizer) -> Path:
    """Where what supervised training makes of a role is kept."""
    return Path(config.cache_dir) / f"{name}-{sft_digest(config[name], config, tokenizer)}"


def ends_differently(config: ConfigDict, tokenizer: Tokenizer) -> bool:
    """Whether the teacher's own tokenizer ends a text with another id than `tokenizer`."""
    if not config.teacher.path:
        return False
    return load_tokenizer(model_folder(config.teacher.path)).eos_id != tokenizer.eos_id


def sft_digest(role: ConfigDict, config: ConfigDict, tokenizer: Tokenizer) -> str:
    """Names the result of supervised training: everything that shapes it.

    Two worked solutions stand for the task's code, the vocabulary for the tokenizer's.
    """
    without = ("remat", "offload", "lora")
    parts: list[Any] = [{k: v for k, v in role.to_dict().items() if k not in without}]
    keys = ("task", "task_args", "prompt_style", "max_prompt_tokens", "seed")
    parts.append({k: config.data.to_dict()[k] for k in keys})
    if role.sft.steps:
        two = worked_problems(role, config, 2)
        parts.append([text for _, text in two])
        if ":" in config.data.prompt_style:  # the user's own code may change under its name
            parts.append([encode_prompt(x, tokenizer, config.data.prompt_style) for x, _ in two])
    if role.path:  # other weights under the same name are another model
        files = sorted(Path(role.path).glob("*.safetensors"))
        parts += [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        parts += sorted(p.name for p in (Path(role.path) / "checkpoints").glob("*"))
    return digest([*parts, sorted(tokenizer.vocab())])


def keep_model(
    folder: Path,
    shape: ModelConfig,
    tokenizer: Tokenizer,
    save: Callable[[Path], None],
    source: Path | None = None,
) -> None:
    """Write `model/` and whatever `save` adds; the folder appears whole or not at all.

    Every process must call this, and `save` is called by every process.

    Args:
      source: see `write_model_files`.
    """
    with whole_folder(folder) as partial:
        if processes.is_first():
            write_model_files(partial, shape, tokenizer, source)
        save(partial)


def write_model_files(
    run: Path, shape: ModelConfig, tokenizer: Tokenizer, source: str | Path | None = None
) -> None:
    """`model/`: the Hugging Face config and the tokenizer, so that a run's folder is complete.

    Args:
      source: the folder or run that the weights come from: its config.json is kept, unknown keys
        included; None: config.json is made from `shape`.
    """
    (run / "model").mkdir(parents=True, exist_ok=True)
    tokenizer.save(run / "model")
    text = json.dumps(shape.to_hf(), indent=2, sort_keys=True) + "\n"
    if source:
        text = (model_folder(source) / CONFIG).read_text(encoding="utf-8")
        content = json.loads(text)
        eos = content.get("eos_token_id")
        if not {*(eos if isinstance(eos, list) else [eos])} <= {None, *tokenizer.stop_ids}:
            # Another tokenizer than the model's own: texts end with its ids.
            content |= {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
            text = json.dumps(content, indent=2) + "\n"
    write_atomic(run / "model" / CONFIG, text)


def check_weights(path: str | Path, model: Decoder) -> list[str]:
    """What is wrong with the weights in a Hugging Face or run folder, by their headers alone."""
    try:
        if is_run(Path(path)):
            check_run(Path(path), model)
        else:
            with open_hf(path):
                pass
    except UserError as error:
        return error.problems
    return []


def worked_problems(role: ConfigDict, config: ConfigDict, count: int) -> list[tuple[Problem, str]]:
    """`count` problems of the role's task with their worked solutions."""
    name = role.sft.task or config.data.task
    args = config.data.task_args if name == config.data.task else ""
    problems = task_problems(name, count, config.data.seed + role.sft.seed, args=args)
    solution = get_task(name).solution
    assert solution is not None  # see validation
    return [(problem, solution(problem)) for problem in problems]


def worked_examples(name: str, config: ConfigDict, tokenizer: Tokenizer) -> list[Example]:
    """Prompts with worked solutions from the task, tokenised; too-long ones are dropped."""
    worked = worked_problems(config[name], config, config[name].sft.problems)
    solutions = {problem.id: solution for problem, solution in worked}
    style, limit = config.data.prompt_style, config.data.max_prompt_tokens
    kept, _ = encode_prompts([problem for problem, _ in worked], tokenizer, style, limit)
    return [
        (ids, [*tokenizer.encode(solutions[problem.id]), tokenizer.eos_id]) for problem, ids in kept
    ]


def _fine_tune(
    name: str,
    config: ConfigDict,
    model: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    mesh: Mesh,
    display: Display,
) -> Params:
    sft = config[name].sft
    examples = worked_examples(name, config, tokenizer)
    with display.track(f"{name}: supervised training", sft.steps) as track:
        return train_supervised(
            model,
            params,
            examples,
            mesh,
            steps=sft.steps,
            batch_size=sft.batch_size,
            learning_rate=sft.learning_rate,
            seed=sft.seed,
            valid_vocab=tokenizer.size,
            pad_id=tokenizer.pad_id,
            chunk=config.logprob_chunk,
            report=lambda nll: track.advance(f"nll {nll:.3f}", every_s=10),
        )
