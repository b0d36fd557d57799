"""Does a run fit a machine that is not at hand, and how fast can it be?

    python -m kdrl_jax.plan --config=configs/stage2.py --topology=v5p:4x4x4 [--check] \
        [--config.key=value …] [--compile=all|none|update,…] [--output=FILE.json]

Needs no data, no tokenizer and no weights. Of a model of the hub config.json is downloaded; where
`student.path` is empty, or the hub is out of reach, the shape in `student.shape` counts, likewise
the teacher's. TPUs are v4, v5e, v5p and v6e, by shape (v5e:16x16) or by type (v5p-32, which counts
cores); their compiler, libtpu (extra `tpu`, which brings the one that fits jax), runs anywhere, and
gives its own account of memory, collectives and time of a step's programs. GPUs are a100-40,
a100-80, h100, h200 and b200, as in h100:8: estimated from shapes, and compiled where they are
present. --check exits with 1 where the run does not fit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from kdrl_jax.cli import Parser, run_entry, split_overrides
from kdrl_jax.config import read_config
from kdrl_jax.network import set_offline
from kdrl_jax.planning.machines import parse_topology, require_compiler
from kdrl_jax.planning.run_plan import PROGRAMS, make_run_plan
from kdrl_jax.planning.table import text_of
from kdrl_jax.training.display import emit
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.training.validation import validate
from kdrl_jax.types import UserError

EXIT_DOES_NOT_FIT = 1


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    overrides, rest = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE[:VARIANT]")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE")
    parser.add_argument("--check", action="store_true", help="exit with 1 where it does not fit")
    parser.add_argument("--compile", metavar="NAMES", help=f"all, none or {', '.join(PROGRAMS)}")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.read(rest)
    config, problems = read_config(args.config, overrides)

    def check_machine() -> None:
        machine = parse_topology(args.topology)
        if args.compile != "none":
            require_compiler(machine)

    checks: list[Callable[[], Any]] = [
        lambda: validate(config, sources=False),
        check_machine,
        lambda: parse_programs(args.compile),
    ]
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    set_offline(config.offline)
    machine, programs = parse_topology(args.topology), parse_programs(args.compile)
    if machine.is_tpu:  # what is compiled for TPUs needs no device here
        jax.config.update("jax_platforms", "cpu")
    named = args.compile not in (None, "none")
    plan = make_run_plan(config, machine, programs, required=named)
    print(text_of(plan))
    emit("result", **plan.to_json())
    if args.output:
        write_atomic(args.output, json.dumps(plan.to_json(), indent=1) + "\n")
    if args.check and not plan.fits:
        sys.exit(EXIT_DOES_NOT_FIT)


def parse_programs(text: str | None) -> tuple[str, ...]:
    """'update,decode' as names; None, 'all' and 'none' are all and none.

    Raises:
      UserError: an unknown name.
    """
    if text in (None, "all"):
        return PROGRAMS
    names = () if text == "none" else tuple(str(text).split(","))
    if unknown := [name for name in names if name not in PROGRAMS]:
        raise UserError(
            f"--compile: {', '.join(map(repr, unknown))}: no such program; there are all, none, "
            f"{', '.join(PROGRAMS)}"
        )
    return names


if __name__ == "__main__":
    run_entry(main)
