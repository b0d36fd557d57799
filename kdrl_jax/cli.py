"""What every command shares: arguments, one-line errors, exit codes, stopping on a signal."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from kdrl_jax.config import flatten, load_config, read_config, split_variant
from kdrl_jax.config_reference import BASE, MOST_USED, describe_keys
from kdrl_jax.config_values import OPTION
from kdrl_jax.foreign_names import answer, here
from kdrl_jax.processes import LostProcess, is_first, leave, wait_for_the_coordinator
from kdrl_jax.training.display import LOGS, emit, end_line, speaking
from kdrl_jax.training.stopping import EXIT_INTERRUPTED, EXIT_STOPPED
from kdrl_jax.training.storage import storage_problem
from kdrl_jax.training.validation import validate
from kdrl_jax.types import UserError, merged

EXIT_USER_ERROR = 2
EXIT_UNHEALTHY = 3  # saved because a watch of `health` said stop: a person is to look
EXIT_LOST = 76  # another process of the run has gone
KEPT = {
    "kdrl_jax.evaluate": "whole batches of responses are kept",
    "kdrl_jax.difficulty": "whole batches of attempts are kept",
    "kdrl_jax.reproduce": "runs that are done are kept, and the checkpoints of the others",
    "kdrl_jax.convert": "nothing has been written",
}
"""What an interrupted command leaves, where it does not say so itself."""
LOG_HELP = f"--log {{{','.join(LOGS)}}}  how it speaks; json: one object a line"


class Parser(argparse.ArgumentParser):
    """A parser that answers a key given without --config., or under another trainer's name.

    Args:
      doc: of the command.
      keys: whether --help shows the keys that are used most, and --help=all all of them.
    """

    def __init__(self, doc: str | None, *, keys: bool = False):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=not keys,
        )
        self._misplaced: list[str] = []
        if keys:
            says = "all: with every key"
            self.add_argument("-h", "--help", action=_Help, nargs="?", choices=("all",), help=says)

    def read(self, args: Sequence[str]) -> argparse.Namespace:
        """The arguments.

        Raises:
          UserError: some are keys, with what to write.
        """
        found, problems = self.parse(args)
        if problems:
            raise UserError(*problems)
        return found

    def parse(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The arguments, and a line for each that is a key.

        Raises:
          UserError: some are keys, and others cannot be read.
        """
        self._misplaced, rest = self._take_keys(args)
        return self.parse_args(rest), self._misplaced

    def error(self, message: str) -> NoReturn:
        """As always, but not for the least of several problems."""
        if self._misplaced:
            raise UserError(*self._misplaced, f"arguments: {message}")
        super().error(message)

    def _take_keys(self, argv: Sequence[str]) -> tuple[list[str], list[str]]:
        """A line for each argument that is a key, and the other arguments."""
        problems, rest, items = [], [], list(argv)
        known = flatten(load_config(BASE))
        while items:
            item = items.pop(0)
            flag, equals, value = item.partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            near = [x for x in known if x == name] or [x for x in known if x.endswith(f".{name}")]
            bare = not flag.startswith("-") and equals  # verl's form
            ours = flag in self._option_string_actions or not (flag.startswith("--") or bare)
            if ours or not (here(name) or len(near) == 1):
                rest.append(item)
                if ours and not equals and items and not items[0].startswith("-"):
                    rest.append(items.pop(0))  # what the option is given
                continue
            if not equals and items and not items[0].startswith("-"):
                value = items.pop(0)
            line = f"{flag}: is a key; write {OPTION}{near[0]}={value or 'VALUE'}" if near else ""
            problems.append(line or answer(name, value, OPTION))
        return problems, rest


