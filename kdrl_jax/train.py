"""Post-train a student with KDRL, its halves or its rivals.

    python -m kdrl_jax.train --config=mine --config.data.path=rows.jsonl [--config.key=value …]
    python -m kdrl_jax.train --config=configs/demo.py --workdir=runs/demo

Running the same command again continues from the newest checkpoint. The file reads as the
algorithm of arXiv 2506.02208: Mesh → Data → Student and teacher → Resume → Loop.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from kdrl_jax import processes
from kdrl_jax.cli import EXIT_UNHEALTHY, parse_config_args, run_entry
from kdrl_jax.config import digest, flatten
from kdrl_jax.data import PromptBatches, prompt_lengths, to_json_lines
from kdrl_jax.models import Decoder
from kdrl_jax.network import set_offline
from kdrl_jax.objectives import Trend
from kdrl_jax.rollout import DRAWING, Engine, RolloutEngine, sampling_params
from kdrl_jax.shapes import require_installed
from kdrl_jax.sharding import batch_parts, put_batch
from kdrl_jax.training.adapters import init_adapters
from kdrl_jax.training.base import build_base
from kdrl_jax.training.checkpoints import stored_steps
from kdrl_jax.training.checks import Checks
from kdrl_jax.training.collect import Collector
from kdrl_jax.training.compilation_cache import enable_compilation_cache
from kdrl_jax.training.display import Display
from kdrl_jax.training.evaluation import eval_settings, eval_slots, eval_tokens, evaluate
from kdrl_jax.training.health import Health
from kdrl_jax.training.host_memory import share_arenas
from kdrl_jax.training.learner import Learner, Weights
from kdrl_jax.training.locate import (
    fetch_run_models,
    model_name,
    used_keys,
    with_folders,
)
from kdrl_jax.training.memory import Levers
from kdrl_jax.training.memory_check import MemoryCheck
from kdrl_jax.training.meshes import describe, make_meshes
from kdrl_jax.training.metrics import unlock_folder
from kdrl_jax.training.micro_batch import device_facts, settle_micro_batch
from kdrl_jax.training.own_code import unweighted_verdicts
from kdrl_jax.training.performance import Meter
from kdrl_jax.training.problems import (
    load_run_tokenizer,
    make_grader,
    make_reward_functions,
    read_run_data,
)
from kdrl_jax.training.right_answers import FixedSet, Once, RightAnswers, shaping_answers
from kdrl_jax.training.roles import (
    build_role,
    check_roles,
    decoder_of,
    ends_differently,
)
from kdrl_jax.training.run import Run, open_workdir
from kdrl_jax.training.serving import connect
from kdrl_jax.training.state import abstract_state, init_state, optimizer_of
from kdrl_jax.training.stopping import EXIT_STOPPED, EndAtOnce
from kdrl_jax.training.storage import check_writable, write_atomic
from kdrl_jax.training.validation import compare_for_resume, validate
from kdrl_jax.types import UserError

HELD_OUT = "held_out.jsonl"
"""In a run's folder: the problems of `data.eval_fraction` that it is measured on."""


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Run, or continue, what `config` describes; everything it writes is under `workdir`.

    Returns:
      The content of `workdir/summary.json`.

    Raises:
      UserError: before anything is allocated, with one line per problem.
    """
    share_arenas()
    processes.start(flatten(config).get("process_timeout_s"))  # the values are checked by all
    with processes.together():
        sizes = validate(config)
        saved = workdir / "config.json"
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir: {workdir} is a file; give a folder")
        check_writable(workdir)
        if saved.exists() and stored_steps(workdir / "checkpoints"):
            compare_for_resume(json.loads(saved.read_text(encoding="utf-8")), config, saved)
    processes.agree("--config", {"configuration": digest(config.to_dict())})
    set_offline(config.offline)
    display = Display(quiet=not processes.is_first())
    display.say(f"run: {workdir}")
    fetching: dict[str, Any] = {"offline": config.offline, "weights": False}
    models = fetch_run_models(used_keys(config), workdir, display, **fetching)
    processes.agree("models", {key: model_name(folder) for key, folder in models.items()})
    named, config = config, with_folders(config, models)

    # --- Mesh ----------------------------------------------------------------------------------
    with processes.together():
        enable_compilation_cache(Path(config.cache_dir))
        meshes = make_meshes(config)
        mesh = meshes.student
        tokenizer = load_run_tokenizer(config)
    display.say(describe(mesh))
    for line in unweighted_verdicts(flatten(config)):
        display.alert(line)
    processes.agree("tokenizer", {"vocabulary": digest(tokenizer.vocab())})

    # --- Data ----------------------------------------------------------------------------------
    problems, held_out, data_report = read_run_data(config, tokenizer, display)
    ro = config.rollout
    buckets = prompt_lengths(config.data.prompt_buckets, config.data.max_prompt_tokens)
    data_digest = digest([ids for _, ids in problems])

    # --- Student and teacher -------------------------------------------------------------------
    # Weights of the hub are downloaded now: bad data would have ended the run before.
    names = {key: model_name(folder) for key, folder in models.items()}
    fetch_run_models(names, workdir, display, **fetching | {"weights": True})
    with processes.together(), display.doing("checking the models' files"):
        shapes = check_roles(config, sizes, tokenizer, meshes)
    sizes, line = settle_micro_batch(config, sizes, shapes, meshes, workdir=workdir)
    if line:
        display.say(line)
    with processes.together():
        job = (config, sizes, shapes, meshes)
        memory = MemoryCheck(*job).require(display)
        student = decoder_of(config.student, shapes["student"], sizes.lora)
        # Rollouts may be of another dtype than updates: mismatch/kl says what that costs.
        sampler_model = dataclasses.replace(student, dtype=sizes.rollout_dtype)
        server = connect(config, sampler_model, tokenizer, problems, workdir, display)
        meter = Meter(*job, display)
    facts = (data_report, device_facts(sizes))
    store = open_workdir(workdir, named, models, shapes["student"], tokenizer, *facts)
    if config.data.eval_fraction and processes.is_first():
        write_atomic(workdir / HELD_OUT, to_json_lines([problem for problem, _ in held_out]))
    start = store.latest_step()
    processes.agree(str(workdir), {"newest checkpoint": str(start)})
    teacher = reference = base = answers = None
    order = (len(problems), ro.prompts_per_step, config.seed)
    batches = Once(*order) if sizes.method.supervised else PromptBatches(*order)
    if isinstance(batches, Once):  # rejection sampling: the teacher's answers are all that counts
        made_of = digest([data_digest, shaping_answers(named), *order])
        drawn = {"problems": len(problems), "wanted": config.sft_problems, "batches": batches}
        with processes.together():
            answers = RightAnswers(workdir, made_of, **drawn)
    if sizes.method.uses_teacher and not (answers and answers.complete):
        model = decoder_of(config.teacher, shapes["teacher"])
        params = build_role("teacher", config, model, tokenizer, meshes.teacher, display)
        teacher = Weights(model, params, meshes.teacher, offload=config.teacher.offload)
    if student.lora:  # they alone are trained; the initial student is their base
        base = build_base(config, student, tokenizer, mesh, workdir, display)
    if config.reference_coef:
        initial = base or student.cast(
            build_role("student", config, student, tokenizer, mesh, display)
        )
        reference = Weights(student.base, initial, mesh)
    optimizer = optimizer_of(config.optimizer, config.steps * sizes.updates)
    checks = Checks(config, sizes, tokenizer.size, tokenizer.stop_ids) if config.debug else None
    learner = Learner(
        config,
        sizes,
        student,
        optimizer,
        mesh,
        teacher=teacher if sizes.method.scores else None,
        reference=reference,
        base=base,
        valid_vocab=tokenizer.size,
        mask_final_eos=sizes.method.uses_teacher and ends_differently(config, tokenizer),
        checks=checks,
    )
    sampling = sampling_params(
        (ro.prompts_per_step + ro.carry, ro.group_size),
        tokenizer.stop_ids,
        **{k: ro[k] for k in DRAWING},
    )

    def engine_of(model: Decoder, budget: int, slots: int) -> Engine:
        return RolloutEngine(
            model,
            valid_vocab=tokenizer.size,
            prompt_buckets=buckets,
            max_new_tokens=budget,
            slots=slots,
            mesh=meshes.rollout,
        )

    budget = (ro.max_new_tokens, ro.slots)
    engine = evaluator = server or engine_of(sampler_model, *budget)
    if (longer := eval_tokens(config)) > ro.max_new_tokens and not server:
        # With as much memory: fewer responses at once.
        room = (Levers.of(config).slots, buckets[-1], ro.max_new_tokens)
        slots = eval_slots(*room, longer, batch_parts(meshes.rollout))
        evaluator = engine_of(sampler_model, longer, slots)

    # --- Resume --------------------------------------------------------------------------------
    # From the newest whole checkpoint, else from the student's own weights. Random keys are
    # functions of step and data position, which is 1 rollout batch a step but for refilled ones.
    position, trend, carried, watched = 0, Trend(), "", None
    if start is None:
        if student.lora:
            params = init_adapters(student, jax.random.key(config.seed), mesh)
        else:
            params = build_role("student", config, student, tokenizer, mesh, display)
        state = init_state(params, optimizer, mesh)
        del params
    else:
        with display.doing("reading the checkpoint"):
            state, meta = store.restore(abstract_state(student, optimizer, mesh), display.say)
        start = meta["step"]
        if meta["data"] != data_digest:
            raise UserError(
                f"{config.data.path or config.data.task}: not the problems that step {start} was "
                "trained on; restore them or use another --workdir"
            )
        position, trend = meta["data_position"], Trend(*meta["trend"])
        carried, watched = meta.get("carried", ""), meta.get("health")
        display.say(f"continuing after step {start} of {config.steps}")
    state = learner.at_rest(state)

    # --- Loop ----------------------------------------------------------------------------------
    health = Health(config.health.to_dict(), sizes.method, config.kd_mask, watched)
    book = Run(named, workdir, start, store, display, data_digest, trend, health, memory, meter)
    grading, judging = make_grader(config, config.data.task), make_reward_functions(config)
    with (
        processes.explained(),
        grading as grader,
        judging as functions,
        book as run,
        jax.debug_nans(config.debug),
    ):
        collector = Collector(
            engine_of(teacher.model, *budget) if teacher and answers else engine,
            problems,
            batches,
            tokenizer,
            grader,
            sampling,
            seed=config.seed,
            refill=ro.refill,
            carry=ro.carry,
            carried=carried,
            phases=run.phases,
            functions=functions,
        )

        def evaluate_student(step: int) -> None:
            if held_out and (step % config.eval.every == 0 or step == config.steps):
                run.wait(then="eval")
                settings = {**eval_settings(config), "progress": run.phases.evaluated}
                policy = learner.policy(state.params)
                scores, _ = evaluate(evaluator, policy, held_out, tokenizer, grader, **settings)
                run.evaluated(step, scores)

        if start is None:
            evaluate_student(0)
        source: Collector | FixedSet = collector
        if answers is not None:
            answers.draw_all(collector, teacher, run.goes_on, display)
            teacher = None  # nobody asks it any more
            if not run.stopping:
                source = FixedSet(
                    problems,
                    answers.answers,
                    rows=sizes.rollouts,
                    seed=config.seed,
                    pad_id=tokenizer.pad_id,
                    buckets=buckets,
                    width=ro.max_new_tokens,
                )
        step = start or 0
        while step < config.steps and not run.stopping:
            with jax.transfer_guard("disallow"):  # every copy between host and device is meant
                policy = learner.policy(state.params)
                # Meanwhile the last step's metrics are read.
                found, position = source.collect(policy, position, run.settle)
                rollouts = put_batch(mesh, found.rollouts)
                if checks:
                    checks.rollouts(step + 1, found.rollouts)
                run.clock.lap("rollout", then="score")

                beta, now = learner.beta(step, run.trend), learner.hyper(step, run.trend)
                rows = learner.rows(found.rollouts, rollouts)
                scores = learner.score(state.params, rows, beta, now.temperature)
                rewards = found.rewards  # graded by the host while the devices score
                correct = found.correct if config.reward.functions else None
                jax.block_until_ready(scores)
                if checks:
                    checks.scored(rewards, rows, scores, found.rollouts, correct)
                run.clock.lap("score", then="update")

                told = (rows, rollouts, rewards, scores, now)
                traces = learner.traces(*told, correct, run.samples_due(step + 1))
                probe = health.probe_due(step + 1, beta)
                state, metrics = learner.learn(state, *told, correct=correct, probe=probe)

            step += 1
            scheduled = learner.scheduled(step - 1, run.trend)
            numbers = {**scheduled, **found.metrics, **source.verification()}
            run.step_done(step, metrics, numbers, found, scores)
            run.write_samples(step, found, tokenizer, traces)
            evaluate_student(step)
            if step % config.checkpoint.every == 0 or step == config.steps:
                run.save(step, state, position, source.carried)
        if run.stopping:
            run.save(step, state, position, source.carried)
        summary = run.finish(step)
    if processes.is_first():
        unlock_folder(workdir)
    return summary


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring.

    Exits with 75 if it was told to stop, with 3 if a watch of `health` stopped it.
    """
    with EndAtOnce():
        config, workdir = parse_config_args(argv, __doc__)
        if config.debug:
            require_installed(argv)
        summary = train(config, workdir)
        if summary["stopped_by"]:
            raise SystemExit(EXIT_UNHEALTHY)
        if not summary["finished"]:
            raise SystemExit(EXIT_STOPPED)


if __name__ == "__main__":
    run_entry(main)
