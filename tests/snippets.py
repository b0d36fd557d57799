"""The code of README and docs: found in the fences, run in a folder, in order, as a reader would.

    ```python   is run; one whose first line is `# FILE.py` is that file, too
    ```bash     `python -m kdrl_jax.NAME …` is run in this process with the settings of TINY, each
                other line by bash

A block whose first line is `# needs WHAT` is not run, but for Python that needs a module that is
there; its modules, flags, configs and keys are checked all the same. `# exits with N` says how a
command ends.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from commands import HANG_S
from ml_collections import ConfigDict
from test_train import ROOT, TINY

from kdrl_jax.cli import EXIT_USER_ERROR, split_overrides
from kdrl_jax.config import find_config, load_config, read_config
from kdrl_jax.training.validation import validate
from kdrl_jax.types import UserError

_FENCE = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCRIPTS = {
    name: f"kdrl_jax.{target.partition(':')[2]}"
    for name, target in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]["scripts"].items()
}

QUICK = {  # few programs to compile: test_train.py has what is left out here
    "mesh.devices": "0:1",
    "teacher.sft.steps": 1,
    "student.sft.steps": 0,
    "eval.every": 2,
    "health.teacher_effect": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Snippet:
    page: str
    line: int
    language: str
    code: str

    @property
    def needs(self) -> str:
        """What the tests have not, in words; '' if nothing."""
        found = re.match(r"# needs (.+)\n", self.code)
        return found[1] if found else ""

    @property
    def exit_code(self) -> int:
        found = re.match(r"# exits with (\d+)\n", self.code)
        return int(found[1]) if found else 0

    @property
    def file(self) -> str:
        """The name that a first line `# my_words.py` gives it."""
        found = re.match(r"# (\w+\.py)\n", self.code)
        return found[1] if found else ""


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    return [
        Snippet(name, text.count("\n", 0, found.start()) + 2, found[1], found[2])
        for found in _FENCE.finditer(text)
    ]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """('kdrl_jax.train', arguments) for each of our commands anywhere in a text or code."""
    text = text.replace("\\\n", " ")
    pattern = rf"(?:python -m (kdrl_jax\.\w+)|\b({'|'.join(SCRIPTS)}))(?= |$)([^\n`]*)"
    found = []
    for module, script, rest in re.findall(pattern, text, re.MULTILINE):
        rest = re.split(r" #| \[--| …", rest)[0].replace("…", "X")
        found.append((module or SCRIPTS[script], shlex.split(rest)))
    return found


def check_command(module: str, arguments: list[str]) -> None:
    """The module is an entry, its flags are known, so are config, variant and keys."""
    assert importlib.util.find_spec(module), module
    found = importlib.import_module(module)
    assert found.__doc__
    overrides, rest = split_overrides(arguments)
    source = Path(found.__file__).read_text(encoding="utf-8")
    source += (ROOT / "kdrl_jax" / "cli.py").read_text(encoding="utf-8")
    for argument in rest:
        flag, _, value = argument.partition("=")
        if flag.startswith("--") and flag != "--help":
            assert f'"{flag}"' in source, (module, flag)
        if flag in ("--config", "--grid") and value and "X" not in value:
            assert find_config(value)[0].resolve().is_relative_to(ROOT / "configs"), value
            if flag == "--config":
                load_config(value)
                config, problems = read_config(value, overrides)
                assert not problems, problems
                if module == "kdrl_jax.train":
                    check_values(config)


def check_values(config: ConfigDict) -> None:
    """A training would begin if the files were there: nothing else is found to refuse."""
    try:
        validate(config)
    except UserError as error:
        others = [
            x
            for x in error.problems
            if not re.search(r": no (file|folder) |No module named 'my_", x)
        ]
        assert not others, others


def tiny(module: str, arguments: list[str], cache: Path) -> list[str]:
    """The arguments of a training with small settings for what they leave open, and few steps.

    Where the text asks for a number of steps, it continues a run: two more.
    """
    if module != "kdrl_jax.train":
        return arguments
    given = {item.partition("=")[0] for item in split_overrides(arguments)[0]}
    settings = {**TINY, **QUICK, "cache_dir": cache}
    settings = {key: value for key, value in settings.items() if key not in given}
    settings["steps"] = 4 if "steps" in given else 2
    kept = [a for a in arguments if not a.startswith("--config.steps=")]
    return [*kept, *(f"--config.{key}={value}" for key, value in settings.items())]


def run_shell(snippet: Snippet, cache: Path) -> None:
    for line in snippet.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[:2] == ["python", "-m"] and words[2].startswith("kdrl_jax."):
            module, arguments = words[2], words[3:]
        elif words[0] in SCRIPTS:
            module, arguments = SCRIPTS[words[0]], words[1:]
        else:
            subprocess.run(["bash", "-ec", line], check=True, timeout=HANG_S)
            continue
        main = importlib.import_module(module).main
        if snippet.exit_code:
            assert snippet.exit_code == EXIT_USER_ERROR
            with pytest.raises(UserError):
                main(arguments)
        else:
            check_command(module, arguments)
            main(tiny(module, arguments, cache))


def run_page(page: Path, cache: Path) -> dict:
    """Run what a page shows in the current folder; the names that its Python leaves."""
    names: dict = {"__name__": page.stem}
    for snippet in snippets(page):
        if snippet.language == "python":
            code = compile(snippet.code, f"{snippet.page}:{snippet.line}", "exec")
            if snippet.file:
                Path(snippet.file).write_text(snippet.code, encoding="utf-8")
            module = re.split(r"\W", snippet.needs)[0]
            if not module or importlib.util.find_spec(module):
                exec(code, names)
        elif not snippet.needs:
            run_shell(snippet, cache)
    return names
