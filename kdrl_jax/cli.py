"""What every command shares: arguments, one-line errors, exit codes, stopping on a signal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from kdrl_jax.config import read_config, split_variant
from kdrl_jax.processes import LostProcess, is_first, wait_for_the_coordinator
from kdrl_jax.training.safety import own_folder
from kdrl_jax.training.storage import drop_torn_programs, storage_problem
from kdrl_jax.training.validation import validate
from kdrl_jax.types import UserError

EXIT_USER_ERROR = 2
EXIT_UNHEALTHY = 3  # saved because a watch of `health` said stop: a person is to look
EXIT_LOST = 76  # another process of the run has gone
EXIT_INTERRUPTED = 130
_OVERRIDE = "--config."


def parse_config_args(argv: list[str] | None, doc: str | None) -> tuple[ConfigDict, Path]:
    """`--config=FILE [--workdir=DIR] [--config.key=value …]` as a config and a folder.

    Without --workdir the folder is runs/NAME, NAME being that of the config's file and variant.
    """
    argv = sys.argv[1:] if argv is None else argv
    overrides, rest = split_overrides(argv)
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE[:VARIANT,…]")
    parser.add_argument("--workdir", type=Path, metavar="DIR")
    args = parser.parse_args(rest)
    config, problems = read_config(args.config, overrides)
    if problems:  # name what else is wrong as well, so that one look mends it all
        try:
            validate(config)
        except UserError as error:
            problems += error.problems
        raise UserError(*problems)
    file, variant = split_variant(args.config)
    name = "-".join([file.stem, *variant.split(",")]) if variant else file.stem
    return config, args.workdir or Path("runs") / name


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """`--config.a.b=c` and `--config.a.b c` as 'a.b=c', and the arguments that remain."""
    overrides, rest = [], []
    items = list(argv)
    while items:
        item = items.pop(0)
        if not item.startswith(_OVERRIDE):
            rest.append(item)
        elif "=" in item or not items or items[0].startswith("--"):
            overrides.append(item.removeprefix(_OVERRIDE))
        else:
            overrides.append(f"{item.removeprefix(_OVERRIDE)}={items.pop(0)}")
    return overrides, rest


def run_entry(main: Callable[[], Any]) -> None:
    """Call `main`; what the user can mend is printed without a traceback and exits with 2.

    That is every line of a UserError, and a path that cannot be written. Ctrl-C exits with 130.
    """
    try:
        main()
    except UserError as error:
        for line in error.problems:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        print(f"error: {error.filename}: {error.strerror}; give another folder", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if not (problem := storage_problem(error, Path.cwd())):
            raise
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except LostProcess:  # has been explained
        wait_for_the_coordinator()
        os._exit(EXIT_LOST)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def enable_compilation_cache(folder: Path) -> None:
    """Keep compiled programs under `folder`, so that a resumed run starts at once.

    Raises:
      UserError: anybody may write there; the programs are executed.
    """
    own_folder(folder, "cache_dir", make=False)
    found = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if found is None:
        jax.config.update("jax_compilation_cache_dir", str((folder / "compiled").resolve()))
    if is_first():
        drop_torn_programs(Path(found) if found else folder / "compiled")
