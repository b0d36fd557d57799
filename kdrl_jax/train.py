"""Post-train a student with KDRL, GRPO or KD-RKL.

    python -m kdrl_jax.train --config=configs/demo.py --workdir=runs/demo [--config.key=value …]

Running the same command again continues from the newest checkpoint. The file reads as the
algorithm of arXiv 2506.02208: Mesh → Data → Student and teacher → Resume → Loop.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from kdrl_jax.cli import enable_compilation_cache, parse_config_args, run_entry
from kdrl_jax.config import compare_for_resume, digest, has_checkpoint, to_json, validate
from kdrl_jax.data import PromptBatches, pad_prompts
from kdrl_jax.models import Decoder
from kdrl_jax.objectives import beta_schedule
from kdrl_jax.rewards import Grader
from kdrl_jax.rollout import RolloutEngine, request_keys, sampling_params
from kdrl_jax.sharding import BATCH_AXES, make_mesh, put_batch
from kdrl_jax.training.batch import build_batch, rollout_rows
from kdrl_jax.training.checkpoints import CheckpointStore
from kdrl_jax.training.evaluation import completion_texts, evaluate
from kdrl_jax.training.metrics import Display, lock_folder, unlock_folder, write_atomic
from kdrl_jax.training.problems import load_run_data, load_run_tokenizer
from kdrl_jax.training.roles import build_role, check_roles, ends_differently, write_model_files
from kdrl_jax.training.run import Run
from kdrl_jax.training.state import abstract_state, init_state, make_optimizer, make_schedule
from kdrl_jax.training.step import Hyper, make_hyper, make_update
from kdrl_jax.training.teacher import Teacher
from kdrl_jax.types import UserError


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Run, or continue, what `config` describes; everything it writes is under `workdir`.

    Returns:
      The content of `workdir/summary.json`.

    Raises:
      UserError: before anything is allocated, with one line per problem.
    """
    sizes = validate(config)
    saved = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir: {workdir} is a file; give a folder")
    if saved.exists() and has_checkpoint(workdir):
        compare_for_resume(json.loads(saved.read_text(encoding="utf-8")), config, saved)
    enable_compilation_cache(Path(config.cache_dir))
    display = Display()

    # --- Mesh ----------------------------------------------------------------------------------
    mesh, teacher_mesh = make_mesh(**config.mesh), make_mesh(**config.teacher_mesh)
    by_row = NamedSharding(mesh, P(BATCH_AXES))
    display.say(f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")

    # --- Data ----------------------------------------------------------------------------------
    tokenizer = load_run_tokenizer(config)
    problems, held_out = load_run_data(config, tokenizer, display)
    ro, buckets = config.rollout, config.data.prompt_buckets
    batches = PromptBatches(len(problems), ro.prompts_per_step, config.seed)
    data_digest = digest([ids for _, ids in problems])

    # --- Student and teacher -------------------------------------------------------------------
    shapes = check_roles(config, sizes, tokenizer, {"mesh": mesh, "teacher_mesh": teacher_mesh})
    lock_folder(workdir)
    write_atomic(saved, to_json(config))
    write_model_files(workdir, shapes["student"], tokenizer)
    scoring = {"valid_vocab": tokenizer.size, "chunk": config.logprob_chunk}
    teacher = None
    if sizes.uses_teacher:
        model = Decoder(shapes["teacher"], config.teacher.dtype, config.teacher.remat)
        params = build_role("teacher", config, model, tokenizer, teacher_mesh, display)
        teacher = Teacher(model, params, teacher_mesh, rows=config.micro_batch, **scoring)
    student = Decoder(shapes["student"], config.student.dtype, config.student.remat)
    o = config.optimizer
    optimizer = make_optimizer(
        make_schedule(o.learning_rate, o.warmup_steps, o.schedule, config.steps),
        **{k: o[k] for k in ("b1", "b2", "eps", "weight_decay", "clip_norm")},
    )
    engine = RolloutEngine(
        student,
        valid_vocab=tokenizer.size,
        prompt_buckets=buckets,
        max_new_tokens=ro.max_new_tokens,
        mesh=mesh,
    )
    update = make_update(
        student,
        optimizer,
        mesh,
        kd_estimator=config.kd_estimator,
        micro_batches=sizes.micro_batches,
        **scoring,
    )
    fill_slots = jax.jit(
        functools.partial(
            build_batch,
            aggregation=config.aggregation,
            kd_mask=config.kd_mask,
            scale=config.advantage.scale,
            baseline=config.advantage.baseline,
            use_reward=sizes.uses_reward,
            mask_final_eos=sizes.uses_teacher and ends_differently(config, tokenizer),
            max_new_tokens=ro.max_new_tokens,
        )
    )
    sampling = sampling_params(
        (ro.prompts_per_step, ro.group_size),
        tokenizer.stop_ids,
        **{k: ro[k] for k in ("max_new_tokens", "temperature", "top_p", "top_k", "min_p")},
    )
    beta = beta_schedule(**config.beta.to_dict())

    def hyper(step: int) -> Hyper:
        numbers = {k: config[k] for k in ("clip_eps_low", "clip_eps_high", "entropy_coef")}
        numbers |= {"beta": beta(step), "temperature": sizes.logprob_temperature}
        return make_hyper(mesh, **numbers)

    # --- Resume --------------------------------------------------------------------------------
    # From the newest whole checkpoint, else from the student's own weights. Data position and
    # random keys are functions of the step, so the step is all there is to remember.
    store = CheckpointStore(workdir, config.checkpoint.keep)
    start = store.latest_step()
    if start is None:
        params = build_role("student", config, student, tokenizer, mesh, display)
        state = init_state(params, optimizer, mesh)
        del params
    else:
        state, meta = store.restore(abstract_state(student, optimizer, mesh))
        if meta["data"] != data_digest:
            raise UserError(
                f"{config.data.path or config.data.task}: not the problems that step {start} was "
                "trained on; restore them or use another --workdir"
            )
        display.say(f"continuing after step {start} of {config.steps}")

    # --- Loop ----------------------------------------------------------------------------------
    grading = {k: config.reward[k] for k in ("workers", "timeout_s", "require_format")}
    book = Run(config, workdir, start, store, display, data_digest)
    with Grader(**grading) as grader, book as run:

        def evaluate_student(step: int) -> None:
            if held_out and (step % config.eval.every == 0 or step == config.steps):
                run.wait()
                keys = ("samples", "batch", "temperature")
                settings = {k: config.eval[k] for k in keys} | {"seed": config.seed}
                settings |= {"max_new_tokens": ro.max_new_tokens, "buckets": buckets}
                scores, _ = evaluate(engine, state.params, held_out, tokenizer, grader, **settings)
                run.evaluated(step, scores)

        if start is None:
            evaluate_student(0)
        step = start or 0
        while step < config.steps and not run.stopping:
            with jax.transfer_guard("disallow"):  # every copy between host and device is meant
                chosen = batches[step]
                asked = [problems[i] for i in chosen]
                prompts = pad_prompts([ids for _, ids in asked], buckets, tokenizer.pad_id)
                keys = request_keys(config.seed, step, chosen, ro.group_size)

                rollouts = engine.generate(state.params, prompts, keys, sampling)
                run.settle()  # the last step's metrics, while the devices are busy with this one
                texts = completion_texts(rollouts, tokenizer)
                run.clock.lap("rollout")

                rows, now = rollout_rows(rollouts), hyper(step)
                teacher_log_probs = teacher and teacher.score(
                    rows, ro.max_new_tokens, now.temperature, by_row
                )  # on the devices, while the host verifies the answers
                answers = [problem.answer for problem, _ in asked for _ in range(ro.group_size)]
                verdicts = grader.grade(texts, answers)
                rewards = np.array([v.reward for v in verdicts], np.float32).reshape(len(asked), -1)
                jax.block_until_ready(teacher_log_probs)
                run.clock.lap("score")

                batch = fill_slots(rows, rollouts, put_batch(mesh, rewards), teacher_log_probs)
                state, metrics = update(state, batch, now)

            step += 1
            scalars = {"beta": float(beta(step - 1)) if teacher else 0.0}
            run.step_done(step, metrics, scalars, rollouts, verdicts, rewards)
            run.write_samples(step, asked, texts, verdicts, rollouts)
            evaluate_student(step)
            if step % config.checkpoint.every == 0 or step == config.steps:
                run.save(step, state)
        if run.stopping:
            run.save(step, state)
        summary = run.finish(step)
    unlock_folder(workdir)
    return summary


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    train(*parse_config_args(argv, __doc__))


if __name__ == "__main__":
    run_entry(main)
