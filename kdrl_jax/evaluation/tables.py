"""From responses to figures, and from figures to a Markdown table beside the paper's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdrl_jax.evaluation.benchmarks import BENCHMARKS, title_of
from kdrl_jax.evaluation.metrics import (
    avg_at_k,
    bootstrap_interval,
    maj_at_k,
    pass_at_k,
    repetition_rate,
)
from kdrl_jax.evaluation.paper_tables import AVERAGE, SIX, PaperTable
from kdrl_jax.types import OUTCOMES

Figures = dict[str, Any]


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
    parts: dict[str, list[float]] = {}
    for row in rows:
        parts.setdefault(row.get("group", ""), []).append(row["reward"])
    return {
        "problems": len(rewards),
        "samples": samples,
        "avg": float(average.mean()),
        "avg_interval": list(bootstrap_interval(average)),
        "pass": {str(k): float(pass_at_k(rewards, k).mean()) for k in ks},
        "by": {value: float(np.mean(parts[value])) for value in sorted(parts) if value},
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
    """The mean of Avg@k over KDRL's six benchmarks; None unless all six are there."""
    if not set(SIX) <= benchmarks.keys():
        return None
    return float(np.mean([benchmarks[name]["avg"] for name in SIX]))


def markdown(
    results: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]] = (),
    papers: Sequence[PaperTable] = (),
) -> str:
    """`results.md`: accuracy beside the papers' figures, then everything else that was measured.

    Args:
      results: the content of `results.json`: "checkpoint", "settings" and "benchmarks".
      others: further ones to compare with.
      papers: tables that such a model belongs beside.
    """
    names = list(results["benchmarks"])
    ours = [results, *others]
    parts = [
        f"# Evaluation of {results['checkpoint']}",
        "Accuracy in %: Avg@k, the mean over k samples of each problem, with the 95 % bootstrap "
        "interval over problems (a point where all score alike).",
        _accuracy(names, ours, papers),
        *_said_of(papers, names, results["settings"]),
        *(_by_part(name, ours, papers) for name in names if results["benchmarks"][name].get("by")),
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


def _accuracy(
    names: Sequence[str], ours: Sequence[Mapping[str, Any]], papers: Sequence[PaperTable]
) -> str:
    whole = set(SIX) <= set(names)
    columns = [*names, AVERAGE] if whole else list(names)
    titles = [title_of(name) for name in names] + [AVERAGE] * whole
    lines = [["", *titles]]
    for one in ours:
        cells = [_with_interval(one["benchmarks"].get(name)) for name in names]
        mean = average(one["benchmarks"])
        lines.append([f"**{one['checkpoint']}**", *cells, *[_percent(mean)] * whole])
    return _table(lines + _paper_lines(papers, columns))


def _paper_lines(papers: Sequence[PaperTable], columns: Sequence[str]) -> list[list[str]]:
    """A line for each row of the papers that has a figure in one of the columns."""
    return [
        [
            f"{table.source} ({table.tokens:,} tokens): {name}",
            *(_percent(row[c] / 100 if c in row else None) for c in columns),
        ]
        for table in papers
        for name, row in table.rows.items()
        if any(c in row for c in columns)
    ]


def _said_of(
    papers: Sequence[PaperTable], names: Sequence[str], settings: Mapping[str, Any]
) -> list[str]:
    """What to know of the papers' rows; that there are none."""
    shown = [p for p in papers if any(name in row for row in p.rows.values() for name in names)]
    whole = [p for p in papers if set(SIX) <= set(names) and p not in shown]
    if not any(name in BENCHMARKS for name in names):
        return []
    if not shown and not whole:
        return ["No table of KDRL or RLAD has such a model on these benchmarks."]
    text = (
        "Rows of the papers: KDRL is arXiv 2506.02208, where k is 16 for AIME and AMC and 1 "
        "elsewhere; RLAD is arXiv 2602.22495, where k is 32 in mathematics. Their AIME24 and AMC23 "
        "are those of AI-MO's validation sets, their AIME25 is OpenCompass's; see docs/papers.md."
    )
    budgets = {table.tokens for table in [*shown, *whole]}
    if (own := settings.get("max_new_tokens")) is not None and own not in budgets:
        text += f" Here a response may have {own:,} tokens, so the rows are not of equal terms."
    return [text]


def _by_part(name: str, ours: Sequence[Mapping[str, Any]], papers: Sequence[PaperTable]) -> str:
    """The accuracy of a benchmark's parts, see `eval.by`."""
    values = sorted(ours[0]["benchmarks"][name]["by"], key=lambda x: (len(x), x))
    lines = [[f"{title_of(name)} by part", *values]]
    for one in ours:
        found = one["benchmarks"].get(name, {}).get("by", {})
        lines.append([f"**{one['checkpoint']}**", *(_percent(found.get(x)) for x in values)])
    return _table(lines + _paper_lines(papers, [f"{name}/{x}" for x in values]))


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
