"""Runs that train adapters: their keys, what their folder says of the base, and reading them.

The checkpoints of such a run hold adapters and their moments alone. `model/base.json` says which
weights they belong to: where these are, and a digest of their content, so that adapters are never
added to other weights than they were trained on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from kdrl_jax import processes
from kdrl_jax.config import digest
from kdrl_jax.models import Decoder, ModelConfig, load_hf
from kdrl_jax.models.checksums import THREADS, digest_of, read_sums
from kdrl_jax.models.hf_files import open_hf
from kdrl_jax.models.hub import Hub, hub_model_of, parse_hub_name
from kdrl_jax.models.lora import (
    ALL_LINEAR,
    TARGETS,
    LoRA,
    join,
    merge,
    merged_stored,
    projection_widths,
    split,
)
from kdrl_jax.sharding import param_shardings, path_name
from kdrl_jax.training.checkpoints import stored_steps
from kdrl_jax.training.integrity import CHECKSUMS, Damaged, read_meta
from kdrl_jax.training.run_weights import abstract_params, find_params, is_run, restore_params
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.types import Params, UserError

FILE = Path("model", "base.json")
_KEY = "student.lora"


def lora_of(flat: Mapping[str, Any]) -> LoRA | None:
    """What a flat, valid config asks for."""
    if not flat[f"{_KEY}.rank"]:
        return None
    chosen = flat[f"{_KEY}.targets"]
    targets = TARGETS if ALL_LINEAR in chosen else tuple(t for t in TARGETS if t in chosen)
    return LoRA(flat[f"{_KEY}.rank"], flat[f"{_KEY}.alpha"], targets)


def lora_problems(flat: Mapping[str, Any], sources: bool) -> Iterator[str]:
    """What is wrong with the keys of adapters, a line each.

    Args:
      sources: whether what a run reads must be there.
    """
    known = (ALL_LINEAR, *TARGETS)
    for name in [x for x in flat[f"{_KEY}.targets"] if x not in known]:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
        yield f"{_KEY}.targets: {name!r} is none of {', '.join(known)}; the nearest is {near[0]!r}"
    if flat[f"{_KEY}.rank"] <= 0:
        return
    if not flat[f"{_KEY}.targets"]:
        yield f"{_KEY}.targets: empty, so nothing would be trained; use ('{ALL_LINEAR}',)"
    if sources and not (flat["student.path"] or flat["student.sft.steps"]):
        yield (
            f"{_KEY}.rank: {flat[f'{_KEY}.rank']}, but the student has random weights, which are "
            "kept nowhere; give student.path or student.sft.steps, or set it to 0"
        )


def rank_problems(lora: LoRA | None, shape: ModelConfig) -> list[str]:
    """A line if the rank exceeds what the product of adapters can have."""
    if lora is None:
        return []
    widths = projection_widths(shape)
    least, name = min((min(widths[target]), target) for target in lora.targets)
    if lora.rank <= least:
        return []
    return [
        f"{_KEY}.rank: {lora.rank} exceeds the smaller side of the student's {name}, {least}; use "
        f"that or less, or leave it out of {_KEY}.targets"
    ]


@dataclasses.dataclass(frozen=True)
class Base:
    """The weights that a run's adapters are added to.

    Attributes:
      folder: a Hugging Face or run folder, absolute.
      step: which checkpoint of a run; None: it is a Hugging Face folder.
      digest: of the content, see `weights_digest`.
      hub: OWNER/NAME@COMMIT of a model that came from the hub; "" for any other.
    """

    folder: Path
    step: int | None
    digest: str
    hub: str = ""

    @classmethod
    def of(cls, folder: Path, step: int | None = None) -> Base:
        """What is in a folder now; of a run by default its newest checkpoint.

        Raises:
          UserError: it has no such checkpoint.
        """
        if is_run(folder):
            steps = stored_steps(folder / "checkpoints")
            step = max(steps, default=None) if step is None else step
            if step not in steps:
                wanted = "whole checkpoint" if step is None else f"checkpoint {step} any more"
                raise UserError(f"{folder}: holds no {wanted}; there are {steps}; copy it back")
        hub = str(hub_model_of(folder) or "")
        return cls(folder.absolute(), step, weights_digest(folder, step), hub)

    def found(self) -> Base:
        """Returns this with the folder where the weights are on this machine.

        A model of the hub may be in another cache than the run's; it is downloaded if it is in
        none.

        Raises:
          UserError: it cannot be had.
        """
        name = parse_hub_name(self.hub)
        if name is None or self.folder.is_dir():
            return self
        with processes.together():
            model = Hub().fetch({str(FILE): name})[str(FILE)]
        return dataclasses.replace(self, folder=model.folder)

    def require(self, where: Path) -> None:
        """Refuse weights that have gone or changed; the first process looks.

        Args:
          where: the file that says what they were.

        Raises:
          UserError: in every process.
        """

        def look() -> None:
            there = self.folder
            if self.step is not None:
                there = there / "checkpoints" / str(self.step)
            if not there.is_dir():
                raise UserError(
                    f"{where}: the adapters belong to the weights in {there}, which is no longer "
                    'there; put it back, or write where it is now as "folder" into this file'
                )
            if weights_digest(self.folder, self.step) != self.digest:
                raise UserError(
                    f"{where}: the adapters belong to other weights than those in {there}, which "
                    'have changed; put the old ones back, or write where they are as "folder" '
                    "into this file"
                )

        processes.first_does(look)


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run's folder says of its adapters."""

    file: Path
    lora: LoRA
    base: Base


