"""What README and notebook say is so: their code runs, what they name exists."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "colab" / "kdrl_demo.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]


def test_readme_code_runs():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert float(names["loss"]) != 0
    assert float(names["rlad"]) != 0
    assert names["REVERSE"].problems(2, 0)  # test_tasks grades with it


def test_links_and_scripts_exist():
    names = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    names += re.findall(r"\b(?:bash|python) ((?:launch|benchmarks)/\S+?\.(?:sh|py))", README)
    assert len(names) > 4
    for name in names:
        assert (ROOT / name).exists(), name


def test_every_config_is_in_the_table():
    table = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    named = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    files = {p.stem for p in (ROOT / "configs").glob("*.py")} - {
        "base",
        "shapes",
        "sources",
        "__init__",
    }
    assert files <= named


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    section = README.partition("### Dependencies")[2].partition("### Tests")[0]
    for requirement in project["dependencies"]:
        name = re.match(r"[\w-]+", requirement)[0]
        assert ">=" in requirement, requirement
        assert re.search(rf"\b{name}\b", section), name
    for extra in project["optional-dependencies"]:
        assert f"`{extra}`" in section, extra
    assert not any("torch" in r for r in project["dependencies"])


@pytest.mark.parametrize("text", [README, *CELLS], ids=["README", *map(str, range(len(CELLS)))])
def test_commands_name_modules_and_flags_that_exist(text):
    text = text.replace("\\\n", " ")
    for module, rest in re.findall(r"python -m (kdrl_jax\.\w+)(.*)", text):
        doc = importlib.import_module(module).__doc__
        source = Path(importlib.import_module(module).__file__).read_text(encoding="utf-8")
        source += (ROOT / "kdrl_jax" / "cli.py").read_text(encoding="utf-8")
        assert doc
        for flag in re.findall(r"(--[a-z_]+)(?==)", rest.partition("#")[0]):
            assert f'"{flag}"' in source, (module, flag)
        for config in re.findall(r"--config=(\S+)", rest):
            assert (ROOT / config).is_file(), config


def test_notebook_cells_are_python():
    assert NOTEBOOK["nbformat"] == 4
    for cell in CELLS:
        lines = [re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in cell.splitlines()]
        ast.parse("\n".join(lines))


def test_top_level():
    """Exactly the parts that the project promises, beside dot files."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    top = {name.partition("/")[0] for name in tracked if not name.startswith(".")}
    folders = {"kdrl_jax", "configs", "launch", "tests", "colab", "benchmarks"}
    assert top == folders | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
