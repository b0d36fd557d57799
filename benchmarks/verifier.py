"""The verifier under fire: hostile responses, and how often it errs beside plain math-verify.

    python benchmarks/verifier.py --data=FOLDER [--workers=2] [--per_file=150] [--seed=0] \
        [--share=1.0] [--quick] [--output=verifier]

FOLDER has aime24.jsonl … gsm8k_test.jsonl, with an `answer` in each line; without `--data` only the
hostile responses are tried. Writes OUTPUT.md and OUTPUT.json. Exits with 1 if a response was not
answered within the deadline, a wrong one was rewarded, or injected code had an effect.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
import verifier_hostile as hostile
import verifier_labelled as labelled

from kdrl_jax.rewards import Grader, last_boxed
from kdrl_jax.rewards.supervisor import Supervisor

TIMEOUT_S = 3.0  # the default of reward.timeout_s
SLACK_S = 0.5  # what this process may take to notice that a deadline has passed
BATCH = 200
OUTCOMES = ("correct", "wrong", "unparsable", "timeout", "format")

PLAIN = r"""
import json, logging, sys
logging.disable(logging.CRITICAL)
from math_verify import parse, verify
verify(parse("\\boxed{1}"), parse("\\boxed{x}"))
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    gold, answer = (parse("\\boxed{" + text + "}") for text in json.loads(line))
    print(json.dumps("correct" if verify(gold, answer) else "wrong"), flush=True)
"""
"""math-verify as its documentation uses it, in a process that can be killed."""


def memory_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def try_family(grader: Grader, name: str, sentinel: Path, seed: int, share: float) -> dict:
    """What became of one family's responses."""
    outcomes: collections.Counter[str] = collections.Counter()
    accepted: list[list[str]] = []
    host_s, began = 0.0, time.monotonic()
    batch: list[hostile.Attack] = []

    def flush() -> None:
        nonlocal host_s
        started = time.monotonic()
        waited = grader._supervisor.counts.seconds
        verdicts = grader.grade([a.response for a in batch], [a.gold for a in batch])
        assert len(verdicts) == len(batch)
        if grader._supervisor.counts.seconds == waited:  # all were decided in this process
            host_s = max(host_s, (time.monotonic() - started) / max(1, len(batch)))
        outcomes.update(v.outcome for v in verdicts)
        wrong = zip(batch, verdicts, strict=True)
        accepted.extend([a.gold, ascii(a.response)[:300]] for a, v in wrong if v.reward)
        batch.clear()

    grader.take_counts()
    for attack in hostile.attacks(name, str(sentinel), seed, share):
        batch.append(attack)
        if len(batch) == BATCH or len(attack.response) > 100_000:
            flush()
    flush()
    counts = grader.take_counts()
    return {
        "family": name,
        "tried": sum(outcomes.values()),
        **{o: outcomes[o] for o in OUTCOMES},
        "asked": counts.asked,
        "crashes": counts.crashes,
        "restarts": counts.restarts,
        "slowest_s": round(counts.seconds_max, 3),
        "host_s": round(host_s, 3),
        "took_s": round(time.monotonic() - began, 1),
        "memory_mib": round(memory_mib()),
        "false_accepts": accepted,
    }


def campaign(workers: int, seed: int, share: float) -> dict[str, Any]:
    """All families against one grader with the default limits."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Grader(workers=workers, timeout_s=TIMEOUT_S) as grader,
    ):
        sentinel = Path(folder) / "made"
        grader.grade(["<think></think>\\boxed{x+1}"], ["1+x"])
        rows = []
        for name in hostile.families():
            rows.append(try_family(grader, name, sentinel, seed, share))
            shown = {k: v for k, v in rows[-1].items() if k != "false_accepts"}
            print(json.dumps(shown), flush=True)
        return {"families": rows, "code_ran": bool(list(Path(folder).iterdir()))}


def by_grader(cases: Sequence[labelled.Case], workers: int) -> list[str]:
    """Outcomes of the program's own grader."""
    with Grader(workers=workers, timeout_s=TIMEOUT_S) as grader:
        texts = [f"<think></think>\\boxed{{{case.answer}}}" for case in cases]
        return [v.outcome for v in grader.grade(texts, [case.gold for case in cases])]


def by_math_verify(cases: Sequence[labelled.Case], workers: int) -> list[str]:
    """Outcomes of `parse` and `verify` alone, given the same text in the box."""
    pairs = [(case.gold, case.answer) for case in cases]
    command = [sys.executable, "-P", "-c", PLAIN]
    supervisor = Supervisor(command, workers, TIMEOUT_S, "math-verify")
    try:
        found = supervisor.ask(dict.fromkeys(pairs))
    finally:
        for worker in supervisor.workers:
            worker.kill()
    return [found[pair] for pair in pairs]


