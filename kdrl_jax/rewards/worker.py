"""A process that compares two answers with math-verify. Started by `pool`, never imported by it.

It runs as a script and imports the standard library and math-verify alone, so that it starts in
about a second and holds neither JAX nor a device. One JSON request a line on stdin, one JSON reply
a line on stdout: `[gold, answer]` -> "correct" | "wrong" | "unparsable".

Told a verifier's name, it asks that function instead: `[gold, answer, meta]` -> the same, or
"unparsable: …" with the exception that it raised. Told that of a function which finds answers, it
calls that: `[completion]` -> {"answer": text or null}, or "unparsable: …". Told the names of reward
functions, it calls them: `[which, arguments]` -> a list of numbers and nulls, or "…" with the
exception.

math-verify's own timeouts stay off: they need SIGALRM, which does not interrupt long C calls. The
parent kills this process instead. Everything here is therefore free to hang or to die.

For mathematics the process is locked once the grammar is loaded (`lock`): SymPy reads every number
with `eval`, so what else might reach an `eval` must find nothing that it could do.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import logging
import math
import operator
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 4 << 30
STDERR_BYTES = 1 << 20  # the only file that a worker may write
PACKAGES = frozenset({"antlr4", "latex2sympy2_extended", "math_verify", "mpmath", "sympy"})
# What SymPy, dataclasses and named tuples compile while they work; numbers are all that comes from
# the text of an answer.
COMPILED = re.compile(
    r"from sympy import \*|Integer \(\d+ \)|Float \('[\d.]+' \)|Symbol|Expr"
    r"|def (?:monomial_\w+|__create_fn__)\(.*|lambda _cls, [\w, ]+: _tuple_new\(.*",
    re.ASCII | re.DOTALL,
)
FOREIGN = frozenset({"ctypes", "_ctypes", "socket", "_socket", "_posixsubprocess", "mmap", "pty"})
DENIED = (
    *("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pty.", "mmap.", "pathlib.", "glob."),
    *("fcntl.", "signal.", "sqlite3.", "tempfile.", "webbrowser.", "urllib.", "http.", "gc."),
    *("sys.addaudithook", "sys.settrace", "sys.setprofile", "code.__new__", "cpython."),
)
"""How audit events begin that end the process."""
FORBIDDEN = 86  # its exit code
MAX_DIGITS = 1e5  # of a number that is still evaluated
MAX_NODES = 5000  # of an expression that is still looked at
MAX_REPLY = 60_000  # characters of JSON of an answer that a function finds; the parent reads 64 KiB


def limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, OSError, ValueError):
        pass  # not on this system: the parent's timeout is all there is


def limit_cpu(seconds: float) -> None:
    """The kernel ends this process after `seconds` more, even if its parent is no longer there."""
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        until = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (until, hard))
    except (ImportError, OSError, ValueError):
        pass


def lock() -> None:
    """From here on the process reads and writes its two pipes and computes, and nothing else.

    A second wall behind the grammar, not a sandbox: the audit hook ends the process at files, other
    programs, the network and foreign code, and `compile` of anything unusual fails.
    """
    folders = tuple(os.path.join(os.path.realpath(f), "") for f in sys.path if f)
    known = PACKAGES | (sys.stdlib_module_names - FOREIGN)
    written = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    end, real, join = os._exit, os.path.realpath, os.path.join

    def inside(path: Any) -> bool:
        return isinstance(path, str) and join(real(path), "").startswith(folders)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir"):
            if not inside(args[0]) or (event == "open" and (args[2] or 0) & written):
                end(FORBIDDEN)
        elif event == "import":
            if args[0].partition(".")[0] not in known:
                raise ImportError(f"{args[0]} is not for a verification process")
        elif event == "compile":
            source, name = args
            text = source.decode(errors="replace") if isinstance(source, bytes) else source
            if not (isinstance(name, str) and os.path.isabs(name) and inside(name)) and not (
                isinstance(text, str) and COMPILED.fullmatch(text.strip())
            ):
                raise ValueError("only numbers are compiled here")
        elif event.startswith(DENIED):
            end(FORBIDDEN)

    sys.addaudithook(hook)


def limit_files() -> None:
    """No new processes, no more open files, no large files, where the system can forbid them."""
    try:
        import resource

        for what, most in (
            (resource.RLIMIT_FSIZE, STDERR_BYTES),
            (resource.RLIMIT_NOFILE, 16),
            (resource.RLIMIT_NPROC, 0),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(what, (most, most))
    except (ImportError, OSError, ValueError):
        pass


def no_gmpy() -> None:
    """A huge power in gmpy2 aborts the process or ignores signals; Python's integers raise."""
    os.environ["SYMPY_GROUND_TYPES"] = "python"
    os.environ["MPMATH_NOGMPY"] = "1"
    for name in ("gmpy2", "flint"):
        sys.modules[name] = None  # type: ignore[assignment]  # makes `import gmpy2` fail