class _Help(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        lines = [f"keys, with the defaults of {BASE}, of which a config changes some:\n"]
        lines.append(describe_keys(() if values else MOST_USED))
        if not values:
            lines.append("\n--help=all shows every key; set one by --config.KEY=VALUE")
        print(parser.format_help(), *lines, sep="\n")
        parser.exit()


def parse_config_args(argv: list[str] | None, doc: str | None) -> tuple[ConfigDict, Path]:
    """`--config=FILE [--workdir=DIR] [--config.key=value …]` as a config and a folder.

    Without --workdir the folder is runs/NAME, NAME being that of the config's file and variant.
    """
    argv = sys.argv[1:] if argv is None else argv
    overrides, rest = split_overrides(argv)
    parser = Parser(doc, keys=True)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE[:VARIANT,…]")
    parser.add_argument("--workdir", type=Path, metavar="DIR")
    args, misplaced = parser.parse(rest)
    config, problems = read_config(args.config, overrides)
    if problems := misplaced + problems:  # name what else is wrong as well: one look mends it all
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
        if not item.startswith(OPTION):
            rest.append(item)
        elif "=" in item or not items or items[0].startswith("--"):
            overrides.append(item.removeprefix(OPTION))
        else:
            overrides.append(f"{item.removeprefix(OPTION)}={items.pop(0)}")
    return overrides, rest


def run_entry(main: Callable[[], Any]) -> None:
    """Call `main`; what the user can mend is printed without a traceback and exits with 2.

    That is every line of a UserError, and a path that cannot be written. Ctrl-C exits with 130 and
    says how to go on. Here is where `--log=text|json|quiet` is taken from the arguments, for all
    commands alike: with json every line of stdout is an object, see `training.display`, and the
    last one is the event "end" with the exit code.
    """
    before = list(sys.argv)
    command = command_line(main)
    try:
        kind, sys.argv[1:] = _take_log(sys.argv[1:])
        with speaking(kind):
            if kind != "text" or not sys.stderr.isatty():
                silence_bars()
            code = _call(main, command)
            end_line()
            emit("end", exit=code)
        if any(x.partition("=")[0] in ("-h", "--help") for x in sys.argv[1:]) and not code:
            print(f"  {LOG_HELP}")
    except UserError as error:
        code = _refused(error.problems)
    finally:
        sys.argv[:] = before
    if code in (EXIT_STOPPED, EXIT_INTERRUPTED):
        leave(code)
    if code:
        sys.exit(code)


def _call(main: Callable[[], Any], command: str) -> int:
    """The exit code of `main`, after its errors have been said."""
    try:
        main()
    except UserError as error:
        return _refused(error.problems)
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        return _refused([f"{error.filename}: {error.strerror}; give another folder"])
    except LostProcess as error:  # has been explained
        emit("error", problems=[str(error)])
        emit("end", exit=EXIT_LOST)
        wait_for_the_coordinator()
        os._exit(EXIT_LOST)
    except KeyboardInterrupt:
        kept = KEPT.get(_module(main), "")
        line = "; ".join(filter(None, ("interrupted", kept, f"to go on: {command}")))
        emit("error", problems=[line])
        print(line, file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        if code == EXIT_STOPPED and is_first():
            print(f"to go on: {command}")
        elif code == EXIT_USER_ERROR:  # argparse has written to stderr what is wrong
            emit("error", problems=["the arguments are not understood; stderr says why"])
        return code
    except Exception as error:
        if isinstance(error, OSError) and (problem := storage_problem(error, Path.cwd())):
            return _refused([problem])
        emit("error", problems=[f"{type(error).__name__}: {error}"])
        emit("end", exit=1)
        raise
    return 0


def _refused(problems: Sequence[str]) -> int:
    emit("error", problems=problems)
    for line in merged(problems):
        print(f"error: {line}", file=sys.stderr)
    return EXIT_USER_ERROR


def command_line(main: Callable[[], Any]) -> str:
    """What was typed to get here, for a shell: 'python -m kdrl_jax.train --config=…'."""
    name = Path(sys.argv[0]).name
    if name.endswith(".py") or not name.startswith("kdrl"):
        name = f"python -m {_module(main)}" if _module(main) else f"python {sys.argv[0]}"
    return " ".join([name, shlex.join(sys.argv[1:])]).strip()


def _module(main: Callable[[], Any]) -> str:
    """The module of an entry, whose own __name__ may be '__main__'; "" where it is a script's."""
    spec = main.__globals__["__spec__"]
    return spec.name if spec else ""


def _take_log(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The last `--log` of the arguments, and the others."""
    kind, rest, items = "text", [], list(argv)
    while items:
        item = items.pop(0)
        if item == "--log" and items:
            kind = items.pop(0)
        elif item.startswith("--log="):
            kind = item.removeprefix("--log=")
        else:
            rest.append(item)
    if kind not in LOGS:
        raise UserError(f"--log: {kind!r} is none of {', '.join(LOGS)}")
    return kind, rest


def silence_bars() -> None:
    """No bars of the Hugging Face libraries, in this process and its children."""
    for library, module in (
        ("HF_HUB", "huggingface_hub.utils"),
        ("HF_DATASETS", "datasets"),
    ):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
        if found := sys.modules.get(module):  # which has read the variable already
            found.disable_progress_bars()