def by_format(cases: Sequence[labelled.Case]) -> list[str]:
    """A reward for the format alone."""
    return ["correct" if last_boxed(f"\\boxed{{{c.answer}}}") else "wrong" for c in cases]


def error_rates(data: Path, per_file: int, workers: int, seed: int) -> dict[str, Any]:
    """Of each grader and category: how many were judged wrongly, and some that were."""
    golds = labelled.golds(data, per_file, seed)
    cases = [case for gold in golds for case in labelled.cases(gold)]
    judged = {
        "ours": by_grader(cases, workers),
        "math_verify": by_math_verify(cases, workers),
        "format_only": by_format(cases),
    }
    rows: dict[str, dict[str, Any]] = {}
    for i, case in enumerate(cases):
        row = rows.setdefault(case.category, {"pairs": 0, "equal": case.equal, "examples": []})
        row["pairs"] += 1
        for name, outcomes in judged.items():
            bad = (outcomes[i] == "correct") != case.equal
            row[name] = row.get(name, 0) + bad
            if bad and name == "ours":
                row["examples"].append([case.gold, case.answer, outcomes[i]])
    return {"golds": len(golds), "pairs": len(cases), "categories": rows}


def total(rows: dict[str, dict[str, Any]], equal: bool, name: str) -> tuple[int, int]:
    """(misjudged, pairs) over the categories of pairs that are, or are not, equal."""
    chosen = [row for row in rows.values() if row["equal"] is equal]
    return sum(row[name] for row in chosen), sum(row["pairs"] for row in chosen)


def markdown(found: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "| family | tried | correct | wrong | unparsable | timeout | format | asked of a worker "
        "| crashes | restarts | slowest answer, s |",
        "|---|" + "---:|" * 10,
    ]
    rows = found["hostile"]["families"]
    for r in rows:
        cells = [r[k] for k in ("tried", *OUTCOMES, "asked", "crashes", "restarts", "slowest_s")]
        lines.append(f"| {r['family']} | " + " | ".join(map(str, cells)) + " |")
    sums = [sum(r[k] for r in rows) for k in ("tried", *OUTCOMES, "asked", "crashes", "restarts")]
    slowest = max(r["slowest_s"] for r in rows)
    lines.append("| all | " + " | ".join(map(str, [*sums, slowest])) + " |")
    if "labelled" in found:
        rates = found["labelled"]["categories"]
        lines += [
            "",
            "| pairs | how many | ours | math-verify | format only |",
            "|---|" + "---:|" * 4,
        ]
        for equal, title in ((True, "**false rejects**"), (False, "**false accepts**")):
            shares = []
            for name in ("ours", "math_verify", "format_only"):
                bad, pairs = total(rates, equal, name)
                shares.append(f"{bad} ({100 * bad / max(1, pairs):.2f} %)")
            lines.append(f"| {title} | {pairs} | " + " | ".join(shares) + " |")
            for category, r in sorted(rates.items()):
                if r["equal"] is equal:
                    cells = [r[k] for k in ("pairs", "ours", "math_verify", "format_only")]
                    lines.append(f"| {category} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def failures(found: dict[str, Any]) -> list[str]:
    """What must not be."""
    problems = []
    for r in found["hostile"]["families"]:
        if r["slowest_s"] > TIMEOUT_S + SLACK_S or r["host_s"] > TIMEOUT_S:
            problems.append(f"{r['family']}: an answer took {r['slowest_s']} s, {r['host_s']} here")
        problems += [f"{r['family']}: rewarded {bad}" for bad in r["false_accepts"]]
    if found["hostile"]["code_ran"]:
        problems.append("injected code made a file")
    return problems


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--per_file", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the hostile responses")
    parser.add_argument("--quick", action="store_true", help="a hundredth of all")
    parser.add_argument("--output", type=Path, default=Path("verifier"))
    args = parser.parse_args(argv)
    if args.quick:
        args.share, args.per_file = args.share / 100, 2
    before = memory_mib()
    found: dict[str, Any] = {"hostile": campaign(args.workers, args.seed, args.share)}
    found["memory_mib"] = [round(before), round(memory_mib())]
    if args.data:
        found["labelled"] = error_rates(args.data, args.per_file, args.workers, args.seed)
    args.output.with_suffix(".json").write_text(json.dumps(found, indent=1))
    args.output.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))
    print(f"memory of this process: {before:.0f} MiB before, {memory_mib():.0f} MiB after")
    problems = failures(found)
    print("\n".join(problems) or "all answered within the deadline, nothing rewarded")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
