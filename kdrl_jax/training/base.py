"""The frozen weights of a student that trains adapters, and what its run's folder says of them."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdrl_jax import processes
from kdrl_jax.data import Tokenizer
from kdrl_jax.models import Decoder
from kdrl_jax.training.adapters import Base, frozen_dtypes, load_weights, read_record, write_record
from kdrl_jax.training.display import Display
from kdrl_jax.training.roles import build_role, kept_folder
from kdrl_jax.types import Params, UserError


def build_base(
    config: ConfigDict,
    model: Decoder,
    tokenizer: Tokenizer,
    mesh: Mesh,
    workdir: Path,
    display: Display,
) -> Params:
    """The frozen weights of a student with adapters, sharded on `mesh`, in its compute dtype.

    `workdir` is told which they are; a run that goes on must have the ones it began with.

    Args:
      model: with adapters.

    Raises:
      UserError: they are other weights than the run began with.
    """
    role, before = config.student, read_record(workdir)
    folder, step = Path(role.path), before.base.step if before else None
    display.say(describe(model))
    if role.sft.steps:
        params = build_role("student", config, model.base, tokenizer, mesh, display)
        params = jax.jit(model.base.cast)(params)
        folder, step = kept_folder("student", config, tokenizer), 0

    def write() -> None:
        assert model.lora is not None
        found = Base.of(folder, step)
        if before and before.base.digest != found.digest:
            raise UserError(
                f"{before.file}: the adapters were trained on other weights than those in {folder} "
                "now; put the old ones back, or use another --workdir"
            )
        write_record(workdir, model.lora, found)

    processes.first_does(write)
    if not role.sft.steps:
        if written := read_record(workdir):  # a run that is its base may have gone on meanwhile
            step = written.base.step
        with display.loading("student: weights") as progress:
            params = load_weights(folder, model.base, mesh, frozen_dtypes(model), step, progress)
    return params


def describe(model: Decoder) -> str:
    """'student: adapters of rank 16 on all-linear, 40.4 M numbers; 7,616 M stay as they are'."""
    lora = model.lora
    assert lora is not None
    trained, rest = lora.num_params(model.config) / 1e6, model.config.num_params / 1e6
    return (
        f"student: adapters of rank {lora.rank} on {lora.names}, {trained:.3g} M numbers; "
        f"{rest:,.4g} M stay as they are"
    )
