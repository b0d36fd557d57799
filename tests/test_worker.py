r"""The process that computes: locked once warm, untouched by code in an answer, repeatable."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
from commands import HANG_S

from kdrl_jax.rewards import Grader

ROOT = Path(__file__).parents[1]

LOCKED = r"""
import os, sys
sys.path.insert(0, sys.argv[1])
import worker
worker.no_gmpy()
sys.dont_write_bytecode = True
worker.compare("\\frac{1}{2}", "0.5+x")
sentinel = sys.argv[2]
forbidden = [
    lambda: open(sentinel, "w"),
    lambda: open(sentinel, "ab"),
    lambda: os.open(sentinel, os.O_CREAT | os.O_WRONLY),
    lambda: open("/etc/passwd"),
    lambda: os.system("touch " + sentinel),
    lambda: os.execv("/bin/touch", ["touch", sentinel]),
    lambda: os.posix_spawn("/bin/touch", ["touch", sentinel], {}),
    lambda: os.fork() or open(sentinel, "w"),
    lambda: os.mkdir(sentinel),
    lambda: os.symlink("/", sentinel),
    lambda: os.kill(os.getppid(), 0) or os.remove(sys.argv[1]),
    lambda: __import__("subprocess").run(["touch", sentinel]),
    lambda: __import__("socket").socket(),
    lambda: __import__("ctypes").CDLL(None),
    lambda: __import__("numpy"),
    lambda: eval("__import__('os').getpid()"),
    lambda: exec("x = 1"),
    lambda: __import__("sympy").sympify("__import__('os').getpid()"),
    lambda: sys.addaudithook(print),
]
for number, act in enumerate(forbidden):
    child = os.fork()
    if not child:
        worker.lock()
        try:
            act()
        except (ImportError, ValueError, SyntaxError, NameError, TypeError) as error:
            os._exit(87)
        except Exception as error:
            os._exit(87 if "SympifyError" in type(error).__name__ else 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (86, 87):
        print("allowed:", number, status)
worker.limit_files()
worker.lock()
for gold, answer in (("x<3", "(-\\infty,3)"), ("\\frac{\\pi}{4}", "\\int_0^1 \\frac{1}{1+x^2} dx"),
                     ("\\sqrt{8}", "2\\sqrt2"), ("0.5", "\\sin(\\frac{\\pi}{6})")):
    if worker.compare(gold, answer) != "correct":
        print("does not compute:", gold, answer)
print("done")
"""


def test_a_locked_process_computes_and_does_nothing_else(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    command = [sys.executable, "-c", LOCKED, str(ROOT / "kdrl_jax" / "rewards"), str(sentinel)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert run.stdout == "done\n", run.stdout + run.stderr
    assert not sentinel.exists()


CLOTHES = [
    "{}", "\\text{{{}}}", "\\operatorname{{{}}}", "\\mathrm{{{}}}", "x_{{{}}}", "\\frac{{{}}}{{1}}",
    "\\sqrt{{{}}}", "f({})", "f_{{{}}}(x)", "{} + 1", "{{{}}}", "(1, {})", "1.{}", "{}.5", "{}!",
    "{}\\%",
    "\\begin{{pmatrix}} {} \\end{{pmatrix}}", "\\sum_{{i=1}}^{{{}}} i", "\\log_{{{}}} 2", "x = {}",
    "\\int {} dx", "\\frac{{d}}{{d {}}} x", "\\lim_{{x \\to {}}} x", "\\{{{}\\}}", "0x{}", "1e{}",
    "1,{}",
    "\\mathbf{{{}}}", "\\variable{{{}}}", "\\overline{{{}}}", "\\mathit{{{}}}", "\\mathbb{{{}}}",
]  # fmt: skip


def test_code_in_an_answer_has_no_effect(tmp_path: Path) -> None:
    """Asked of the worker itself. Nothing even tries: a process that did would end (`lock`)."""
    sentinel = tmp_path / "made"
    payloads = [
        f"__import__('os').system('touch {sentinel}')",
        f"open('{sentinel}','w')",
        f"(lambda: open('{sentinel}','w'))()",
        f"().__class__.__base__.__subclasses__() or open('{sentinel}','w')",
        f"sympify(\"open('{sentinel}','w')\")",
        "exit()",
        'print("correct")',
    ]
    pairs = [("x+1", c.format(p)) for c, p in itertools.product(CLOTHES, payloads)]
    with Grader(workers=1, timeout_s=60.0) as grader:
        outcomes = grader._verify(pairs)
        counts = grader.take_counts()
        assert grader._verify([("x+1", "1+x")]) == {("x+1", "1+x"): "correct"}
    assert set(outcomes.values()) <= {"wrong", "unparsable"}
    assert counts.asked == len(pairs)
    assert counts.crashes == counts.restarts == 0
    assert not list(tmp_path.iterdir())


REPEATED = [
    ("x+1", "1+x"), ("(x+1)^2", "x^2+2x+1"), ("a+b", "b+a"), ("a-b", "b-a"),
    ("\\sin^2 x+\\cos^2 x", "1"),
    ("\\{1,2,3\\}", "\\{3,1,2\\}"), ("x<3", "(-\\infty,3)"), ("y=2x+1", "2x+1"), ("\\sqrt{2}",
    "1.41421356"),
    ("\\frac{a}{b}", "\\frac{b}{a}"), ("(1,2)", "(2,1)"), ("x^2=1", "x=1"), ("ab", "ba"), ("5",
    "6=5"),
    ("[1,2)", "(1,2]"), ("\\pm 3", "3,-3"), ("2\\cos^2 t-1", "\\cos 2t"), ("x", "y"),
]  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_a_verdict_depends_on_the_pair_alone(workers: int) -> None:
    """Not on order, worker, or what SymPy remembers."""
    for seed in (0, 1):
        pairs = list(REPEATED)
        random.Random(seed).shuffle(pairs)
        with Grader(workers=workers, timeout_s=60.0) as grader:
            for _ in range(2):
                assert grader._verify(pairs) == EXPECTED
                grader._known.clear()
            assert len(grader._pool) == workers


EXPECTED = {
    pair: "wrong"
    if pair[1] in ("b-a", "\\frac{b}{a}", "(2,1)", "x=1", "6=5", "(1,2]", "y")
    else "correct"
    for pair in REPEATED
}
