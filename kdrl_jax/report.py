"""Draw one or several runs: a page with charts and sample rollouts, and a picture of four curves.

    python -m kdrl_jax.report RUN [RUN …] [--output=FILE.html]

The page is one file that opens from disk: metrics of all runs by step or time, health alerts, and
a browser of sample rollouts, token by token. Beside it is `curves.png`. Without --output they are
RUN/report.html and RUN/curves.png of the first run; with --output=FILE.png there is the picture
alone. A run may still be going on. Needs the `plot` extra.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kdrl_jax.cli import run_entry
from kdrl_jax.reporting.page import render
from kdrl_jax.reporting.picture import draw
from kdrl_jax.reporting.runs import read_runs
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.types import UserError


def write_report(runs: Sequence[Path], output: Path) -> list[Path]:
    """Write the report of some runs.

    Args:
      runs: folders with a `metrics.jsonl`.
      output: the page, *.html, or the picture alone, *.png.

    Returns:
      The files written.

    Raises:
      UserError: a run without metrics, another kind of output, or a library of the extra `plot`
        is not installed.
    """
    if output.suffix not in (".html", ".png"):
        raise UserError(f"--output: {output} must end in .html or .png")
    records = read_runs(runs)
    written = []
    if output.suffix == ".html":
        page = render(records)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, page)
        written.append(output)
    picture = output if output.suffix == ".png" else output.with_name("curves.png")
    draw(records, picture)
    return [*written, picture]


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, metavar="FILE.html")
    args = parser.parse_args(argv)
    for file in write_report(args.runs, args.output or args.runs[0] / "report.html"):
        print(f"written: {file}")


if __name__ == "__main__":
    run_entry(main)
