"""From responses to figures, and from figures to a Markdown table beside the paper's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdrl_jax.evaluation.benchmarks import (
    BENCHMARKS,
    PAPER,
    PAPER_AVERAGE,
    PAPER_COLUMNS,
    title_of,
)
from kdrl_jax.evaluation.metrics import (
    avg_at_k,
    bootstrap_interval,
    maj_at_k,
    pass_at_k,
    repetition_rate,
)
from kdrl_jax.types import OUTCOMES

Figures = dict[str, Any]
PAPER_ROWS = (
    " The paper's rows are Table 1 of arXiv 2506.02208: there k is 16 for AIME and AMC and 1 "
    "elsewhere."
)


def summarise(
    rows: Sequence[Mapping[str, Any]], samples: int, kept_out: int, listed: Sequence[str]
) -> Figures:
    """The figures of one benchmark.

    Args:
      rows: what `runner.ask` returned: `samples` of each problem, problem by problem.
      kept_out: how many rows of the benchmark were not asked, as they have no gold answer or one
        that does not grade as correct.
      listed: the first of them, with what is wrong.

    Returns:
      JSON-able: shares from 0 to 1, lengths in tokens, None where there is nothing to count.
    """
    rewards = np.array([row["reward"] for row in rows], np.float64).reshape(-1, samples)
    extracted = [row["extracted"] for row in rows]
    answers = [extracted[i : i + samples] for i in range(0, len(rows), samples)]
    cut = np.array([row["finish_reason"] == "length" for row in rows])
    repeating = repetition_rate(cut, np.array([row["repeats"] for row in rows]))
    average = avg_at_k(rewards)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k < samples] + [samples]
    outcomes = Counter(row["outcome"] for row in rows)
    return {
        "problems": len(rewards),
        "samples": samples,
        "avg": float(average.mean()),
        "avg_interval": list(bootstrap_interval(average)),
        "pass": {str(k): float(pass_at_k(rewards, k).mean()) for k in ks},
        "maj": float(maj_at_k(answers, rewards).mean()),
        "answered": float(np.mean([bool(answer) for answer in extracted])),
        "length": float(np.mean([row["length"] for row in rows])),
        "clip_ratio": float(cut.mean()),
        "repetition_rate": None if math.isnan(repeating) else repeating,
        "outcomes": {name: outcomes[name] for name in OUTCOMES},
        "kept_out": kept_out,
        "kept_out_rows": list(listed),
    }


def average(benchmarks: Mapping[str, Figures]) -> float | None:
    """The mean of Avg@k over the paper's six benchmarks; None unless all six are there."""
    if not set(PAPER_COLUMNS) <= benchmarks.keys():
        return None
    return float(np.mean([benchmarks[name]["avg"] for name in PAPER_COLUMNS]))


def markdown(results: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> str:
    """`results.md`: accuracy beside the paper's figures, then everything else that was measured.

    Args:
      results: the content of `results.json`: "checkpoint", "settings" and "benchmarks".
      others: further ones to compare with.
    """
    names = list(results["benchmarks"])
    parts = [
        f"# Evaluation of {results['checkpoint']}",
        "Accuracy in %: Avg@k, the mean over k samples of each problem, with the 95 % bootstrap "
        "interval over problems (a point where all score alike)."
        + (PAPER_ROWS if {*names} & {*PAPER_COLUMNS} else ""),
        _accuracy(names, [results, *others]),
        *_missing(names),
        _details(results["benchmarks"]),
        "pass@k and maj@k are of the same k samples. Answered: with an answer of the form that "
        "is graded. Tokens: mean length of a response. Cut: ended by the limit. Repeating: of the "
        "cut responses, those at least half of whose last 1024 tokens' 4-grams occurred before "
        "among them. Kept out: rows without a gold answer, or with one that does not itself grade "
        "as correct.",
        *_notes(results["benchmarks"]),
        "Settings: " + ", ".join(f"{k} {v}" for k, v in results["settings"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def _accuracy(names: Sequence[str], ours: Sequence[Mapping[str, Any]]) -> str:
    whole = set(PAPER_COLUMNS) <= set(names)
    columns = [*names, PAPER_AVERAGE] if whole else list(names)
    titles = [title_of(name) for name in names] + ["average"] * whole
    lines = [["", *titles]]
    for one in ours:
        cells = [_with_interval(one["benchmarks"].get(name)) for name in names]
        mean = average(one["benchmarks"])
        lines.append([f"**{one['checkpoint']}**", *cells, *[_percent(mean)] * whole])
    for row, figures in PAPER.items():
        if any(name in figures for name in names):
            cells = [_percent(figures[c] / 100 if c in figures else None) for c in columns]
            lines.append([f"paper: {row}", *cells])
    return _table(lines)


def _missing(names: Sequence[str]) -> list[str]:
    titles = [title_of(x) for x in names if x in BENCHMARKS and x not in PAPER_COLUMNS]
    return [f"The paper gives no figure for {', '.join(titles)}."] if titles else []


def _details(benchmarks: Mapping[str, Figures]) -> str:
    head = "problems|k|Avg@k|pass@k|maj@k|answered, %|tokens|cut, %|repeating, %|kept out"
    lines = [["", *head.split("|")]]
    for name, f in benchmarks.items():
        k = f["samples"]
        lines.append(
            [
                title_of(name),
                *(str(f["problems"]), str(k), _with_interval(f)),
                *(_percent(f["pass"][str(k)]), _percent(f["maj"]), _percent(f["answered"])),
                f"{f['length']:.0f}",
                *(_percent(f["clip_ratio"]), _percent(f["repetition_rate"])),
                str(f["kept_out"]),
            ]
        )
    return _table(lines)


def _notes(benchmarks: Mapping[str, Figures]) -> list[str]:
    notes = []
    for name, f in benchmarks.items():
        title, lost = title_of(name), f["outcomes"]["timeout"]
        if f["kept_out"]:
            more = f["kept_out"] - len(f["kept_out_rows"])
            rows = [*f["kept_out_rows"], *([f"and {more} more"] if more else [])]
            notes.append("\n".join([f"{title}, kept out:\n", *(f"- {row}" for row in rows)]))
        if lost:
            notes.append(f"{title}: {lost} responses took too long to verify and count as wrong.")
    return notes


def _with_interval(figures: Figures | None) -> str:
    if figures is None:
        return "–"
    low, high = figures["avg_interval"]
    return f"{_percent(figures['avg'])} [{_percent(low)}, {_percent(high)}]"


def _percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in plain text too."""
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    rule = ["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])