def compare(gold: str, answer: str) -> str:
    """Outcome of one comparison; both are LaTeX without dollar signs or box."""
    golds, answers = read(gold), read(answer)
    if any(type(g) is type(a) and g == a for g, a in itertools.product(golds, answers)):
        return "correct"  # the same text or, before anything is evaluated, the same expression
    values = [a for a in answers if not isinstance(a, str) and not too_large(a)]
    if not values:
        return "unparsable"
    # A gold answer that cannot be read is not the response's fault: it is merely not equal.
    golds = [g for g in golds if not isinstance(g, str) and not too_large(g)]
    return "correct" if any(equal(g, a) for g, a in itertools.product(golds, values)) else "wrong"


def read(text: str) -> list[Any]:
    """SymPy readings of `text`, then its normalised text; possibly empty.

    Only the LaTeX grammar is used: math-verify's other reader passes text to SymPy's `parse_expr`,
    which evaluates Python.
    """
    from math_verify import parse

    found = []
    for form in dict.fromkeys((scientific(text), text)):
        # The first match alone: it is the box. Further ones would be fractions or brackets picked
        # out of a text that as a whole means something else, or nothing.
        boxed = f"\\boxed{{{form}}}"
        found += parse(boxed, [extraction()], extraction_mode="first_match", parsing_timeout=None)
    return found


@functools.cache
def extraction() -> Any:
    """How math-verify is to read; units were dealt with before (`math_answer.without_unit`)."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    norm = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    )
    return LatexExtractionConfig(boxed_match_priority=0, normalization_config=norm)


def scientific(text: str) -> str:
    r"""`1.2e-8` as `1.2 \times 10^{-8}`: LaTeX's reading is 1.2·e − 8, which stays a second one."""
    pattern = r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d{1,3})(?![\w.])"
    return re.sub(pattern, r"\1 \\times 10^{\2}", text)


def equal(gold: Any, answer: Any) -> bool:
    from math_verify import verify

    try:
        same = verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None)
        same = same or is_symbol_in_disguise(gold, answer)
        return same and not tiny_but_different(gold, answer) and not contradictory(answer)
    except MemoryError:
        os._exit(1)  # what was allocated may not be coherent any more
    except Exception:
        return False


def tiny_but_different(gold: Any, answer: Any) -> bool:
    """Different numbers that math-verify takes as equal since both round to 0 at 6 decimals."""
    if not (getattr(gold, "is_number", False) and getattr(answer, "is_number", False)):
        return False
    g, a = complex(gold.doit().evalf()), complex(answer.doit().evalf())
    return max(abs(g), abs(a)) < 1e-3 and abs(g - a) > 1e-5 * max(abs(g), abs(a))


def is_symbol_in_disguise(gold: Any, answer: Any) -> bool:
    """Whether `answer` is, say, x + 0 for x: math-verify compares symbols by name alone."""
    if not (getattr(gold, "is_Symbol", False) and getattr(answer, "free_symbols", None) == {gold}):
        return False
    return bool(getattr(answer, "is_Add", False) or getattr(answer, "is_Mul", False)) and bool(
        (answer - gold).simplify().is_zero
    )


def contradictory(answer: Any) -> bool:
    """Whether it states that two different numbers are equal, such as 6 = 5, read as 5."""
    from math_verify import verify

    steps = getattr(answer, "_unsorted_args", None) or [answer]
    return any(
        type(step).__name__ == "Equality"
        and all(getattr(side, "is_number", False) for side in step.args)
        and not verify(*step.args, timeout_seconds=None)
        for step in steps
    )


