"""The configuration reference, read from configs/: keys, defaults, comments, variants.

`<!-- configuration: keys -->` in a page becomes a table for each section of configs/base.py, and
`<!-- configuration: files -->` what each other file changes.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import tokenize
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from sphinx.application import Sphinx

from configs import base
from kdrl_jax.config import CONFIGS, flatten

_HEADING = re.compile(r"# --- (.+?) -+$")
ROLES = ("student", "teacher")
NO_RUNS = ("__init__", "base", "shapes", "sources")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A key, or a group of keys, as configs/base.py has it."""

    section: str
    key: str
    comment: str
    is_group: bool


def entries() -> list[Entry]:
    """Every key of `get_config()`, in the order of the file, with what its comments say.

    A comment is behind the key or in the lines above it; above a group it is the group's.
    """
    with open(base.__file__, "rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    with open(base.__file__, encoding="utf-8") as file:
        text = file.read()
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    lines = text.splitlines()
    functions = {f.name: f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef)}
    config, known = base.get_config(), flatten(base.get_config())

    def above(line: int) -> str:
        found = []
        while (line := line - 1) in comments and lines[line - 1].lstrip().startswith("#"):
            if _HEADING.match(comments[line].string):
                break
            found.insert(0, comments[line].string.lstrip("# "))
        return " ".join(found)

    def of(function: str, prefix: str, section: str) -> Iterator[Entry]:
        headings = {n: m[1] for n, t in comments.items() if (m := _HEADING.match(t.string))}
        for statement in functions[function].body:
            if not isinstance(statement, ast.Assign):
                continue
            target = ast.unparse(statement.targets[0])
            if isinstance(statement.targets[0], ast.Tuple) or not target.startswith("c."):
                continue
            first, last = statement.lineno, statement.end_lineno or statement.lineno
            passed = [n for n in headings if n < first]
            section = headings[max(passed)] if passed and not prefix else section
            key = prefix + target.removeprefix("c.")
            behind = " ".join(
                comments[n].string.lstrip("# ") for n in range(first, last + 1) if n in comments
            )
            comment = " ".join(filter(None, (above(first), behind)))
            value = _at(config, key)
            maker = _called(statement.value)
            is_group = isinstance(value, ConfigDict)
            if maker == "mesh":
                comment += " " + inspect.getdoc(base.mesh).partition("\n")[0]
            yield Entry(section, key, comment, is_group)
            if maker == "model":
                yield from of("model", key + ".", section)
            elif is_group and (maker == "mesh" or ast.unparse(statement.value) != "ConfigDict()"):
                yield from (Entry(section, f"{key}.{name}", "", False) for name in value)

    found = list(of("get_config", "", "The run"))
    missing = known.keys() - {entry.key for entry in found}
    if missing:
        raise ValueError(f"configs/base.py: the reference lacks {sorted(missing)}")
    return list({entry.key: entry for entry in found}.values())


def _called(value: ast.expr) -> str:
    return ast.unparse(value.func) if isinstance(value, ast.Call) else ""


def _at(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def keys() -> str:
    """A Markdown table for each section: key, type, default, meaning."""
    config, parts, section = base.get_config(), [], ""
    for entry in entries():
        if entry.section != section:
            section = entry.section
            parts += [f"\n## {section[0].upper()}{section[1:]}\n", *_HEAD]
        value = _at(config, entry.key)
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
