"""The wheel: what is in it, and that its commands work in a folder that knows no checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from commands import HANG_S, xla_flags
from test_train import ROOT, TINY

import kdrl_jax

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = ("kdrl_jax", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def pip(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index", "--quiet"],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, for building leaves files beside them."""
    pytest.importorskip("setuptools", minversion="77", reason="the extra `test` has it")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", output, source)
    (file,) = output.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--target", target, wheel)
    return target


def test_what_is_in_the_wheel(wheel):
    """All of the package, template and data files too, and the configs within it."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(_one(names, "/METADATA")).decode())
        entries = archive.read(_one(names, "/entry_points.txt")).decode()
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "kdrl_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {f"kdrl_jax/shipped/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == wanted
    assert any(name.endswith("licenses/LICENSE") for name in about)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().startswith("# kdrl_jax")
    assert dict(re.findall(r"^(\S+) = (\S+)$", entries, re.MULTILINE)) == PROJECT["scripts"]


def _one(names: set[str], end: str) -> str:
    (found,) = (name for name in names if name.endswith(end))
    return found


def run(installed: Path, folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(installed), "XLA_FLAGS": xla_flags()}
    return subprocess.run(
        [sys.executable, str(installed / "bin" / name), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=HANG_S,
    )


def test_training_from_another_folder(installed, tmp_path):
    """Two steps of the demo, and the same command again; the configs are those of the wheel."""
    flags = [f"--config.{key}={value}" for key, value in {**TINY, "steps": 2}.items()]
    shipped = installed / "kdrl_jax" / "shipped" / "configs" / "demo.py"
    done = run(installed, tmp_path, "kdrl-train", "--config=configs/demo.py", *flags)
    assert done.returncode == 0, done.stderr
    assert f"no file configs/demo.py here; {shipped} serves" in done.stderr
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert summary["finished"]
    (start,) = json.loads((tmp_path / "runs" / "demo" / "provenance.json").read_text())
    assert start["kdrl_jax"] == {"version": kdrl_jax.__version__, "commit": ""}
    ask = ("--model=runs/demo", "--prompt=1+2=", "--max_new_tokens=4")
    done = run(installed, tmp_path, "kdrl-generate", *ask)
    assert done.returncode == 0, done.stderr


def test_mistakes_are_said_in_a_line_each(installed, tmp_path):
    done = run(installed, tmp_path, "kdrl-train", "--config=demo", "--config.beta.inti=1",
               "--config.steps=0")  # fmt: skip
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2, done.stderr
    assert "beta.inti: no such key; the nearest is beta.init" in lines[0]
    assert "Traceback" not in done.stderr
    done = run(installed, tmp_path, "kdrl-plan", "--config=stage3", "--topology=v5p-32")
    assert done.returncode == 2
    assert "there are base, demo, grpo" in done.stderr


CODE = """
import importlib, sys
for name in sys.argv[1:]:
    command = getattr(importlib.import_module("kdrl_jax.scripts"), name)
    sys.argv = [name, "--help"]
    try:
        command()
        print(name, 0)
    except SystemExit as end:
        print(name, end.code)
"""


def test_every_entry_is_a_command(installed, tmp_path):
    """All in one process, for most of their time is the import of JAX."""
    entries = sorted(
        path.stem
        for path in (ROOT / "kdrl_jax").glob("*.py")
        if "    run_entry(main)" in path.read_text(encoding="utf-8")
    )
    commands = {target.partition(":")[2]: name for name, target in PROJECT["scripts"].items()}
    assert {"train", "evaluate", "convert", "report", "plan"} <= set(entries) <= set(commands)
    assert all((installed / "bin" / name).is_file() for name in commands.values())
    done = subprocess.run(
        [sys.executable, "-c", CODE, *entries],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "XLA_FLAGS": xla_flags()},
        timeout=HANG_S,
    )
    ends = [line for line in done.stdout.splitlines() if re.fullmatch(r"\w+ \w+", line)]
    assert ends == [f"{name} 0" for name in entries], done.stderr
