"""Measure how difficult problems are for a model: the share of its attempts that are right.

    python -m kdrl_jax.difficulty --config=configs/stage2.py --model=HF_OR_RUN_FOLDER \\
        --data=FILE_OR_hf://owner/name?split=train --samples=16 --output=FILE.jsonl [--limit=N]

The output has the rows of the data with two columns more, under the model's name (--name, by
default its folder's): `pass_rate` {NAME: share right}, which is what `data.filters` look at, and
`pass_counts` {NAME: {"passed", "samples", "cut"}}, where cut is how many attempts the limit of
rollout.max_new_tokens ended. Labels of other models stay, so that a file can be measured with one
model after another. Set it as `data.path` and filter it: `data.filters = ("pass_rate:…",)`.

Attempts are drawn and graded as in training: rollout.*, reward.*, data.* and seed of the config.
A problem's attempts depend on the seed and its place in the data, and on eval.batch, mesh and
machine by rounding alone. Running the same command again continues where it was interrupted;
FILE.jsonl appears when all problems are done.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kdrl_jax.cli import Parser, run_entry, split_overrides
from kdrl_jax.config import digest, read_config
from kdrl_jax.data import encode_prompts, prompt_lengths, read_problems, shown_prompt
from kdrl_jax.data.schemas import PASS_RATE
from kdrl_jax.evaluation.model import PolicyFolder, find_policy, load_policy
from kdrl_jax.evaluation.planning import check_settings, write_settings
from kdrl_jax.network import set_offline
from kdrl_jax.rollout import DRAWING, RolloutEngine, sampling_params
from kdrl_jax.training.compilation_cache import enable_compilation_cache
from kdrl_jax.training.display import Display
from kdrl_jax.training.evaluation import EncodedProblem, grade_all, respond
from kdrl_jax.training.meshes import rollout_mesh
from kdrl_jax.training.metrics import lock_folder, unlock_folder
from kdrl_jax.training.problems import GRADING, make_grader
from kdrl_jax.training.validation import refused
from kdrl_jax.types import Problem, UserError

PASS_COUNTS = "pass_counts"
# What is read of a config; only these keys are checked.
READS = (
    *("seed", "cache_dir", "offline", "student.dtype", "eval.batch", "eval.samples", "data.prompt"),
    *("mesh.", "rollout_mesh."),
    *("data.max_prompt_tokens", "data.on_bad", "data.fields"),
    *(f"rollout.{key}" for key in (*DRAWING, "slots")),
    *(f"reward.{key}" for key in GRADING),
)


def measure(
    config: ConfigDict,
    data: str,
    policy: PolicyFolder,
    output: Path,
    *,
    samples: int = 16,
    limit: int | None = None,
    name: str = "",
) -> list[dict[str, Any]]:
    """Write `output`, the rows of `data` with the pass rates of a model; they are returned.

    Args:
      samples: attempts at each problem.
      limit: the first so many problems; None: all.
      name: what the model is called in the output; "": its folder's name, with the step of a run.

    Raises:
      UserError: before the weights are loaded: unreadable data, a prompt that does not fit, an
        output that other settings made.
    """
    display, tokenizer = Display(), policy.tokenizer()
    name = name or policy.name
    problems, found = read_problems(data, config.data.fields, on_bad=config.data.on_bad)
    display.say(str(found))
    longest = config.data.max_prompt_tokens
    asked, prompts = encode_prompts(problems[:limit], tokenizer, config.data.prompt_style, longest)
    display.say(f"prompts: {prompts}")
    if not asked:
        raise UserError(f"{data}: no prompt is short enough ({prompts}); raise the limit")
    display.say(shown_prompt(*asked[0], tokenizer))
    window, length = policy.shape().max_positions, config.rollout.max_new_tokens
    if longest + length > window:
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_new_tokens: {longest + length} exceeds the "
            f"model's window of {window}; lower one of them"
        )
    settings = {
        **{"model": str(policy), "weights": policy.digest(), "name": name, "samples": samples},
        **{"problems": digest([[p.problem, p.answer, ids] for p, ids in asked])},
        **{"seed": config.seed, "dtype": config.student.dtype},
        **{key: config.rollout[key] for key in DRAWING},
        **{key: config.reward[key] for key in GRADING if key != "workers"},
    }
    if output.exists() and not output.with_suffix(".settings.json").exists():
        raise UserError(f"--output: {output} exists and is not this command's; give a new file")
    check_settings(output, settings)
    if not output.exists():
        _ask_all(config, asked, policy, output, settings, display)
    rows = [json.loads(line) for line in output.read_bytes().splitlines()]
    display.say(histogram([row[PASS_COUNTS][name] for row in rows], samples))
    display.say(f"everything is in {output}")
    return rows


def _ask_all(
    config: ConfigDict,
    asked: Sequence[EncodedProblem],
    policy: PolicyFolder,
    output: Path,
    settings: dict[str, Any],
    display: Display,
) -> None:
    """Write the rows of all problems; whole batches that an interrupted run left are kept."""
    samples, name = settings["samples"], settings["name"]
    mesh = rollout_mesh(config)
    work = output.with_name(output.name + ".part")
    lock_folder(work)
    write_settings(output, settings)
    enable_compilation_cache(Path(config.cache_dir))
    model, params, tokenizer = load_policy(policy, mesh, config.student.dtype, display)
    engine = RolloutEngine(
        model,
        valid_vocab=tokenizer.size,
        prompt_buckets=prompt_lengths(config.data.prompt_buckets, config.data.max_prompt_tokens),
        max_new_tokens=config.rollout.max_new_tokens,
        slots=config.rollout.slots,
        mesh=mesh,
    )
    size = min(len(asked), max(1, config.eval.batch * config.eval.samples // samples))
    drawing = {key: config.rollout[key] for key in DRAWING}
    sampling = sampling_params((size, samples), tokenizer.stop_ids, **drawing)
    done = _whole_batches(work / "rows.jsonl", asked, size)
    with (
        make_grader(config, config.data.task) as grader,
        (work / "rows.jsonl").open("a", encoding="utf-8") as file,
        display.track("problems", len(asked), done) as track,
    ):
        for start in range(done, len(asked), size):
            batch = asked[start : start + size]
            with display.track("attempts", size * samples, part=True) as attempts:
                said = respond(
                    engine,
                    params,
                    [ids for _, ids in batch],
                    range(start, start + len(batch)),
                    tokenizer,
                    sampling,
                    seed=config.seed,
                    progress=attempts.drawn,
                )
            verdicts = grade_all(grader, said.texts, [problem for problem, _ in batch])
            right = np.array([v.reward == 1 for v in verdicts]).reshape(-1, samples).sum(1)
            cut = np.array(said.cut).reshape(-1, samples).sum(1)
            new = [
                _row(problem, name, {"passed": int(r), "samples": samples, "cut": int(c)})
                for (problem, _), r, c in zip(batch, right, cut, strict=True)
            ]
            lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in new]
            file.write("".join(lines))
            file.flush()
            track.advance(f"pass rate {np.mean(right) / samples:.3f}", len(batch))
    (work / "rows.jsonl").replace(output)
    unlock_folder(work)
    shutil.rmtree(work)


def _row(problem: Problem, name: str, counts: dict[str, int]) -> dict[str, Any]:
    """A problem as a row of the output, with the labels it has and the new ones."""
    row = {**problem.meta, "id": problem.id, "problem": problem.problem, "answer": problem.answer}
    new = {PASS_RATE: counts["passed"] / counts["samples"], PASS_COUNTS: counts}
    for column, label in new.items():
        known = problem.meta.get(column)
        row[column] = {**(known if isinstance(known, dict) else {}), name: label}
    return row


def _whole_batches(path: Path, asked: Sequence[EncodedProblem], size: int) -> int:
    """How many problems the whole batches in `path` hold; it is cut off after them.

    Batches of a resumed run are then those of an uninterrupted one, and so is every rounding.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last may be torn
    whole = len(lines) if len(lines) == len(asked) else len(lines) - len(lines) % size
    path.write_bytes(b"".join(line + b"\n" for line in lines[:whole]))
    return whole


