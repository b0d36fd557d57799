"""Evaluate a policy on benchmarks of mathematics and logic, or on data of one's own.

    python -m kdrl_jax.evaluate --config=configs/stage2.py --checkpoint=runs/stage2 \\
        --benchmarks=math500,aime24 --data_dir=FOLDER --output=runs/stage2/evaluation

The checkpoint is a run's folder (its newest checkpoint), RUN/checkpoints/STEP, a Hugging Face
folder or a model of the hub, OWNER/NAME[@REVISION]; for a run, --config may be left out: its own
config.json serves. From the config come student.dtype, data.prompt_style, data.prompt_buckets,
eval.max_new_tokens (0: rollout.max_new_tokens), eval.temperature, eval.top_p, eval.batch,
eval.require_format, rollout.slots, reward.*, mesh.*, rollout_mesh.*, seed; any of them may be set
by --config.KEY=VALUE. A response is right if its answer is; the format that training may reward
counts only with eval.require_format.

Problems come from DATA_DIR/BENCHMARK.jsonl, or without --data_dir from the Hugging Face hub at the
revision that kdrl_jax/evaluation/benchmarks.py pins (BENCHMARK@REVISION takes another). The output
folder gets BENCHMARK.jsonl with every response, results.json, and results.md with a table beside
those of the papers that are of such a model, if any. Running the same command again continues where
it was interrupted.

    python -m kdrl_jax.evaluate --checkpoint=runs/mine --output=runs/mine/evaluation \\
        --data=my_test.jsonl --config.data.fields.problem=question --samples=4

asks data of one's own instead, or with --benchmarks too: whatever data.path of a run may be, read
by data.fields and data.on_bad and graded as mathematics; eval.samples responses to each problem,
unless --samples says otherwise. --data may be given several times; the files name their rows.

    python -m kdrl_jax.evaluate --self_check [--benchmarks=…] [--data_dir=FOLDER]

grades every gold answer against itself, without a model; --config.reward.answer=last_number or text
says in which form.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from kdrl_jax.cli import Parser, run_entry, split_overrides
from kdrl_jax.config import apply_overrides, read_config, saved_config
from kdrl_jax.data import prompt_lengths, shown_prompt
from kdrl_jax.evaluation.benchmarks import (
    BENCHMARKS,
    Loaded,
    find_benchmarks,
    load_benchmark,
    load_data,
    name_data,
    refused_golds,
)
from kdrl_jax.evaluation.model import PolicyFolder, find_policy, load_policy
from kdrl_jax.evaluation.paper_tables import SIX, fitting
from kdrl_jax.evaluation.planning import (
    Plan,
    Refusals,
    check_settings,
    make_plan,
    prompt_buckets,
    write_settings,
)
from kdrl_jax.evaluation.runner import ask
from kdrl_jax.evaluation.tables import Figures, average, markdown, summarise
from kdrl_jax.network import set_offline
from kdrl_jax.rewards import FORMS, Grader
from kdrl_jax.rollout import RolloutEngine
from kdrl_jax.tasks.registry import task_verifier
from kdrl_jax.training.compilation_cache import enable_compilation_cache
from kdrl_jax.training.display import Display
from kdrl_jax.training.evaluation import eval_tokens
from kdrl_jax.training.locate import find_model
from kdrl_jax.training.meshes import rollout_mesh
from kdrl_jax.training.metrics import lock_folder, unlock_folder
from kdrl_jax.training.problems import GRADING, make_grader
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.training.validation import refused
from kdrl_jax.types import UserError

# What an evaluation reads of a config; only these are checked.
READS = (
    *("seed", "cache_dir", "offline", "student.dtype", "data.prompt_style", "data.prompt_buckets"),
    "data.max_prompt_tokens",
    *("mesh.", "rollout_mesh."),
    *("rollout.max_new_tokens", "rollout.slots", "eval.temperature", "eval.top_p", "eval.batch"),
    *("eval.max_new_tokens", "eval.require_format", "eval.samples", "eval.by"),
    *(f"reward.{key}" for key in GRADING),
    *("data.fields", "data.on_bad"),  # of --data
)


def evaluate(
    config: ConfigDict,
    policy: PolicyFolder,
    benchmarks: Sequence[Loaded],
    output: Path,
    *,
    samples: int | None = None,
    limit: int | None = None,
    compare: Sequence[Path] = (),
) -> dict[str, Any]:
    """Ask a policy the problems of each benchmark; everything that is written is under `output`.

    Args:
      samples: of each problem; None: what the benchmark has as default.
      limit: the first so many problems of each; None: all.
      compare: folders of earlier evaluations, for further rows of the table.

    Returns:
      The content of `results.json`.

    Raises:
      UserError: before the weights are loaded, with one line per problem.
    """
    display, wrong = Display(), Refusals()
    for note in filter(None, (loaded.note for loaded in benchmarks)):
        display.say(note)
    tokenizer, window, weights = policy.tokenizer(), policy.shape().max_positions, policy.digest()
    mesh = wrong.attempt(rollout_mesh, config)
    others = [wrong.attempt(_read_results, folder) for folder in compare]
    plans: list[Plan] = []
    figures: dict[str, Figures] = {}
    asking = {"window": window, "weights": weights, "samples": samples, "limit": limit}
    with contextlib.ExitStack() as stack:
        tasks = dict.fromkeys(loaded.benchmark.task for loaded in benchmarks)
        graders = {task: stack.enter_context(make_grader(config, task)) for task in tasks}
        for loaded in benchmarks:
            grader = graders[loaded.benchmark.task]
            plan = wrong.attempt(make_plan, loaded, config, tokenizer, grader, **asking)
            if plan:
                plans.append(plan)
                wrong.attempt(check_settings, plan.file(output), plan.settings)
        wrong.raise_any()
        assert mesh
        first = plans[0].questions[0]
        display.say(shown_prompt(first.problem, first.prompt, tokenizer))

        lock_folder(output)
        enable_compilation_cache(Path(config.cache_dir))
        display.say(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {policy}")
        model, params, _ = load_policy(policy, mesh, config.student.dtype, display)
        longest = max(len(question.prompt) for plan in plans for question in plan.questions)
        lengths = prompt_lengths(config.data.prompt_buckets, config.data.max_prompt_tokens)
        engine = RolloutEngine(
            model,
            valid_vocab=tokenizer.size,
            prompt_buckets=prompt_buckets(lengths, longest),
            max_new_tokens=eval_tokens(config),
            slots=config.rollout.slots,
            mesh=mesh,
        )
        for plan in plans:
            write_settings(plan.file(output), plan.settings)
            rows = ask(
                *(plan.questions, engine, params, tokenizer, graders[plan.benchmark.task]),
                *(plan.file(output), display),
                samples=plan.samples,
                batch=plan.batch,
                temperature=config.eval.temperature,
                top_p=config.eval.top_p,
                require_format=config.eval.require_format,
                by=plan.by,
                seed=config.seed,
            )
            figures[plan.benchmark.name] = summarise(rows, plan.samples, plan.kept_out, plan.listed)
    shown = (
        *("temperature", "top_p", "max_new_tokens", "prompt_style", "answer"),
        *("require_format", "dtype", "seed"),
    )
    results = {
        "checkpoint": str(policy),
        "benchmarks": figures,
        "average": average(figures),
        "settings": {key: plans[0].settings[key] for key in shown} | {"limit": limit},
        "versions": {name: metadata.version(name) for name in ("jax", "math-verify")},
    }
    write_atomic(output / "results.json", json.dumps(results, indent=2) + "\n")
    tables = fitting(policy.shape(), config.data.prompt_style)
    table = markdown(results, [other for other in others if other], tables)
    write_atomic(output / "results.md", table)
    display.event("result", results)
    display.say(f"\n{table}\neverything is in {output}")
    unlock_folder(output)
    return results


def self_check(benchmarks: Sequence[Loaded], form: str = "boxed") -> bool:
    """Whether every gold answer, given as a response, grades as correct; says which do not.

    Args:
      form: of the responses, one of `kdrl_jax.rewards.FORMS`.
    """
    display, good = Display(), True
    for benchmark, problems, bad, listed, _ in benchmarks:
        judge = task_verifier(benchmark.task)
        options: dict[str, Any] = {"timeout_s": 10.0, "require_format": False, "form": form}
        with Grader(workers=2, verify=judge, **options) as grader:
            lost = refused_golds(problems, grader)
        total, wrong = len(problems) + bad, len(lost) + bad
        display.say(f"{benchmark.name}: {total - wrong} of {total} gold answers are correct")
        for line in (*listed, *lost.values()):
            display.say(f"  {line}")
        good &= not wrong
    return good


def _read_results(folder: Path) -> dict[str, Any]:
    file = folder / "results.json" if folder.is_dir() else folder
    if not file.is_file():
        raise UserError(f"--compare: no file {file}; give the --output of a finished evaluation")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: found[key] for key in ("checkpoint", "benchmarks")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--compare: {file} is no results.json ({error}); evaluate again"
        ) from error


def _read_config(
    file: str | None, policy: PolicyFolder | None, overrides: Sequence[str]
) -> ConfigDict | None:
    """The config of --config, or of the run that is evaluated; only what is read is checked."""
    saved = policy.folder / "config.json" if policy and policy.step is not None else None
    if file:
        config, problems = read_config(file, overrides)
    elif saved and saved.is_file():
        config, problems = apply_overrides(saved_config(saved), overrides), []
    elif policy:
        raise UserError("--config: missing; only a run's folder has a config.json of its own")
    else:
        return None
    if problems := problems + refused(config, READS):
        raise UserError(*problems)
    return config


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    overrides, rest = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = Parser(__doc__)
    parser.add_argument("--config", metavar="FILE[:VARIANT]")
    parser.add_argument("--checkpoint", metavar="FOLDER")
    parser.add_argument(
        "--benchmarks",
        metavar="NAME[@REVISION],…",
        help=f"of {', '.join(BENCHMARKS)}; default: without --data the paper's six, all for "
        "--self_check",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="PATH",
        help="of one's own, as data.path; may be given several times",
    )
    parser.add_argument("--data_dir", type=Path, metavar="FOLDER", help="default: the hub")
    parser.add_argument("--samples", type=int, metavar="K", help="per problem (16 or 1)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems of each")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="OUTPUT", help="more rows"
    )
    parser.add_argument("--self_check", action="store_true")
    args = parser.read(rest)
    if args.benchmarks is None:
        usual = BENCHMARKS if args.self_check else SIX
        args.benchmarks = "" if args.data else ",".join(usual)

    wrong = Refusals()
    for name in ("samples", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            wrong.append(f"--{name}: {value} must be at least 1")
    if args.data_dir and not args.data_dir.is_dir():
        wrong.append(f"--data_dir: no folder {args.data_dir}; leave it out to read from the hub")
    chosen = wrong.attempt(find_benchmarks, [n for n in args.benchmarks.split(",") if n]) or []
    own = wrong.attempt(name_data, args.data) or {}
    if not chosen and not own and not wrong:
        wrong.append("--benchmarks: names none, and there is no --data; see --help")
    if args.data_dir and "@" in args.benchmarks:
        wrong.append(f"--benchmarks: {args.benchmarks} has a revision, but --data_dir is local")
    policy = config = None
    if not args.self_check:
        for name in ("checkpoint", "output"):
            if not getattr(args, name):
                wrong.append(f"--{name}: missing; see --help")
        if args.config:
            config = wrong.attempt(_read_config, args.config, None, overrides)
        if args.checkpoint and wrong:  # nothing is downloaded for a command that cannot run
            wrong.attempt(find_model, "--checkpoint", args.checkpoint)
        elif args.checkpoint:
            where = {"offline": config is not None and config.offline, "display": Display()}
            policy = wrong.attempt(find_policy, args.checkpoint, **where)
        if not args.config:
            config = wrong.attempt(_read_config, None, policy, overrides)
    elif overrides or args.config or own:
        config = wrong.attempt(_read_config, args.config or "base", None, overrides)
        if config and config.reward.answer not in FORMS:
            wrong.append("--self_check: reward.answer='task' has no response to a gold answer")
    if not args.data_dir:
        wrong.raise_any()  # before anything is downloaded
    if args.data_dir and not args.data_dir.is_dir():
        chosen = []
    set_offline(config is not None and config.offline)
    loaded = [found for b in chosen if (found := wrong.attempt(load_benchmark, b, args.data_dir))]
    if config:
        reading = {"on_bad": config.data.on_bad, "samples": config.eval.samples}
        read = [
            wrong.attempt(load_data, *one, config.data.fields, **reading) for one in own.items()
        ]
        loaded += [found for found in read if found]
    wrong.raise_any()
    if args.self_check:
        sys.exit(0 if self_check(loaded, config.reward.answer if config else "boxed") else 1)
    assert policy
    assert config
    evaluate(
        config,
        policy,
        loaded,
        args.output,
        samples=args.samples,
        limit=args.limit,
        compare=args.compare,
    )


if __name__ == "__main__":
    run_entry(main)
