"""What README, docs and notebook say is so: their code runs, what they name exists."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from snippets import ROOT, check_command, commands, run_page, snippets
from test_structure import FLOORS

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
RUN = [page for page in PAGES if any(not s.needs for s in snippets(page))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "colab" / "kdrl_demo.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_code_and_commands_run(tmp_path, monkeypatch):
    """All pages in the order a reader meets them, in one folder: later ones use earlier runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, "."])  # as `python -m` has it
    before = set(sys.modules)
    names = {}
    for page in sorted(RUN, key=lambda page: (page.name != "README.md", page.stem != "tutorial")):
        names[page.name] = run_page(page, tmp_path / "cache")
    for name in set(sys.modules) - before:  # a file that a page shows
        if name.startswith("my_"):
            del sys.modules[name]
    assert float(names["README.md"]["loss"]) != 0
    assert float(names["README.md"]["rlad"]) != 0
    assert names["tutorial.md"]["REVERSE"].problems(2, 0)  # test_tasks grades with it
    assert {"tutorial.md", "howto.md", "pods.md"} <= names.keys()
    assert Path("runs/demo/curves.png").stat().st_size > 1000
    assert Path("exported/model.safetensors").exists()


def test_there_is_something_to_run():
    shown = [s for page in PAGES for s in snippets(page)]
    assert sum(not s.needs for s in shown) > 10
    assert {s.language for s in shown} == {"python", "bash"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_scripts_exist(page):
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", text)
    for name in names:
        assert (page.parent / name).exists(), name
    scripts = re.findall(r"\b(?:bash|python) ((?:launch|benchmarks)/\S+?\.(?:sh|py))", text)
    for name in scripts:
        assert (ROOT / name).exists(), name
    if page.name == "README.md":
        assert len(names) + len(scripts) > 4


def test_every_test_that_is_named_exists():
    """Docs link a claim to its test: [`test_name`](../tests/test_file.py)."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += re.findall(r"\[`(test_\w+)`\]\(\S*?(tests/\w+\.py)\)", text)
    assert len(found) > 30
    for test, file in found:
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), (test, file)


def test_the_drawings_of_the_house_are_those_of_the_test():
    """Floors from the entries down; architecture.md has every room, README the larger ones."""
    floors = [set(FLOORS[number]) for number in sorted(FLOORS, reverse=True)]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    house = page.partition("## The house")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in house.splitlines() if re.match(r"\| \d", line)]
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == floors
    drawing = README.partition("## What is in the package")[2].partition("\nImports go")[0]
    lines = [line.strip().split("   ")[0] for line in drawing.splitlines() if line.strip()]
    for line, rooms in zip(lines, floors, strict=True):
        assert set(re.findall(r"\w+", line)) <= rooms


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


TEXTS = {name_of(page): page.read_text(encoding="utf-8") for page in PAGES}
TEXTS |= {f"cell {i}": cell for i, cell in enumerate(CELLS)}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_commands_name_modules_flags_and_keys_that_exist(text):
    wrong = {s.code for page in PAGES for s in snippets(page) if s.exit_code}
    for code in wrong:
        text = text.replace(code, "")
    for module, arguments in commands(text):
        check_command(module, arguments)


def test_notebook_cells_are_python():
    assert NOTEBOOK["nbformat"] == 4
    for cell in CELLS:
        lines = [re.sub(r"^(\s*)(\w+ = )?[!%].*", r"\1pass", x) for x in cell.splitlines()]
        ast.parse("\n".join(lines))


def test_top_level():
    """Exactly the parts that the project promises, beside dot files."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    top = {name.partition("/")[0] for name in tracked if not name.startswith(".")}
    folders = {"kdrl_jax", "configs", "launch", "tests", "colab", "benchmarks", "docs"}
    texts = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"}
    assert top == folders | texts | {"setup.py", "pyproject.toml"}