def histogram(counts: Sequence[dict[str, int]], samples: int) -> str:
    """How many problems were solved 0, 1, …, `samples` times, as lines of text, and in words."""
    passed = np.array([c["passed"] for c in counts])
    times = np.bincount(passed, minlength=samples + 1)
    bars = [
        f"{i:>4}/{samples} {n:>7} {'#' * round(40 * n / times.max())}" for i, n in enumerate(times)
    ]
    cut = sum(c["cut"] for c in counts) / (len(counts) * samples)
    return "\n".join(
        [
            "solved  problems",
            *bars,
            f"{len(counts)} problems: {times[0]} never solved, {times[-1]} always; mean pass rate "
            f"{passed.mean() / samples:.3f}; {cut:.1%} of the attempts were cut by the limit",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    overrides, rest = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]")
    parser.add_argument("--data", required=True, metavar="PATH", help="see kdrl_jax.data.sources")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="Hugging Face or a run's")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="attempts (16)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument("--name", default="", help="of the model in the output")
    args = parser.read(rest)
    config, problems = read_config(args.config, overrides)
    problems += refused(config, READS)
    for key in ("samples", "limit"):
        if (value := getattr(args, key)) is not None and value < 1:
            problems.append(f"--{key}: {value} must be at least 1")
    if args.output.suffix != ".jsonl":
        problems.append(f"--output: {args.output} must end in .jsonl, which says how it is read")
    policy = None
    try:
        policy = find_policy(args.model, "--model", offline=config.offline, display=Display())
    except UserError as error:
        problems += error.problems
    if problems or policy is None:
        raise UserError(*problems)
    set_offline(config.offline)
    measure(
        config,
        args.data,
        policy,
        args.output,
        samples=args.samples,
        limit=args.limit,
        name=args.name,
    )


if __name__ == "__main__":
    run_entry(main)
