"""Where the models are that a config or an option names: a folder, a run, or the hub."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kdrl_jax import processes
from kdrl_jax.models.hub import Hub, hub_model_of, parse_hub_name
from kdrl_jax.models.hub_files import HubName
from kdrl_jax.objectives import METHODS
from kdrl_jax.training.checkpoints import stored_steps
from kdrl_jax.training.display import Display
from kdrl_jax.types import UserError

MODEL_KEYS = ("student.path", "teacher.path", "tokenizer")
PROVENANCE = "provenance.json"
OR = " or "
REMEDY = "give a Hugging Face model folder, a run's folder, or a model of the hub, OWNER/NAME"


def used_keys(config: ConfigDict) -> dict[str, str]:
    """Returns the keys that name models which a run reads, with their values."""
    method = METHODS[config.objective]
    texts = {"student.path": config.student.path, "tokenizer": config.tokenizer}
    if method.uses_teacher:
        texts["teacher.path"] = config.teacher.path
    return {key: texts[key] for key in MODEL_KEYS if texts.get(key)}


def find_model(key: str, text: str) -> Path | HubName:
    """Returns the folder that `text` names, or the model of the hub. Asks no network.

    Args:
      key: the config key or option, for errors.
      text: a folder; OWNER/NAME[@REVISION]; or several of them, 'A or B': the first that is a
        folder with a model in it, else the last one.

    Raises:
      UserError: neither a folder nor the name of a model.
    """
    choices = text.split(OR)
    for choice in choices:
        if Path(choice).is_dir() and (len(choices) == 1 or holds_model(Path(choice))):
            return Path(choice)
    if name := parse_hub_name(choices[-1]):
        return name
    if text.startswith("hf://") or "huggingface.co/" in text:
        raise UserError(f"{key}: {text!r} is an address; write the model as OWNER/NAME[@REVISION]")
    raise UserError(f"{key}: no folder {choices[-1]}; {REMEDY}")


def holds_model(folder: Path) -> bool:
    """Whether a folder is a Hugging Face model, or a run that has saved a checkpoint."""
    if (folder / "model" / "config.json").is_file():
        return bool(stored_steps(folder / "checkpoints"))
    return (folder / "config.json").is_file()


def fetch_model(
    key: str, text: str, display: Display, *, offline: bool = False, weights: bool = True
) -> Path:
    """Returns the folder of one model, after downloading it if it is the hub's.

    Args:
      key, text: see `find_model`.
      weights: False: only the config and the tokenizer are needed.

    Raises:
      UserError: there is no such model, or it cannot be had.
    """
    return fetch_models({key: text}, display, offline=offline, weights=weights)[key]


def fetch_models(
    texts: Mapping[str, str],
    display: Display,
    *,
    offline: bool = False,
    weights: bool = True,
    recorded: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Returns the folders of models, after downloading those of the hub; see `fetch_model`.

    Args:
      texts: by key. The key `tokenizer` needs no weights.
      recorded: what a run took before, by key: it takes that again.

    Raises:
      UserError: a line for each model that cannot be had.
    """
    folders: dict[str, Path] = {}
    names: dict[str, HubName] = {}
    problems: list[str] = []
    for key, text in texts.items():
        try:
            place = find_model(key, (recorded or {}).get(key) or text)
        except UserError as error:
            problems += error.problems
            continue
        if isinstance(place, HubName):
            names[key] = place
        else:
            folders[key] = place
        if OR in text:
            display.say(f"{key}: {place}, of {text!r}")
    if names:
        needed = [key for key in names if weights and key != "tokenizer"]
        hub = Hub(offline=offline, say=display.say, loading=display.loading)
        try:
            models = hub.fetch(names, weights=needed)
        except UserError as error:
            problems += error.problems
        else:
            for key, model in models.items():
                folders[key] = model.folder
                if str(names[key]) != str(model):
                    display.say(f"{key}: {model}")
    if problems:
        raise UserError(*problems)
    return folders


def fetch_run_models(
    texts: Mapping[str, str],
    workdir: Path,
    display: Display,
    *,
    offline: bool,
    weights: bool,
) -> dict[str, Path]:
    """Returns the folders of all models that a run reads, by key; every process must call this.

    Args:
      texts: see `used_keys`.
      weights: False: only their configs and tokenizers are needed yet.

    The first process downloads, then one of each other host whose cache is its own: hosts that
    share a cache fill it once.

    Raises:
      UserError: in every process, a line for each model that cannot be had.
    """
    recorded = recorded_models(workdir)
    folders: dict[str, Path] = {}

    def fetch() -> None:
        options: dict[str, Any] = {"offline": offline, "weights": weights, "recorded": recorded}
        folders.update(fetch_models(texts, display, **options))

    if processes.count() > 1:
        if weights and any(parse_hub_name(text.split(OR)[-1]) for text in texts.values()):
            display.say(
                "models of the hub: each host has a copy of all files in its HF_HOME; hosts that "
                "share it have one"
            )
        processes.first_does(fetch)
    with processes.together():
        if not folders:
            fetch()
    return folders


def recorded_models(workdir: Path) -> dict[str, str]:
    """Returns what a run that has saved a checkpoint took for each key: a branch of the hub may
    have moved since, and of 'A or B' another one may be there.
    """
    if not stored_steps(workdir / "checkpoints"):
        return {}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        models = json.loads((workdir / PROVENANCE).read_text(encoding="utf-8"))[-1]["models"]
        return {f"{key}.path" if key != "tokenizer" else key: models[key]["path"] for key in models}
    return {}


def with_folders(config: ConfigDict, folders: Mapping[str, Path | str]) -> ConfigDict:
    """Returns a copy of a config that has the folders in place of the names."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({key: str(folder) for key, folder in folders.items()})
    return config


def model_name(folder: Path) -> str:
    """Returns OWNER/NAME@COMMIT for a folder of the hub's cache, else the folder's path."""
    return str(hub_model_of(folder) or folder)
