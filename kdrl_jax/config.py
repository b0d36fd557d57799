"""Loading a config file and applying overrides to it.

A config is a file with `get_config()`; every key and its default stand in `configs/base.py`.
`FILE:NAME` also applies the changes that the file's `VARIANTS` has under that name, `FILE:A,B`
those of A, then of B. Where there is no such file, the project's own of that name serves: `demo`,
`stage2:k3` and `configs/stage2.py:k3` work in any folder. What the values must be is checked in
`kdrl_jax.training.validation`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kdrl_jax.config_values import from_python, from_texts, must_be, unknown_key
from kdrl_jax.own_functions import find_here, is_here
from kdrl_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
_SHIPPED = ROOT / "kdrl_jax" / "shipped"  # setup.py puts the configs there in a wheel
CONFIGS = (_SHIPPED if _SHIPPED.is_dir() else ROOT) / "configs"
"""The project's own configs: the checkout's, or those of the installed package."""


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{'optimizer.learning_rate': 1e-6, …}."""
    flat: dict[str, Any] = {}
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """The config as sorted, indented JSON: what `DIR/config.json` holds."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def digest(value: Any) -> str:
    """Twelve hex digits that name a JSON-able value: cache keys, config comparison."""
    text = json.dumps(value, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_config(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> ConfigDict:
    """Run `get_config()` of a file and apply a variant and overrides.

    Args:
      path: a Python file, whose folder's parent is importable while it runs; or FILE:NAME[,NAME…],
        each NAME being a key of its `VARIANTS: dict[str, dict[str, value]]`. See `find_config`.
      overrides: texts such as 'optimizer.learning_rate=3e-6', several values with commas; or
        values of Python by key, see `update_config`.

    Raises:
      UserError: no such file, no `get_config`, no such variant, unknown keys (with the nearest),
        wrong types.
    """
    return _required(*read_config(path, overrides))


def read_config(
    path: str | Path, overrides: Sequence[str] | Mapping[str, Any]
) -> tuple[ConfigDict, list[str]]:
    """`load_config` that applies the overrides it can and returns what is wrong with the others.

    Raises:
      UserError: the file itself is of no use.
    """
    file, variant = find_config(path)
    for folder in (str(file.resolve().parent.parent), str(CONFIGS.parent)):
        if folder not in sys.path:
            sys.path.append(folder)
    spec = importlib.util.spec_from_file_location("kdrl_jax_config", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
        if not isinstance(config, ConfigDict):
            raise TypeError("get_config() must return a ConfigDict")
        variants = getattr(module, "VARIANTS", {})
        chosen = variant.split(",") if variant else []
        changes = {k: v for name in chosen for k, v in variants.get(name, {}).items()}
        config, wrong = _override(config, changes)
    except Exception as error:
        raise UserError(f"--config: {_where(error, file)}: {_why(error, file)}") from error
    if unknown := [name for name in chosen if name not in variants]:
        there = f"there are {', '.join(variants)}" if variants else "the file has none"
        raise UserError(f"--config: no variant {', '.join(map(repr, unknown))} in {file}; {there}")
    _required(config, [f"--config: {file}: variant {variant!r}: {line}" for line in wrong])
    return _override(config, overrides)


def saved_config(file: Path) -> ConfigDict:
    """A run's config.json, with today's defaults for keys that it has not, without unknown ones."""
    config = load_config(CONFIGS / "base.py")
    known = flatten(config)
    saved = flatten(ConfigDict(json.loads(file.read_text(encoding="utf-8"))))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known}
    config.update_from_flattened_dict(values)
    return config


def split_variant(path: str | Path) -> tuple[Path, str]:
    """'configs/stage2.py:k3' as (configs/stage2.py, 'k3'), 'stage2:k3' as (stage2, 'k3').

    Without a variant it is ''.
    """
    name, _, variant = str(path).partition(".py:")
    if variant:
        return Path(name + ".py"), variant
    if not name.endswith(".py"):
        name, _, variant = name.partition(":")
    return Path(name), variant


def find_config(path: str | Path) -> tuple[Path, str]:
    """The file that `--config` means, and the variant.

    Args:
      path: FILE[:VARIANT]. Where FILE is none, `NAME`, `NAME.py` and `configs/NAME.py` are the
        project's own of that name, wherever the command is given; for a path a line on stderr
        says so.

    Raises:
      UserError: there is no such file, with those that there are.
    """
    file, variant = split_variant(path)
    if file.is_file():
        return file, variant
    name = file.relative_to("configs") if file.parts[:1] == ("configs",) else file
    own = (CONFIGS / name).with_suffix(".py")
    if own.is_file():
        if file.suffix and not file.is_absolute():
            _say_once(f"--config: no file {file} here; {own} serves")
        return own, variant
    near = sorted(str(p) for p in file.parent.glob("*.py") if p.name != "__init__.py")
    if not near or not file.suffix:  # a name and no path
        near = sorted(p.stem for p in CONFIGS.glob("*.py") if p.name != "__init__.py")
    raise UserError(f"--config: no file {file}; there are {', '.join(near)}")


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def load_attribute(key: str, name: str, fits: Callable[[Any], bool], what: str) -> Any:
    """What 'module:attribute' names, in a module that Python finds, also in the working directory.

    Args:
      key: of the config, for errors.
      fits: whether an attribute is of the kind that is looked for; what: these, in words.

    Raises:
      UserError: no such module, one that fails, or no such attribute (with those that fit).
    """
    if is_here(name):
        return find_here(key, name)
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in map(os.path.abspath, sys.path):
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{key}: {name!r}: importing {module_name} failed, {type(error).__name__}: "
            f"{error}; name a module in the working directory or on PYTHONPATH"
        ) from error
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as error:
        there = ", ".join(n for n, v in vars(module).items() if fits(v) and not n.startswith("_"))
        raise UserError(
            f"{key}: {name!r}: {module_name} has no attribute {attribute!r}; there are "
            f"{there or f'no {what}'}"
        ) from error


def _where(error: Exception, file: Path) -> str:
    """'FILE:LINE' of the last frame in a config file that led to `error`."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{f.filename}:{f.lineno}" for f in frames if f.filename == str(file)]
    return lines[-1] if lines else str(file)


