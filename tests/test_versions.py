"""Packages of JAX that do not fit together are named in one line, before anything is compiled."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from kdrl_jax import plan, versions
from kdrl_jax.cli import EXIT_USER_ERROR
from kdrl_jax.config import ROOT, load_config
from kdrl_jax.planning import run_plan
from kdrl_jax.planning.machines import parse_topology
from kdrl_jax.planning.run_plan import make_run_plan
from kdrl_jax.sharding import make_mesh
from kdrl_jax.types import UserError
from kdrl_jax.versions import Installed, libtpu_problem, package_problems

STAGE2 = f"--config={ROOT}/configs/stage2.py"
REQUIRES = (  # as jax 0.10.2 has them
    "jaxlib<=0.10.2,>=0.10.1",
    "ml_dtypes>=0.5.0",
    'jaxlib==0.10.1; extra == "ci"',
    'jaxlib<=0.10.2,>=0.10.2; extra == "tpu"',
    'libtpu==0.0.42.*; extra == "tpu"',
    'jax-cuda13-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda13"',
)


def installed(jax: str = "0.10.2", jaxlib: str = "0.10.2", **others: str) -> Installed:
    found = {name.replace("_", "-"): version for name, version in others.items()}
    return Installed({"jax": jax, "jaxlib": jaxlib, **found}, REQUIRES)


@pytest.mark.parametrize(
    ("libtpu", "fits"),
    [("0.0.42", True), ("0.0.42.1", True), ("0.0.41", False), ("0.0.52", False), ("0.0.4", False)],
)
def test_libtpu_is_of_the_series_that_jax_requires(libtpu, fits):
    line = libtpu_problem(installed(libtpu=libtpu))
    if fits:
        assert not line
    else:
        assert line == (
            f"libtpu {libtpu} does not fit jax 0.10.2, which wants libtpu==0.0.42.*: "
            "pip install 'jax[tpu]==0.10.2'"
        )


def test_what_is_not_there_or_is_no_release_is_no_problem():
    assert not libtpu_problem(installed())
    assert not libtpu_problem(Installed({}))
    assert not package_problems(Installed({"jaxlib": "0.1"}))
    nightly = installed("0.10.3.dev20260701", "0.10.3.dev20260701", libtpu="0.0.43.dev20260701")
    assert not libtpu_problem(nightly)
    assert not package_problems(nightly)


@pytest.mark.parametrize(
    ("jaxlib", "fits"), [("0.10.2", True), ("0.10.1", True), ("0.10.0", False), ("0.12.0", False)]
)
def test_jaxlib_is_of_the_range_that_jax_requires(jaxlib, fits):
    lines = package_problems(installed(jaxlib=jaxlib))
    wanted = (
        f"jaxlib {jaxlib} does not fit jax 0.10.2, which wants jaxlib<=0.10.2,>=0.10.1: "
        "pip install 'jax==0.10.2'"
    )
    assert lines == ([] if fits else [wanted])


def test_plugins_for_gpus_are_of_jaxlibs_version():
    assert not package_problems(installed(jax_cuda13_plugin="0.10.2"))
    assert package_problems(installed(jax_cuda13_plugin="0.10.1")) == [
        "jax-cuda13-plugin 0.10.1 does not fit jaxlib 0.10.2, which takes its own version alone: "
        "pip install 'jax[cuda13]==0.10.2'"
    ]
    both = installed(jaxlib="0.12.0", jax_cuda12_plugin="0.10.2")
    lines = package_problems(both)
    assert [line.split()[0] for line in lines] == ["jaxlib", "jax-cuda12-plugin"]
    assert len(package_problems(both, "cpu")) == 1  # where no GPU is wanted it does not matter
    assert package_problems(both, "cuda,cpu") == lines


def test_the_rule_for_plugins_is_jaxlibs_own():
    """`jaxlib.plugin_support` decides at run time."""
    rule = pytest.importorskip("jaxlib.plugin_support").check_plugin_version
    for jaxlib in ("0.10.1", "0.10.2", "0.12.0.1"):
        for plugin in ("0.10.1", "0.10.2", "0.10.2.dev1", "0.12.0", "0.12.0.1", "0.12.0.1+own"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fits = rule("jax_cuda13_plugin", jaxlib, plugin)
            packages = {"jax": jaxlib, "jaxlib": jaxlib, "jax-cuda13-plugin": plugin}
            assert bool(package_problems(Installed(packages))) is not fits, (jaxlib, plugin)


def test_this_environment_fits():
    """And the metadata of the jax that is here reads as the tests above have it."""
    here = Installed.here()
    assert here.versions["jax"] == importlib.metadata.version("jax")
    assert package_problems(here) == []
    named = [line for line in here.requires if line.startswith(("jaxlib", "libtpu", "jax-cuda13"))]
    assert len(named) >= 3, here.requires
    wrong = Installed({**here.versions, "libtpu": "0.0.1", "jaxlib": "0.0.1"}, here.requires)
    if here.released:
        assert libtpu_problem(wrong).startswith("libtpu 0.0.1 does not fit jax ")
        assert package_problems(wrong)[0].startswith("jaxlib 0.0.1 does not fit jax ")


# --- as commands find it -----------------------------------------------------------------------


def distribution(folder: Path, name: str, version: str, requires: Sequence[str] = ()) -> None:
    """The metadata of a package, as an installer leaves it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_with(folder: Path, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m …` with the packages in `folder` before all others."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("module", ["train", "plan", "generate"])
def test_a_command_names_a_wrong_jaxlib_before_jax_stops(tmp_path, module):
    distribution(tmp_path, "jax", "0.10.2", REQUIRES)
    distribution(tmp_path, "jaxlib", "0.9.2")
    distribution(tmp_path, "jax_cuda13_plugin", "0.10.2")
    (tmp_path / "jax.py").write_text("raise RuntimeError('jaxlib is too old')\n")
    done = run_with(tmp_path, f"kdrl_jax.{module}", "--help", JAX_PLATFORMS="")
    assert done.returncode == EXIT_USER_ERROR
    assert not done.stdout
    assert done.stderr.splitlines() == [
        "error: jaxlib 0.9.2 does not fit jax 0.10.2, which wants jaxlib<=0.10.2,>=0.10.1: "
        "pip install 'jax==0.10.2'",
        "error: jax-cuda13-plugin 0.10.2 does not fit jaxlib 0.9.2, which takes its own version "
        "alone: pip install 'jax[cuda13]==0.10.2'",
    ]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("-m", True),  # `python -m kdrl_jax.train`, while this package is being imported
        ("/usr/bin/kdrl-train", True),
        ("/usr/lib/python3/site-packages/pytest/__main__.py", False),
        ("my_own_kdrl-train.py", False),
        ("", False),
    ],
)
def test_only_commands_end_the_process(monkeypatch, program, expected):
    monkeypatch.setattr(sys, "argv", [program, "--config=demo"])
    assert versions.run_as_command() is expected


@pytest.fixture
def newer_libtpu(tmp_path, monkeypatch):
    """libtpu 0.0.9999 is installed beside the jax that is here."""
    distribution(tmp_path, "libtpu", "0.0.9999")
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "libtpu.so").touch()
    library = f"def get_library_path():\n    return {str(tmp_path / 'libtpu' / 'libtpu.so')!r}\n"
    (tmp_path / "libtpu" / "__init__.py").write_text(library)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    if not Installed.here().released:
        pytest.skip("this jax is no release")
    return tmp_path


def test_plan_refuses_it_before_compiling(newer_libtpu, monkeypatch, capsys):
    monkeypatch.setattr(run_plan, "devices_of", lambda machine: pytest.fail("asked the compiler"))
    jax = importlib.metadata.version("jax")
    line = f"libtpu 0.0.9999 does not fit jax {jax}, which wants libtpu==0.0."
    with pytest.raises(UserError) as error:
        plan.main([STAGE2, "--topology=v5p-32", "--config.nosuch=1", "--compile=upd"])
    named = [problem for problem in error.value.problems if problem.startswith(line)]
    assert len(named) == 1
    assert f"pip install 'jax[tpu]=={jax}'; or give --compile=none" in named[0]
    assert len(error.value.problems) == 3  # with whatever else is wrong
    with pytest.raises(UserError, match=r"^libtpu 0\.0\.9999 does not fit"):
        make_run_plan(load_config(STAGE2.partition("=")[2]), parse_topology("v5p-32"))
    plan.main([STAGE2, "--topology=v5p-32", "--compile=none"])  # which has no use for it
    assert capsys.readouterr().out.rstrip().endswith("fits")


def test_plan_says_so_in_one_line(newer_libtpu):
    done = run_with(newer_libtpu, "kdrl_jax.plan", STAGE2, "--topology=v5p-32", "--check")
    assert done.returncode == EXIT_USER_ERROR
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: libtpu 0.0.9999 does not fit jax ")


def test_a_library_chosen_by_hand_is_not_looked_at(newer_libtpu, tmp_path_factory, monkeypatch):
    assert libtpu_problem()
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(newer_libtpu / "libtpu" / "libtpu.so"))
    assert libtpu_problem()  # the package itself sets that
    other = tmp_path_factory.mktemp("other") / "libtpu.so"
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(other))
    assert libtpu_problem()  # not there: jax takes the package's
    other.touch()
    assert not libtpu_problem()


def test_a_run_on_tpus_is_warned(newer_libtpu):
    """Only plans need the text of programs, so a run goes on."""
    tpus = [types.SimpleNamespace(platform="tpu", slice_index=i) for i in range(3)]
    with (
        pytest.warns(RuntimeWarning, match=r"^libtpu 0\.0\.9999 does not fit .* may fail$"),
        pytest.raises(UserError, match="neither is a multiple of the 3 slices"),
    ):
        make_mesh(data=1, tensor=3, devices=tpus)