def too_large(expression: Any) -> bool:
    """Whether evaluating would build a number of more than MAX_DIGITS digits.

    A cheap bound for the obvious (9^{9^{9}}, (10^6)!); what it misses runs into the timeout.
    """
    budget = itertools.count()

    def digits(e: Any) -> float:
        """An upper bound of log10 |e|, roughly; inf beyond the limits."""
        if next(budget) > MAX_NODES:
            return math.inf
        inside = [digits(arg) for arg in getattr(e, "args", ())]
        name = type(e).__name__.lower()
        if getattr(e, "is_Rational", False):
            total = math.log10(max(abs(e.p), e.q))
        elif getattr(e, "is_Float", False):
            total = abs(e._mpf_[2] + e._mpf_[3]) * math.log10(2)  # binary exponent, bit count
        elif name == "pow" and e.args[1].is_number:
            x = e.args[1]
            size = math.log10(abs(x.p) / x.q) if x.is_Rational and x.p else inside[1]
            total = max(inside[0], 0.3) * power_of_ten(size)
        elif "factorial" in name or name == "gamma":
            total = power_of_ten(max(inside)) * max(max(inside), 1)
        else:
            total = sum(inside)
        return total if total < MAX_DIGITS else math.inf

    return digits(expression) > MAX_DIGITS


def power_of_ten(digits: float) -> float:
    return 10.0 ** min(digits, 300)


def load_function(name: str) -> Callable[..., Any]:
    """The function `module:attribute`."""
    module, _, attribute = name.partition(":")
    return operator.attrgetter(attribute)(importlib.import_module(module))


def ask(verify: Callable[[str, str, Any], Any], gold: str, answer: str, meta: str) -> str:
    """What a task's own verifier says; `meta` is JSON."""
    try:
        return "correct" if verify(answer, gold, json.loads(meta)) else "wrong"
    except MemoryError:
        os._exit(1)
    except Exception as error:
        return f"unparsable: {type(error).__name__}: {error}"


def find(extract: Callable[[str], Any], completion: str) -> Any:
    """What a task's own function finds in a completion."""
    try:
        answer = extract(completion)
        if not (answer is None or isinstance(answer, str)):
            raise TypeError(f"returned {type(answer).__name__}; return the answer's text, or None")
        reply = {"answer": answer}
        if len(json.dumps(reply)) > MAX_REPLY:
            raise ValueError(f"returned an answer of {len(answer or '')} characters")
        return reply
    except MemoryError:
        os._exit(1)
    except Exception as error:
        return f"unparsable: {type(error).__name__}: {error}"[:1000]


def call(functions: list[Callable[..., Any]], which: str, arguments: str) -> Any:
    """What a reward function gives for keyword `arguments` in JSON."""
    try:
        values = functions[int(which)](**json.loads(arguments))
        return [None if value is None else float(value) for value in values]
    except MemoryError:
        os._exit(1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:1000]


def main() -> None:
    """Arguments: seconds for a request; for functions of the user's own then 'verify', 'answer' or
    'reward', their names, and the sys.path by which the parent process finds them.
    """
    timeout_s = float(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):  # Slurm sends them to all processes of a job
        signal.signal(number, signal.SIG_IGN)
    limit_memory()
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # whatever a library reads is no request, what it prints no reply
    logging.disable(logging.CRITICAL)
    reply: Callable[..., Any] = compare
    hello: dict[str, Any] = {}
    if len(sys.argv) > 2:
        sys.path[:] = json.loads(sys.argv[4])
        own = [load_function(name) for name in json.loads(sys.argv[3])]
        reply = functools.partial(call, own)
        if sys.argv[2] in ("verify", "answer"):
            reply = functools.partial(ask if sys.argv[2] == "verify" else find, own[0])
    else:
        no_gmpy()
        sys.dont_write_bytecode = True
        compare("\\frac{1}{2}", "0.5+x")  # loads the grammar before the clock of a request runs
        from sympy.external.gmpy import GROUND_TYPES

        hello["ground_types"] = GROUND_TYPES
        limit_files()
    hello["modules"] = sorted(n for n, module in sys.modules.items() if module and "." not in n)
    print(json.dumps(hello), file=replies, flush=True)
    if reply is compare:
        lock()
    for line in requests:
        limit_cpu(timeout_s)
        print(json.dumps(reply(*json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
