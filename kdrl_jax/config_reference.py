"""What configs/base.py says of its keys: for the documentation and for --help."""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import textwrap
import tokenize
from collections.abc import Collection, Iterator
from typing import Any

from ml_collections import ConfigDict

from kdrl_jax.config import CONFIGS, flatten, load_config

BASE = CONFIGS / "base.py"
MOST_USED = (
    "student.path",
    "teacher.path",
    "data.path",
    "objective",
    "reward.functions",
    "rollout.prompts_per_step",
    "rollout.group_size",
    "rollout.max_new_tokens",
    "optimizer.learning_rate",
    "steps",
)
"""What most first runs set."""
_HEADING = re.compile(r"# --- (.+?) -+$")


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
    text = BASE.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    lines = text.splitlines()
    functions = {f.name: f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef)}
    config = load_config(BASE)
    known = flatten(config)

    def above(line: int) -> str:
        found: list[str] = []
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
            value = value_at(config, key)
            maker = _called(statement.value)
            is_group = isinstance(value, ConfigDict)
            if maker == "mesh":
                comment += " " + (ast.get_docstring(functions["mesh"]) or "").partition("\n")[0]
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


def value_at(config: ConfigDict, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def describe_keys(keys: Collection[str] = (), width: int = 100) -> str:
    """Lines of 'key = default' and, indented, its meaning.

    Args:
      keys: which, with the first sentence of each; (): all, in sections, with all that is said.
      width: columns.
    """
    config, lines, section = load_config(BASE), [], ""
    of = {entry.key: entry for entry in entries()}
    for entry in [of[key] for key in keys] or of.values():
        if not keys and entry.section != section:
            section = entry.section
            lines += ["", f"{section}:"]
        if not entry.is_group:
            lines.append(f"  {entry.key} = {value_at(config, entry.key)!r}")
        elif entry.comment and not keys:
            lines.append(f"  {entry.key}.*")
        comment = re.split(r"(?<=\w)\. |; ", entry.comment)[0] if keys else entry.comment
        if comment:
            lines += textwrap.wrap(
                comment, width, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines).strip("\n")
