"""Reproduce the papers' comparisons at small scale: a grid of runs, judged and drawn.

    python -m kdrl_jax.reproduce --grid=configs/reproduce/cpu.py [--output=runs/reproduce]

Teachers and warm starts are made first, then each cell (task × method × seed) is a process of its
own, and `report.html`, PNG files and `results.json` are written to the output folder. The same
command continues after an interruption: cells that are done are not repeated.

    --workers=N     cells at a time; default: the grid's
    --only=REGEX    only cells whose TASK/METHOD/SEED it is found in
    --report_only   write the report of what is there, run nothing
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kdrl_jax.cli import run_entry
from kdrl_jax.network import set_offline
from kdrl_jax.reproduction.grid import Cell, Grid, load_grid
from kdrl_jax.reproduction.prepare import prepare, prepare_jobs, teacher_accuracies
from kdrl_jax.reproduction.record import add_sitting, facts
from kdrl_jax.reproduction.report import write_report
from kdrl_jax.reproduction.results import read_results
from kdrl_jax.reproduction.runner import missing_cells, run_cells
from kdrl_jax.training.compilation_cache import enable_compilation_cache
from kdrl_jax.training.display import Display
from kdrl_jax.training.metrics import lock_folder, unlock_folder
from kdrl_jax.types import UserError


def reproduce(
    grid: Grid, output: Path, *, workers: int, only: str, report_only: bool, command: str
) -> list[Path]:
    """Run what is missing and write the report.

    Args:
      only: a regular expression; '' selects every cell.
      command: kept in the report.

    Returns:
      The report's files.

    Raises:
      UserError: nothing selected, a folder that holds other runs, a preparation that failed.
      KeyboardInterrupt: stopped; the runs under way have saved.
    """
    display, cells = Display(), select(grid, only)
    if not report_only and (missing := missing_cells(cells, output)):
        lock_folder(output)
        begun = time.monotonic()
        try:
            run_cells(
                grid,
                missing,
                output,
                preparation=prepare_jobs(grid, missing, output, only),
                done=len(cells) - len(missing),
                workers=workers,
                display=display,
            )
        finally:
            add_sitting(output, command, workers, time.monotonic() - begun)
            unlock_folder(output)
    results = read_results(grid.cells, output)
    if not results:
        raise UserError(
            f"--output: {output} holds no results of this grid; run without --report_only"
        )
    setup = {"facts": facts(output, grid, results), "teachers": teacher_accuracies(grid, output)}
    written = write_report(grid, results, setup, output)
    for path in written:
        display.say(f"written: {path}")
    return written


def select(grid: Grid, only: str) -> Sequence[Cell]:
    """The cells in whose names the expression is found.

    Raises:
      UserError: not an expression, or it is found in none.
    """
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise UserError(f"--only: {only!r} is no regular expression ({error})") from error
    cells = [cell for cell in grid.cells if pattern.search(cell.name)]
    if not cells:
        example = grid.cells[0].name
        raise UserError(f"--only: {only!r} is found in no cell; they are named like {example}")
    return cells


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--grid", required=True, type=Path, metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"), metavar="DIR")
    parser.add_argument("--workers", type=int, metavar="N")
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--report_only", action="store_true")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)  # one task, in its own process
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers: {args.workers} must be at least 1")
    grid = load_grid(args.grid)
    if args.prepare:
        cells = select(grid, args.only)
        set_offline(cells[0].load().offline)
        enable_compilation_cache(Path(cells[0].load().cache_dir))
        prepare(cells, args.prepare, args.output)
        return
    reproduce(
        grid,
        args.output,
        workers=args.workers or grid.workers,
        only=args.only,
        report_only=args.report_only,
        command=shlex.join(["python", "-m", "kdrl_jax.reproduce", *argv]),
    )


if __name__ == "__main__":
    run_entry(main)
