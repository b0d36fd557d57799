"""The configuration reference, read from configs/: keys, defaults, comments, variants.

`<!-- configuration: keys -->` in a page becomes a table for each section of configs/base.py, and
`<!-- configuration: files -->` what each other file changes.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from sphinx.application import Sphinx

from configs import base
from kdrl_jax.config import CONFIGS, flatten
from kdrl_jax.config_reference import entries, value_at

ROLES = ("student", "teacher")
NO_RUNS = ("__init__", "base", "shapes", "sources")


def keys() -> str:
    """A Markdown table for each section: key, type, default, meaning."""
    config, parts, section = base.get_config(), [], ""
    for entry in entries():
        if entry.section != section:
            section = entry.section
            parts += [f"\n## {section[0].upper()}{section[1:]}\n", *_HEAD]
        value = value_at(config, entry.key)
        comment = _cell(entry.comment)
        if entry.is_group:
            parts.append(f"| **`{entry.key}`** | | | {comment} |")
        else:
            kind = type(value).__name__
            parts.append(f"| `{entry.key}` | {kind} | {_code(value)} | {comment} |")
    return "\n".join(parts) + "\n"


_HEAD = ("| key | type | default | meaning |", "|---|---|---|---|")


def files() -> str:
    """For each config of the project: its docstring, what it changes and its variants."""
    parts, known = [], flatten(base.get_config())
    for path in sorted(CONFIGS.rglob("*.py")):
        if path.stem in NO_RUNS:
            continue
        name = ".".join(path.relative_to(CONFIGS).with_suffix("").parts)
        module = importlib.import_module(f"configs.{name}")
        parts += [f"## `configs/{path.relative_to(CONFIGS)}`\n", inspect.getdoc(module) or "", ""]
        config = flatten(module.get_config())
        is_run = known.keys() == config.keys()
        changed = {k: v for k, v in config.items() if not is_run or v != known[k]}
        head = "changes" if is_run else "has"
        parts += [f"| it {head} | to |" if is_run else "| key | value |", "|---|---|"]
        parts += [f"| `{key}` | {_code(value)} |" for key, value in changed.items()]
        if variants := getattr(module, "VARIANTS", {}):
            parts += ["", "| variant | changes |", "|---|---|"]
            for variant, changes in variants.items():
                said = ", ".join(f"`{key}` = {_code(value)}" for key, value in changes.items())
                parts.append(f"| `:{variant}` | {said} |")
        parts.append("")
    return "\n".join(parts) + "\n"


def _code(value: Any) -> str:
    return "`" + repr(value).replace("|", r"\|") + "`"


def _cell(comment: str) -> str:
    """A comment as the content of a Markdown table's cell."""
    return re.sub(r"([|<*$])", r"\\\1", comment)


def expand(app: Sphinx, page: str, source: list[str]) -> None:
    for name, text in (("keys", keys), ("files", files)):
        mark = f"<!-- configuration: {name} -->"
        if mark in source[0]:
            source[0] = source[0].replace(mark, text())


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", expand)
    return {"parallel_read_safe": True}
