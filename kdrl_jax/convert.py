"""Between Orbax checkpoints and Hugging Face folders.

    python -m kdrl_jax.convert --checkpoint=RUN --output=HF_FOLDER [--step=N] [--dtype=bfloat16]
    python -m kdrl_jax.convert --hf=HF_FOLDER --output=RUN

RUN is the folder a training run wrote, its `checkpoints` folder, or one checkpoint in it. What
comes out of the first loads in `transformers`; what comes out of the second can be `student.path`
or `teacher.path`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax.numpy as jnp

from kdrl_jax.cli import run_entry
from kdrl_jax.data import load_tokenizer
from kdrl_jax.models import Decoder, load_hf, save_hf
from kdrl_jax.sharding import make_mesh, param_shardings
from kdrl_jax.training.checkpoints import abstract_params, restore_params, save_params
from kdrl_jax.training.roles import keep_model, read_model_config
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
      UserError: no checkpoint there, or `output` is in use.
    """
    if run.name.isdigit() and run.parent.name == "checkpoints":
        run, step = run.parent, int(run.name) if step is None else step
    if run.name == "checkpoints":
        run = run.parent
    if not (run / "model" / "config.json").is_file():
        raise UserError(f"--checkpoint: {run} holds no model/config.json; give a run's folder")
    model = Decoder(read_model_config(run))
    mesh = make_mesh(fsdp=-1, data=1)
    params = restore_params(
        run, abstract_params(model, param_shardings(mesh, model.shapes())), step
    )
    tokenizer = load_tokenizer(run / "model")
    save_hf(
        output,
        model,
        params,
        tokenizer_folder=run / "model",
        dtype=dtype and jnp.dtype(dtype),
        eos_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
    )


def from_hf(folder: Path, output: Path) -> None:
    """Write a Hugging Face folder as a run's folder: `model/` and one Orbax checkpoint.

    Raises:
      UserError: not a model folder, or `output` is in use.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output: {output} is not empty; give a new folder")
    model, params = load_hf(folder, mesh=make_mesh(fsdp=-1, data=1))
    tokenizer = load_tokenizer(folder)
    keep_model(output, model.config, tokenizer, lambda where: save_params(where, params))


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="RUN", help="Orbax to Hugging Face")
    source.add_argument("--hf", type=Path, metavar="HF_FOLDER", help="Hugging Face to Orbax")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the stored weights")
    args = parser.parse_args(argv)
    if args.checkpoint:
        to_hf(args.checkpoint, args.output, args.step, args.dtype)
    else:
        from_hf(args.hf, args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    run_entry(main)