def write_record(run: Path, lora: LoRA, base: Base) -> None:
    """Write `model/base.json` of a run."""
    where = dataclasses.asdict(base) | {"folder": str(base.folder)}
    text = json.dumps({"lora": dataclasses.asdict(lora), "base": where}, indent=2)
    write_atomic(run / FILE, text + "\n")


def read_record(run: Path) -> Record | None:
    """What `model/base.json` says; None: the run trains all weights.

    Raises:
      UserError: it cannot be read.
    """
    file = run / FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        lora = LoRA(**{**found["lora"], "targets": tuple(found["lora"]["targets"])})
        base = Base(**{**found["base"], "folder": Path(found["base"]["folder"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error!r}); copy it again") from error
    return Record(file, lora, base)


def weights_digest(folder: Path, step: int | None) -> str:
    """Names the content of weights: of a checkpoint by the checksums that were saved with it.

    Of files by their SHA-256, which SHA256SUMS may say; reading weights compares with that.
    """
    if step is None:
        files = sorted(folder.glob("*.safetensors"))
        listed = read_sums(folder) or {}
    else:
        checkpoint = folder / "checkpoints" / str(step)
        try:
            meta = read_meta(checkpoint) or {}
        except Damaged as error:
            raise UserError(f"{checkpoint}: damaged ({error}); copy it again") from error
        if CHECKSUMS in meta:
            sums = {k: v for k, v in meta[CHECKSUMS].items() if k.split("/")[0] == "params"}
            record = read_record(folder)
            return digest([sums, record.base.digest if record else ""])
        files = sorted(p for p in (checkpoint / "params").rglob("*") if p.is_file())
        folder, listed = checkpoint, {}
    names = [str(file.relative_to(folder)) for file in files]
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        return digest(list(pool.map(lambda n: [n, listed.get(n) or digest_of(folder / n)], names)))


def frozen_dtypes(model: Decoder) -> Params:
    """The dtypes in which weights are kept that are not trained."""
    frozen = jax.eval_shape(model.base.cast, model.base.shapes())
    return jax.tree.map(lambda x: x.dtype, frozen)


def load_weights(
    folder: Path,
    model: Decoder,
    mesh: Mesh,
    dtype: Any,
    step: int | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Params:
    """The weights of a Hugging Face or run folder on a mesh, adapters merged into them.

    Args:
      model: without adapters.
      dtype: of the weights, or a tree of dtypes.
      step: which checkpoint of a run; None: the newest.
      progress: told of the bytes read of Hugging Face files, see `load_hf`.

    Raises:
      UserError: see `load_hf`, `restore_params` and `Base.require`.
    """
    if not is_run(folder):
        return load_hf(folder, mesh=mesh, dtype=dtype, progress=progress)[1]
    record = read_record(folder)
    shardings = param_shardings(mesh, model.shapes())
    if record is None:
        return restore_params(folder, abstract_params(model, shardings, dtype), step)
    adapted = dataclasses.replace(model, lora=record.lora)
    adapters = restore_adapters(folder, adapted, mesh, step)
    base = load_base(record, model, mesh, dtype, progress)
    scale = record.lora.scale
    program = jax.jit(
        lambda base, adapters: merge(join(base, adapters), scale),
        out_shardings=shardings,
        donate_argnums=0,
    )
    return program(base, adapters)


def load_base(
    record: Record,
    model: Decoder,
    mesh: Mesh,
    dtype: Any,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Params:
    """The weights that a run's adapters belong to; see `load_weights`."""
    base = record.base.found()
    base.require(record.file)
    return load_weights(base.folder, model, mesh, dtype, base.step, progress)


def restore_adapters(folder: Path, model: Decoder, mesh: Mesh, step: int | None) -> Params:
    """The adapters of a run, float32 on a mesh.

    Args:
      model: with adapters.
    """
    shapes = adapter_shapes(model)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        param_shardings(mesh, shapes),
    )
    return restore_params(folder, like, step)


def adapter_shapes(model: Decoder) -> Params:
    """Shapes and dtypes of a model's adapters."""
    return split(model.shapes())[0]


def init_adapters(model: Decoder, key: jax.Array, mesh: Mesh) -> Params:
    """Fresh adapters, which change nothing yet, in their shards."""
    shardings = param_shardings(mesh, adapter_shapes(model))
    return jax.jit(model.init_trained, out_shardings=shardings)(key)


@contextlib.contextmanager
def open_weights(folder: Path, model: Decoder, step: int | None = None) -> Iterator[Params]:
    """The weights of a Hugging Face or run folder as a tree of things to be read piece by piece.

    Adapters are merged as they are read: blocks are float32, `dtype` says what the base is.

    Args:
      model: without adapters.

    Raises:
      UserError: as `load_weights`.
    """
    with contextlib.ExitStack() as stack:
        if not is_run(folder):
            _, arrays = stack.enter_context(open_hf(folder))
            yield jax.tree_util.tree_map_with_path(
                lambda path, _: arrays[path_name(path)], model.shapes()
            )
            return
        record = read_record(folder)
        if record is None:
            yield find_params(folder, model.shapes(), step)[1]
            return
        adapters = read_adapters(folder, model, record, step)
        place = record.base.found()
        place.require(record.file)
        base = open_weights(place.folder, model, place.step)
        yield merged_stored(stack.enter_context(base), adapters, record.lora.scale)


def read_adapters(folder: Path, model: Decoder, record: Record, step: int | None) -> Params:
    """The adapters of a run as host arrays."""
    shapes = adapter_shapes(dataclasses.replace(model, lora=record.lora))
    _, stored = find_params(folder, shapes, step)
    return jax.tree.map(lambda x: x.read([slice(None)] * len(x.shape)), stored)


def check_run(folder: Path, model: Decoder) -> None:
    """Refuse a run's folder whose weights are not there or are another model's, by headers alone.

    Args:
      model: without adapters.

    Raises:
      UserError: what is wrong.
    """
    record = read_record(folder)
    if record is None:
        find_params(folder, model.shapes())
        return
    find_params(folder, adapter_shapes(dataclasses.replace(model, lora=record.lora)))
    record.base.found().require(record.file)
