"""`<!-- modules: kdrl_jax.objectives -->` in a page becomes the reference of those modules."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx

import kdrl_jax

_MARK = re.compile(r"^<!-- modules: (.+?) -->$", re.MULTILINE)
_SECTION = """## {name}

```{{eval-rst}}
.. automodule:: {name}
```
"""


def public_modules() -> list[str]:
    """Every module of the package whose name has no part that begins with an underscore."""
    found = pkgutil.walk_packages(kdrl_jax.__path__, "kdrl_jax.")
    names = sorted(module.name for module in found)
    return [n for n in names if not any(part.startswith("_") for part in n.split("."))]


def entries() -> list[str]:
    """The modules that are commands: those at the top with a `main`."""
    top = Path(kdrl_jax.__file__).parent.glob("*.py")
    found = [path.stem for path in top if "\ndef main(" in path.read_text(encoding="utf-8")]
    return [f"kdrl_jax.{name}" for name in sorted(found)]


def named(pattern: str) -> Iterator[str]:
    """The modules of each package and itself, single modules, or `entries`."""
    for wanted in pattern.split():
        if wanted == "entries":
            yield from entries()
            continue
        found = [n for n in public_modules() if n == wanted or n.startswith(wanted + ".")]
        if not found:
            raise ValueError(f"modules: {wanted} names none")
        yield from found


def expand(app: Sphinx, page: str, source: list[str]) -> None:
    def sections(mark: re.Match[str]) -> str:
        return "\n".join(_SECTION.format(name=name) for name in named(mark[1]))

    source[0] = _MARK.sub(sections, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", expand)
    return {"parallel_read_safe": True}
