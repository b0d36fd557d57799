"""The notebook's first cell where nothing is installed, with a Python that only notes what is asked
of pip, a repository on disk for one on GitHub, and a server for Colab's session service.
"""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import types
import zipfile
from pathlib import Path
from urllib.parse import quote

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "colab" / "kdrl_demo.ipynb"


class Fresh:
    """The first cell where nothing is installed: a folder, git, and a Python that notes what it
    is asked and says that it has none of the packages."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.bin, self.patch = folder / "content", folder / "bin", patch
        self.pip = folder / "pip"
        for made in (self.folder, self.bin, folder / "temporary"):
            made.mkdir()
        (self.bin / "git").symlink_to(shutil.which("git"))
        self.python(packages=False)
        patch.chdir(self.folder)
        patch.setenv("PATH", str(self.bin))
        patch.setenv("no_proxy", "*")
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        patch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
        patch.setitem(sys.modules, "libtpu", None)
        patch.setattr(sys, "executable", str(self.bin / "python"))
        patch.setattr(tempfile, "tempdir", str(folder / "temporary"))

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def python(self, *, packages: bool, pip: str = "exit 0") -> None:
        """Args: whether it can import what the notebook needs; what pip does."""
        has = "exit 0" if packages else "exit 1"
        note = f'printf "%s\\n" "$@" > {self.pip}'
        self.program("python", f'if [ "$1" = -c ]; then {has}; fi\n{note}\n{pip}')

    def on_colab(self, upload=lambda: {}) -> None:
        colab = types.ModuleType("google.colab")
        colab.files = types.SimpleNamespace(upload=upload)
        self.patch.setitem(sys.modules, "google", types.ModuleType("google"))
        self.patch.setitem(sys.modules, "google.colab", colab)

    def run(self, *, repository: str = "", sessions: str = "http://127.0.0.1:9/") -> list[str]:
        """What pip was asked to install; [] if it was not called."""
        cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        (source,) = ("".join(cell["source"]) for cell in cells if cell["id"] == "install")
        values = {"REPOSITORY": repository, "SESSIONS": sessions, "FOLDERS": (".",)}
        for name, value in values.items():
            source, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", source)
            assert count == 1
        exec(compile(source, "install", "exec"), {"__name__": "__main__"})
        if not self.pip.exists():
            return []
        asked = self.pip.read_text().splitlines()
        assert asked[:4] == ["-m", "pip", "install", "-q"]
        return asked[4:]


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    return Fresh(tmp_path, monkeypatch)


@pytest.fixture
def repository(fresh, tmp_path):
    """A bare repository with two branches, which stands for one on GitHub."""
    bare = tmp_path / "github" / "someone" / "kdrl"
    work = tmp_path / "work"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q", "--bare", "-b", "main", bare], check=True)
    subprocess.run([*git, "clone", "-q", bare, work], check=True, capture_output=True)
    for branch in ("main", "next/one"):
        subprocess.run([*git, "checkout", "-q", "-B", branch], cwd=work, check=True)
        (work / "branch").write_text(branch)
        subprocess.run([*git, "add", "."], cwd=work, check=True)
        subprocess.run([*git, "commit", "-q", "-m", branch], cwd=work, check=True)
        subprocess.run([*git, "push", "-q", "origin", branch], cwd=work, check=True)
    fresh.patch.setenv("GIT_CONFIG_COUNT", "1")
    fresh.patch.setenv("GIT_CONFIG_KEY_0", f"url.file://{tmp_path}/github/.insteadOf")
    fresh.patch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/")
    return bare


def branch_of(asked: list[str]) -> str:
    """Of the clone that pip was to install."""
    folder, extra = asked[0][:-6], asked[0][-6:]
    assert extra == "[plot]"
    return (Path(folder) / "branch").read_text()


@pytest.fixture
def sessions():
    """A function that serves an answer as Colab's session service, and returns its address."""
    servers = []

    def serve(answer: bytes, status: int = 200) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                found = status if self.path == "/api/sessions" else 404
                self.send_response(found)
                self.end_headers()
                self.wfile.write(answer if found == status else b"")

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/api/sessions"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def opened(url: str) -> bytes:
    """The session of a notebook, as Colab lists it."""
    name = "kdrl_demo.ipynb"
    return json.dumps([{"path": f"fileId={quote(url, safe='')}", "name": name}]).encode()


PAGE = "https://github.com/someone/kdrl/blob/next/one/colab/kdrl_demo.ipynb"


def archive(file: Path, top: str = "kdrl-main/", name: str = "kdrl_jax/train.py") -> Path:
    if file.name.endswith(".tar.gz"):
        with tarfile.open(file, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo(top + name), io.BytesIO())
    else:
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr(top + name, "")
    return file


