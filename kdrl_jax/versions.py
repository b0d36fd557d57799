"""Whether the packages of JAX that are installed fit together, by what jax's own metadata requires.

A release of jax names the releases of jaxlib that it works with and, under its extra `tpu`, the one
series of libtpu it was made with. jaxlib takes GPU plugins of its own version alone. Nothing here
imports jax, which answers a wrong jaxlib with a traceback.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

GPU_PLUGINS = {"jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13"}
"""The extra of jax that installs each."""


@dataclasses.dataclass(frozen=True)
class Installed:
    """Versions by package, and the requirements of jax, one a line as in its metadata."""

    versions: Mapping[str, str]
    requires: Sequence[str] = ()

    @classmethod
    def here(cls) -> Installed:
        """Reads the metadata of this environment; packages that are not there are left out."""
        versions = {}
        for name in ("jax", "jaxlib", "libtpu", *GPU_PLUGINS):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        requires = importlib.metadata.requires("jax") if "jax" in versions else None
        return cls(versions, requires or ())

    @property
    def released(self) -> bool:
        """Whether jax is a release; who builds it, or takes a nightly one, picks the others."""
        return "jax" in self.versions and not Version(self.versions["jax"]).is_prerelease


def package_problems(installed: Installed, platforms: str = "") -> list[str]:
    """One line for each of jaxlib and the GPU plugins that does not fit, with the remedy.

    Args:
      platforms: of JAX_PLATFORMS; plugins of platforms that are left out do not matter.
    """
    if not installed.released:
        return []
    problems = [*_misfits(installed, "jaxlib")]
    jaxlib = installed.versions.get("jaxlib")
    if jaxlib is None or (platforms and not {"cuda", "gpu"} & {*platforms.split(",")}):
        return problems
    for name, extra in GPU_PLUGINS.items():
        version = installed.versions.get(name)
        if version and Version(version).release != Version(jaxlib).release:
            problems.append(
                f"{name} {version} does not fit jaxlib {jaxlib}, which takes its own version "
                f"alone: {_remedy(installed, extra)}"
            )
    return problems


def libtpu_problem(installed: Installed | None = None) -> str:
    """Returns a line with the remedy where the package libtpu does not fit jax, else "".

    What TPU_LIBRARY_PATH names beside the package has been chosen by hand and is not looked at.

    Args:
      installed: default: this environment.
    """
    if installed is None:
        installed = Installed.here()
        chosen = os.environ.get("TPU_LIBRARY_PATH", "")
        if "libtpu" in installed.versions and os.path.exists(chosen):
            package = importlib.metadata.distribution("libtpu").locate_file("libtpu")
            if not Path(chosen).resolve().is_relative_to(Path(str(package)).resolve()):
                return ""
    return next(_misfits(installed, "libtpu", "tpu"), "") if installed.released else ""


def run_as_command() -> bool:
    """Whether this package is being imported as `python -m kdrl_jax.NAME` or `kdrl-NAME`."""
    program = sys.argv[0] if sys.argv else ""
    return program == "-m" or Path(program).name.startswith("kdrl-")


def require_packages() -> None:
    """Ends this process with exit code 2, as a mistake of the user's, where packages do not fit."""
    problems = package_problems(Installed.here(), os.environ.get("JAX_PLATFORMS", ""))
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    if problems:
        sys.exit(2)


def _misfits(installed: Installed, name: str, extra: str = "") -> Iterator[str]:
    """A line where `name` is installed, but not as jax, or that extra of it, requires."""
    version = installed.versions.get(name)
    for wanted in map(Requirement, installed.requires if version else ()):
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": extra})
        if wanted.name != name or not applies:
            continue
        if not wanted.specifier.contains(version or "", prereleases=True):
            yield (
                f"{name} {version} does not fit jax {installed.versions['jax']}, which wants "
                f"{name}{wanted.specifier}: {_remedy(installed, extra)}"
            )


def _remedy(installed: Installed, extra: str) -> str:
    package = f"jax[{extra}]" if extra else "jax"
    return f"pip install '{package}=={installed.versions['jax']}'"
