"""Ask a model: one prompt, a file of them, or a conversation; alone or beside another model.

    python -m kdrl_jax.generate --model=FOLDER                          a conversation
    python -m kdrl_jax.generate --model=FOLDER --prompt='What is 2+3?'  one answer, as it is drawn
    python -m kdrl_jax.generate --model=FOLDER --chat < turns.txt       a turn a line, from a pipe
    python -m kdrl_jax.generate --model=FOLDER --file=problems.jsonl --output=answers.jsonl
    python -m kdrl_jax.generate --model=STUDENT --beside=TEACHER --prompt=… --logprobs

A model is a Hugging Face folder, a run's folder (its newest checkpoint), RUN/checkpoints/STEP, or
one of the hub, OWNER/NAME[@REVISION], which is downloaded into the hub's cache.
Settings that are not given are those of the run, else --temperature=0.6, no truncation,
--max_new_tokens=1024 and the tokenizer's chat template, if it has one. Answers are drawn by the
engine that training uses, by numbers that seed, the prompt's number and the sample name alone. What
else is drawn at once, --batch, --tensor and the machine change rounding only: a draw within that of
the boundary between two tokens may take the other one, and the answer goes on from there.

What comes from a pipe is one prompt, line ends and all; with --chat each line that is not empty is
a turn of a conversation, answered as soon as it is there, and /reset and /quit do what they do at a
terminal. Answers go to stdout, everything else to stderr.

A file is .txt, a prompt a line, or whatever data.path of a run may be (hf://owner/name, too) with
the text in the column that --config.data.fields.problem names, else in the run's, `problem` or
`prompt`. Its answers are JSON Lines: id, sample, model, prompt, text, tokens (their count, the end
token included) and finish_reason ('stop' or 'length'); with --logprobs also log_probs, for each
token its text, id and log_prob, of the whole distribution at the temperature (at 0: of that at 1);
beside another model, whoever drew it, also beside_log_prob and log_ratio = log_prob −
beside_log_prob, the ℓ = log π/π_T that KDRL distils by. --json writes one prompt's answers in this
form too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from kdrl_jax.cli import run_entry, split_overrides
from kdrl_jax.config import CONFIGS, apply_overrides, load_config
from kdrl_jax.data import Tokenizer, check_tokenizer_pair, encode_content, find_style
from kdrl_jax.evaluation.model import PolicyFolder, find_policy, load_policy
from kdrl_jax.evaluation.planning import Refusals
from kdrl_jax.generation.asking import COLUMNS, read_prompts, write_rows
from kdrl_jax.generation.conversation import converse, read_turn
from kdrl_jax.generation.sampler import Sampler, Settings
from kdrl_jax.generation.screen import Screen
from kdrl_jax.generation.settings import has_template, limit_problems, run_settings, usual_dtype
from kdrl_jax.generation.show import CompileNotice
from kdrl_jax.rollout import DRAWING
from kdrl_jax.sharding import make_mesh
from kdrl_jax.training.compilation_cache import enable_compilation_cache
from kdrl_jax.training.display import Display, log_kind
from kdrl_jax.training.roles import mesh_problems
from kdrl_jax.types import Problem, UserError


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    overrides, rest = split_overrides(sys.argv[1:] if argv is None else argv)
    args = _arguments(rest)
    wrong = Refusals()
    policies = _policies(args, wrong)
    tokenizers = [found for p in policies if (found := wrong.attempt(p.tokenizer))]
    wrong.raise_any()
    known = run_settings(policies[0].folder, policies[0].step)
    if args.prompt_style is None:
        usual = "chat" if has_template(tokenizers[0]) else "plain"
        args.prompt_style = known.pop("prompt_style", usual)
    settings = _settings(args, known, wrong)
    windows = [policy.shape().max_positions for policy in policies]
    dtype = args.dtype or usual_dtype()
    mesh = wrong.attempt(_mesh, args.tensor, policies)
    if len(policies) == 2 and args.logprobs:
        try:
            check_tokenizer_pair(*tokenizers)
        except UserError as error:
            wrong += [p.replace("teacher.path", "--logprobs --beside") for p in error.problems]
    fields = wrong.attempt(_fields, overrides, known["fields"])
    problems = (fields and wrong.attempt(_prompts, args, *fields)) or []
    encoded = [
        _encode(problems, args.prompt_style, *pair, wrong)
        for pair in zip(tokenizers, windows, strict=True)
    ]
    if args.output and args.output.exists():
        wrong.append(f"--output: {args.output} exists; give a new file, or delete it")
    wrong.raise_any()
    assert mesh

    enable_compilation_cache(Path(known["cache_dir"]))
    names = _names(policies)
    live = args.file is None and settings.samples == 1 and not args.json
    samplers = []
    for name, policy in zip(names, policies, strict=True):
        print(f"{policy}: {dtype}, {mesh.size} x {jax.devices()[0].device_kind}", file=sys.stderr)
        slots = 0 if args.file is None else args.batch
        loaded = load_policy(policy, mesh, dtype)
        samplers.append(Sampler(name, *loaded, mesh, settings, live=live, slots=slots))
    with CompileNotice() as notice:
        if args.file is not None or args.json:
            asked = (samplers, names, problems, encoded)
            write_rows(*asked, args.output, batch=args.batch, log_probs=args.logprobs)
            return
        screen = Screen(samplers, names, args.logprobs, notice)
        if problems:
            screen.answer([[ids] for ids, *_ in encoded], 0)
        else:
            reading = {} if sys.stdin.isatty() else {"read": read_turn}
            converse(samplers, args.prompt_style, screen.answer, screen.say, **reading)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="Hugging Face or a run's")
    add("--beside", metavar="FOLDER", help="a second model, such as the teacher: answers too")
    add("--prompt", metavar="TEXT", help="default: a conversation, or what comes from a pipe")
    add("--chat", action="store_true", help="a conversation, from a pipe too: a turn a line")
    add(
        "--file",
        metavar="PATH",
        help="prompts, a .txt or as data.path; --config.data.fields.problem=COLUMN says where; "
        "answers are JSON Lines",
    )
    add("--output", type=Path, metavar="FILE", help="of --file or --json; default: stdout")
    add("--json", action="store_true", help="answers as JSON Lines")
    add("--logprobs", action="store_true", help="of each token; beside, of both models")
    add("--max_new_tokens", type=int, metavar="N", help="the end token takes one")
    add("--temperature", type=float, metavar="T", help="0: the likeliest token")
    add("--top_p", type=float, metavar="P", help="1: off")
    add("--top_k", type=int, metavar="K", help="0: off")
    add("--min_p", type=float, metavar="P", help="0: off")
    add("--samples", type=int, default=1, metavar="N", help="answers to each prompt (1)")
    add("--seed", type=int, default=0, metavar="N")
    add(
        "--prompt_style",
        metavar="STYLE",
        help="kdrl, zero_rl, chat, plain, module:function, or 'chat:…{problem}…'",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, else bfloat16")
    add("--tensor", type=int, default=1, metavar="N", help="devices that share each layer (1)")
    add("--batch", type=int, default=16, metavar="N", help="answers of --file drawn at once (16)")
    return parser.parse_args(argv)


def _policies(args: argparse.Namespace, wrong: Refusals) -> list[PolicyFolder]:
    found = []
    for option, folder in (("--model", args.model), ("--beside", args.beside)):
        if folder is not None and (
            policy := wrong.attempt(find_policy, folder, option, display=Display(beside=True))
        ):
            found.append(policy)
    return found


def _names(policies: Sequence[PolicyFolder]) -> list[str]:
    """Short names of the models that tell them apart."""
    short = [policy.name for policy in policies]
    return short if len(set(short)) == len(short) else [str(p) for p in policies]


def _settings(args: argparse.Namespace, known: dict[str, Any], wrong: Refusals) -> Settings:
    given = {key: getattr(args, key) for key in DRAWING}
    values = {key: known[key] if value is None else value for key, value in given.items()}
    wrong += limit_problems(vars(args) | values, "--")
    devices = jax.device_count()
    if not 1 <= args.tensor <= devices:
        wrong.append(f"--tensor: {args.tensor} must be from 1 to {devices}, the devices")
    if args.batch < 1:
        wrong.append(f"--batch: {args.batch} must be at least 1")
    if args.prompt is not None and args.file is not None:
        wrong.append("--prompt and --file: give one of them")
    if log_kind() == "quiet" and not args.output:
        wrong.append("--log=quiet: would drop the answers; add --output, with --file or --json")
    if args.output and args.file is None and not args.json:
        wrong.append("--output: is for the rows of --file or --json; add one of them")
    talks = args.chat or (args.prompt is None and args.file is None and sys.stdin.isatty())
    for option in ("prompt", "file"):
        if args.chat and getattr(args, option) is not None:
            wrong.append(f"--chat and --{option}: give one of them")
    if talks and (args.samples > 1 or args.json):
        option = "--json" if args.json else f"--samples={args.samples}"
        wrong.append(f"{option}: not in a conversation; give --prompt or --file")
    return Settings(**values, samples=args.samples, seed=args.seed)


def _mesh(tensor: int, policies: Sequence[PolicyFolder]) -> jax.sharding.Mesh | None:
    if not 1 <= tensor <= jax.device_count():
        return None
    mesh = make_mesh(1, 1, tensor, devices=jax.devices()[:tensor])
    problems = [
        line.replace("mesh.tensor", "--tensor", 1)
        for policy in policies
        for line in mesh_problems("mesh", mesh, str(policy), policy.shape())
    ]
    if problems:
        raise UserError(*problems)
    return mesh


def _fields(overrides: Sequence[str], known: ConfigDict) -> tuple[list[str], str]:
    """Returns the columns of a file's prompts, the first that there is counts, and that of ids.

    Args:
      known: `data.fields` of the run, or the default.
    """
    if foreign := [x for x in overrides if not x.startswith("data.fields.")]:
        raise UserError(
            *(
                f"--config.{item}: of a config this command takes data.fields.* alone; it has "
                "options of its own, see --help"
                for item in foreign
            )
        )
    config = load_config(CONFIGS / "base.py")
    config.data.fields = known
    fields = apply_overrides(config, overrides).data.fields
    given = any(item.startswith("data.fields.problem=") for item in overrides)
    columns = [fields.problem] if given else [*dict.fromkeys((fields.problem, *COLUMNS))]
    return columns, fields.id


def _prompts(args: argparse.Namespace, columns: Sequence[str], name: str) -> list[Problem]:
    """The prompts there are; none for a conversation."""
    if args.file is not None:
        return read_prompts(args.file, columns, name)
    if args.chat or (args.prompt is None and sys.stdin.isatty()):
        return []
    text = sys.stdin.read().strip() if args.prompt is None else args.prompt
    if not text.strip():
        raise UserError("--prompt: is empty; give a text, or none for a conversation")
    return [Problem("prompt", text, "")]


def _encode(
    problems: Sequence[Problem], style: str, tokenizer: Tokenizer, window: int, wrong: Refusals
) -> list[list[int]]:
    """Token ids of every prompt; what cannot be asked goes to `wrong`."""
    content = wrong.attempt(find_style, style)
    found: list[list[int]] = []
    for problem in problems if content else []:
        assert content
        ids = wrong.attempt(lambda p=problem: encode_content(content(p), tokenizer))
        if ids is not None and not 0 < len(ids) < window:
            wrong.append(
                f"{problem.id}: the prompt has {len(ids)} tokens, the model a window of {window} "
                "for prompt and answer; shorten it"
            )
        found.append(ids or [])
    return found


if __name__ == "__main__":
    run_entry(main)