@pytest.mark.parametrize("packages", [True, False])
def test_a_checkout_serves_where_it_is(fresh, capsys, packages):
    (fresh.folder / "kdrl_jax").mkdir()
    (fresh.folder / "kdrl_jax" / "train.py").touch()
    (fresh.folder / "colab").mkdir()
    fresh.patch.chdir(fresh.folder / "colab")
    fresh.python(packages=packages)
    assert fresh.run() == ([] if packages else ["-e.[plot]", "jax"])
    assert Path.cwd() == fresh.folder
    assert "this checkout" in capsys.readouterr().out


def test_what_is_installed_stays(fresh, capsys):
    fresh.python(packages=True)
    assert fresh.run(repository="anything") == []
    assert capsys.readouterr().out == "kdrl_jax: is installed\n"


def test_an_address_is_cloned_and_installed(fresh, repository, capsys):
    archive(fresh.folder / "other.zip")  # comes later
    asked = fresh.run(repository=str(repository))
    assert (branch_of(asked), asked[1:]) == ("main", ["jax"])
    assert capsys.readouterr().out.startswith(f"kdrl_jax: installing from {repository};")


def test_an_address_that_is_none_says_so(fresh, tmp_path):
    with pytest.raises(SystemExit, match=r"^REPOSITORY: git cannot clone .*nowhere.*fatal"):
        fresh.run(repository=str(tmp_path / "nowhere"))


def test_colab_knows_where_the_notebook_is_from(fresh, repository, sessions, capsys):
    fresh.on_colab()
    assert branch_of(fresh.run(sessions=sessions(opened(PAGE)))) == "next/one"
    assert "https://github.com/someone/kdrl, branch next/one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (opened("1AbCdEfGh"), 200),  # of somebody's Drive
        (opened("https://github.com/someone/kdrl/blob/--upload-pack=x/colab/a.ipynb"), 200),
        (opened("https://example.org/someone/kdrl/blob/main/colab/a.ipynb"), 200),
        (opened(PAGE), 500),
        (b"[]", 200),
        (b"[1]", 200),
        (b"no json", 200),
    ],
)
def test_otherwise_a_file_beside_it_serves(fresh, repository, sessions, answer, status):
    fresh.on_colab()
    file = archive(fresh.folder / "kdrl.zip")
    assert fresh.run(sessions=sessions(answer, status)) == [f"{file}[plot]", "jax"]


def test_a_repository_that_cannot_be_cloned_is_not_the_end(fresh, repository, sessions, capsys):
    fresh.on_colab()
    file = archive(fresh.folder / "kdrl.zip")
    gone = sessions(opened(PAGE.replace("someone", "nobody")))
    assert fresh.run(sessions=gone)[0] == f"{file}[plot]"
    assert "git cannot clone https://github.com/nobody/kdrl" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["kdrl_jax-0.1.0-py3-none-any.whl", "a.zip", "kdrl_jax-0.1.tar.gz"]
)
def test_of_files_the_projects_own_is_taken(fresh, name, capsys):
    file = archive(fresh.folder / name, top="" if name.endswith("whl") else "top/")
    archive(fresh.folder / "photos.zip", name="train.py")
    (fresh.folder / "broken.zip").write_bytes(file.read_bytes()[:40])
    (fresh.folder / "broken.tar.gz").write_bytes(file.read_bytes()[:40])
    assert fresh.run() == [f"{file}[plot]", "jax"]
    assert f"installing from {file};" in capsys.readouterr().out


def test_the_newest_file_is_taken(fresh):
    for name, time in (("a.zip", 2), ("b.zip", 3), ("c.tar.gz", 1)):
        os.utime(archive(fresh.folder / name), (time, time))
    assert fresh.run()[0] == f"{fresh.folder}/b.zip[plot]"


def test_colab_asks_for_a_file(fresh, capsys):
    fresh.on_colab(lambda: {archive(Path("mine.zip")).name: b""})
    assert fresh.run() == [f"{fresh.folder}/mine.zip[plot]", "jax"]
    assert "the uploaded mine.zip" in capsys.readouterr().out


@pytest.mark.parametrize("colab", [True, False])
def test_without_any_of_it_a_line_says_what_to_do(fresh, colab):
    if colab:
        fresh.on_colab()
    with pytest.raises(SystemExit, match=r"give REPOSITORY above, or put its wheel or an archive"):
        fresh.run()
    assert not fresh.pip.exists()


@pytest.mark.parametrize(
    ("said", "jax"),
    [("echo 580.65.06", "jax[cuda13]"), ("echo 550.54.15", "jax[cuda12]"), ("exit 9", "jax")],
)
def test_jax_is_that_of_the_driver(fresh, said, jax):
    fresh.program("nvidia-smi", said)
    archive(fresh.folder / "kdrl.zip")
    assert fresh.run()[1] == jax


def test_what_pip_says_against_it_is_shown(fresh):
    archive(fresh.folder / "kdrl.zip")
    fresh.python(packages=False, pip="echo no room >&2; exit 1")
    with pytest.raises(SystemExit, match="pip cannot install it:\nno room"):
        fresh.run()
