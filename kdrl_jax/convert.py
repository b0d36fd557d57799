"""Between Orbax checkpoints and Hugging Face folders, a few tensors in memory at a time.

    python -m kdrl_jax.convert --to=hf RUN OUTPUT [--step=N] [--dtype=bfloat16]
    python -m kdrl_jax.convert --to=peft RUN OUTPUT [--step=N]
    python -m kdrl_jax.convert --to=orbax HF_FOLDER|OWNER/NAME[@REVISION] OUTPUT

RUN is the folder a training run wrote, its `checkpoints` folder, or one checkpoint in it. What
comes out of the first loads in `transformers`, vLLM and SGLang; what comes out of the last can be
`student.path` or `teacher.path`. There and back again keeps every bit of the weights, their dtype,
config.json, generation_config.json and the tokenizer's files.

A run that trained adapters (student.lora) becomes whole weights by --to=hf: the sum is taken in
float32 and stored as its base is. --to=peft writes the adapters alone, as PEFT reads them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from kdrl_jax.cli import run_entry
from kdrl_jax.data import load_tokenizer
from kdrl_jax.models import Decoder, save_hf, save_peft
from kdrl_jax.models.hf_files import open_hf
from kdrl_jax.models.hub import parse_hub_name
from kdrl_jax.sharding import path_name
from kdrl_jax.training.adapters import Base, open_weights, read_adapters, read_record
from kdrl_jax.training.display import Display
from kdrl_jax.training.locate import fetch_model, find_model
from kdrl_jax.training.roles import keep_model, read_model_config
from kdrl_jax.training.run_weights import is_run, split_step
from kdrl_jax.training.streaming import counted, write_stored
from kdrl_jax.types import UserError

DTYPES = ("float32", "bfloat16", "float16")


def to_hf(run: Path, output: Path, step: int | None = None, dtype: str | None = None) -> None:
    """Write the student of a run as a Hugging Face folder with its tokenizer.

    Args:
      run: a run's folder, the `checkpoints` folder in it, or one checkpoint's folder.
      output: must not exist, or be an empty folder.
      step: which checkpoint; None: the newest.
      dtype: of the stored weights; None: that of the checkpoint.

    Raises:
      UserError: no whole checkpoint there, or `output` is in use.
    """
    run, step = _find_run(run, step, output)
    model = Decoder(read_model_config(run))
    tokenizer = load_tokenizer(run / "model")
    with open_weights(run, model, step) as params, Display().loading("weights") as progress:
        save_hf(
            output,
            model,
            counted(params, progress),
            tokenizer_folder=run / "model",
            config_folder=run / "model",
            dtype=dtype and jnp.dtype(dtype),
            eos_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            valid_vocab=tokenizer.size,
        )


def to_peft(run: Path, output: Path, step: int | None = None) -> Base:
    """Write the adapters of a run as a PEFT folder.

    Args:
      run, output, step: as of `to_hf`.

    Returns:
      The weights that they belong to.

    Raises:
      UserError: as `to_hf`; or the run trained all weights.
    """
    run, step = _find_run(run, step, output)
    record = read_record(run)
    if record is None:
        raise UserError(f"{run}: trained all weights, not adapters; use --to=hf")
    model = Decoder(read_model_config(run))
    adapters = read_adapters(run, model, record, step)
    base = parse_hub_name(record.base.hub)
    name, revision = (base.repo, base.revision) if base else (str(record.base.folder), None)
    save_peft(output, model.config, record.lora, adapters, name, revision)
    return record.base


def _find_run(run: Path, step: int | None, output: Path) -> tuple[Path, int | None]:
    """The run's folder and the step that `run` names, if that can be read and `output` written."""
    run, named = split_step(run)
    step = named if step is None else step
    problems = _check_output(output)
    if not run.is_dir():
        problems.append(f"{run}: no such folder; give a run's folder")
    elif not (run / "model" / "config.json").is_file():
        problems.append(f"{run}: holds no model/config.json; give a run's folder")
    elif not is_run(run):
        problems.append(f"{run}: holds no checkpoints/ folder; give a run's folder")
    if problems:
        raise UserError(*problems)
    return run, step


def to_orbax(source: str | Path, output: Path) -> None:
    """Write a Hugging Face folder as a run's folder: `model/` and one Orbax checkpoint.

    Weights keep the dtype they are stored in; it is whoever restores them that casts.

    Args:
      source: a folder, or a model of the hub, OWNER/NAME[@REVISION].
      output: must not exist, or be an empty folder.

    Raises:
      UserError: not a model folder, or `output` is in use.
    """
    problems, display = _check_output(output), Display()
    try:
        find_model("FROM", str(source))
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    folder = fetch_model("FROM", str(source), display)
    with display.loading("weights") as progress, open_hf(folder) as (config, arrays):
        tokenizer = load_tokenizer(folder)
        params = jax.tree_util.tree_map_with_path(
            lambda path, _: arrays[path_name(path)], Decoder(config).shapes()
        )
        params = counted(params, progress)
        keep_model(output, config, tokenizer, lambda at: write_stored(at, params), folder)


def _how_to_read(base: Base) -> str:
    """What PEFT needs first where a base is no Hugging Face folder."""
    if base.step is None:
        return ""
    return f": for PEFT make it one of its own, --to=hf {base.folder} FOLDER --step={base.step}"


def _check_output(output: Path) -> list[str]:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return []
    return [f"{output}: exists and is not an empty folder; give a new one"]


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--to", required=True, choices=("hf", "peft", "orbax"), help="the format to convert into"
    )
    parser.add_argument(
        "source", metavar="FROM", help="a run's or Hugging Face folder, or a model of the hub"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a folder that is yet to be")
    parser.add_argument("--step", type=int, help="to hf, peft: which checkpoint (default: newest)")
    parser.add_argument("--dtype", choices=DTYPES, help="to hf: of the stored weights")
    args = parser.parse_args(argv)
    keys = {"hf": (), "peft": ("dtype",), "orbax": ("step", "dtype")}[args.to]
    if given := [f"--{key}" for key in keys if getattr(args, key) is not None]:
        also = {"--step": "hf or --to=peft", "--dtype": "hf"}
        raise UserError(*(f"{x}: goes with --to={also[x]} only; leave it out" for x in given))
    if args.to == "hf":
        to_hf(Path(args.source), args.output, args.step, args.dtype)
    elif args.to == "peft":
        base = to_peft(Path(args.source), args.output, args.step)
        print(f"adapters of {base.hub or base.folder}" + _how_to_read(base))
    else:
        to_orbax(args.source, args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    run_entry(main)