def _why(error: Exception, file: Path) -> str:
    """What a config file did wrong: a key that is none, a value of another type, or the error."""
    plain = f"{type(error).__name__}: {error}; see configs/demo.py"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    groups = [f for f in frames if isinstance(f.f_locals.get("self"), ConfigDict)]
    scopes = [f.f_locals for f in frames if f.f_code.co_filename == str(file)]
    if not groups or not scopes or not isinstance(error, AttributeError | KeyError | TypeError):
        return plain
    known = flatten(_defaults())
    group, called = groups[-1].f_locals["self"], groups[-1].f_locals
    name = next((called[x] for x in ("key", "name", "attribute") if x in called), None)
    roots = [x for x in scopes[-1].values() if isinstance(x, ConfigDict)]
    paths = [path for root in roots for path, at in _groups(root) if at is group]
    if not paths or not isinstance(name, str):
        return plain
    key = paths[0] + name
    if key not in known:
        return unknown_key(key, called.get("value"), known)
    return f"{key}: {called.get('value')!r} {must_be(known[key])}"


def _groups(config: ConfigDict, path: str = "") -> Iterator[tuple[str, ConfigDict]]:
    """('', config), ('rollout.', config.rollout), …"""
    yield path, config
    for name in config:
        if isinstance(config[name], ConfigDict):
            yield from _groups(config[name], f"{path}{name}.")


@functools.cache
def _defaults() -> ConfigDict:
    return load_config(CONFIGS / "base.py")


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A copy of `config` with `key=value` strings applied; see `load_config`."""
    return _required(*_override(config, overrides))


def update_config(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` with values of Python.

    Args:
      changes: by key, as in {"rollout.group_size": 8}, by groups, as in {"rollout":
        {"group_size": 8}}, or both. A whole number is a float too, a list or a single value a
        tuple, a path a text.

    Raises:
      UserError: one line for each key that is none, with the nearest or with what another
        trainer's name is here, and for each value of another type.
    """
    return _required(*_override(config, changes))


def _required(config: ConfigDict, problems: Sequence[str]) -> ConfigDict:
    if problems:
        raise UserError(*problems)
    return config


def _override(
    config: ConfigDict, overrides: Sequence[str] | Mapping[str, Any]
) -> tuple[ConfigDict, list[str]]:
    """A copy of `config` with the overrides that can be applied, and what is wrong with others."""
    config = config.copy_and_resolve_references()
    known = flatten(config)
    if isinstance(overrides, Mapping):
        updates, problems = from_python(overrides, known)
    else:
        updates, problems = from_texts(overrides, known)
    config.update_from_flattened_dict(updates)
    return config, problems
