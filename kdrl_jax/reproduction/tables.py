"""The report's tables as plain records: what each cell says, not how it looks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from kdrl_jax.reproduction.claims import PUBLISHED, Difference, Judgement
from kdrl_jax.reproduction.grid import Grid
from kdrl_jax.reproduction.methods import METHODS
from kdrl_jax.reproduction.statistics import Interval, bootstrap
from kdrl_jax.reproduction.study import AT_TIME, Study

MINUS, DASH, NONE = "−", "–", "·"
TITLES = {"knights_knaves": "Knights and Knaves"}
REFERENCES = ("grpo", "kd_rkl", "kdrl")
NAMES = {
    "accuracy": "accuracy",
    AT_TIME: "accuracy at equal time",
    "drop": "accuracy lost again",
    "length": "length",
    "truncated": "clip ratio",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """text, in small print beside it its interval, and a style: '' | better | worse | name."""

    text: str
    sub: str = ""
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of entries; the first entry of a row names it."""

    id: str
    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]


def number(value: float, digits: int = 1, signed: bool = False) -> str:
    """'12.3', '+0.4', '−3.0' or a dot for NaN."""
    if math.isnan(value):
        return NONE
    text = f"{abs(value):.{digits}f}"
    if value < 0 and float(text):
        return MINUS + text
    return f"+{text}" if signed and float(text) else text


def level(interval: Interval, scale: float = 1.0, digits: int = 1) -> Entry:
    """A mean and its interval."""
    sub = ""
    if not math.isnan(interval.low):
        low, high = (number(scale * x, digits) for x in (interval.low, interval.high))
        sub = f"{low}{DASH}{high}" if MINUS not in low else f"{low} to {high}"
    return Entry(number(scale * interval.mean, digits), sub)


def change(interval: Interval, scale: float = 100.0, digits: int = 1, less: bool = False) -> Entry:
    """A signed difference; better or worse where its interval excludes 0."""
    if math.isnan(interval.low):
        return Entry(number(scale * interval.mean, digits, signed=True))
    low, high = (number(scale * x, digits, signed=True) for x in (interval.low, interval.high))
    up, down = ("worse", "better") if less else ("better", "worse")
    kind = up if interval.low > 0 else down if interval.high < 0 else ""
    text = number(scale * interval.mean, digits, signed=True)
    return Entry(text, f"[{low}, {high}]", kind)


def _name(method: str, note: bool = False) -> Entry:
    return Entry(METHODS[method].label, METHODS[method].note if note else "", "name")


def _mean(study: Study, task: str, method: str, metric: str) -> Interval:
    return bootstrap(list(study.values(task, method, metric).values()))


def title(task: str) -> str:
    """'knights_knaves' as 'Knights and Knaves'."""
    return TITLES.get(task, task.replace("_", " ").capitalize())


def main_table(study: Study, grid: Grid, teachers: Mapping[str, Mapping[str, float]]) -> Table:
    """The analogue of the papers' Tables 1 and 2, with theirs beside it."""
    head = ["Method"]
    for task in grid.tasks:
        head += [f"{title(task)}, %", "Δ GRPO"]
    head += list(PUBLISHED)
    start = [Entry("Student before", "the warm start of each seed", "name")]
    teacher = [Entry("Teacher", "the same for all seeds", "name")]
    for task in grid.tasks:
        start += [level(bootstrap(list(study.start(task).values())), 100), Entry(NONE)]
        known = teachers.get(task, {}).get("teacher", math.nan)
        teacher += [Entry(number(100 * known)), Entry(NONE)]
    rows = [(*start, *(Entry(published.get("start", NONE)) for published in PUBLISHED.values()))]
    for method in grid.methods:
        row = [_name(method, note=True)]
        for task in grid.tasks:
            row.append(level(_mean(study, task, method, "accuracy"), 100))
            gain = study.difference(task, "accuracy", method, "grpo")
            row.append(Entry(NONE) if method == "grpo" else change(gain))
        rows.append(
            (*row, *(Entry(published.get(method, NONE)) for published in PUBLISHED.values()))
        )
    rows.append((*teacher, *(Entry(NONE) for _ in PUBLISHED)))
    return Table(
        "main",
        "All methods after the same number of steps",
        "Held-out accuracy, mean over seeds with its 95 % interval; Δ is paired by seed. On the "
        "right the papers' own figures: other models, other benchmarks, printed for the order of "
        "the methods and not for their size.",
        tuple(head),
        tuple(rows),
    )


def difference_table(study: Study, grid: Grid, task: str) -> Table:
    """Each method against the three that the claims refer to."""
    rows = []
    for method in grid.methods:
        row = [_name(method)]
        for other in REFERENCES:
            same = method == other or not study.has(task, other)
            gain = study.difference(task, "accuracy", method, other)
            row.append(Entry(NONE) if same else change(gain))
        rows.append(tuple(row))
    head = ("Method", *(f"against {METHODS[m].label}" for m in REFERENCES))
    note = "Points of final accuracy, paired by seed, with 95 % intervals."
    return Table(f"differences_{task}", f"{title(task)}: differences", note, head, tuple(rows))


def time_table(study: Study, grid: Grid, task: str) -> Table:
    """Accuracy at the training time that all methods reached."""
    methods = [m for m in grid.methods if study.has(task, m)]
    seconds = study.common_time(task, methods)
    rows = []
    for method in methods:
        values = bootstrap(list(study.at(task, method, seconds).values()))
        cost = _mean(study, task, method, "step_seconds").mean
        steps = f"{seconds / cost:.0f}" if cost and not math.isnan(seconds) else NONE
        row = [_name(method), Entry(number(cost, 3)), Entry(steps), level(values, 100)]
        for other in ("grpo", "kd_rkl"):
            same = method == other or not study.has(task, other)
            gain = study.difference(task, AT_TIME, method, other)
            row.append(Entry(NONE) if same else change(gain))
        rows.append(tuple(row))
    at = f"at {number(seconds)} s, %"
    head = ("Method", "s a step", "steps by then", at, "Δ GRPO", "Δ KD-RKL")
    note = (
        "Training time is sampling, grading and scoring, and the update; not evaluations, "
        "checkpoints, compilation or the start of processes. Δ is taken at the time that both "
        "methods of the pair reached."
    )
    return Table(f"time_{task}", f"{title(task)}: at equal time", note, head, tuple(rows))


def dynamics_table(study: Study, grid: Grid, task: str) -> Table:
    """Length, truncation, repetition, KL and entropy at the end."""
    columns = (
        ("length", 1.0, 1),
        ("truncated", 100.0, 1),
        ("repetition", 100.0, 1),
        ("kl", 1.0, 3),
        ("entropy", 1.0, 3),
        ("drop", 100.0, 1),
    )
    rows = []
    for method in (m for m in grid.methods if study.has(task, m)):
        values = (level(_mean(study, task, method, key), s, digits) for key, s, digits in columns)
        rows.append((_name(method), *values))
    head = ("Method", "tokens", "cut, %", "repetitive, %", "KL, nats", "entropy, nats", "lost, %")
    note = (
        "At the last evaluation. Cut: ended by the length limit. Repetitive: loops, as a share of "
        "all responses. KL and entropy: per token of the training rollouts. Lost: best accuracy "
        "minus the last."
    )
    return Table(f"dynamics_{task}", f"{title(task)}: how they behave", note, head, tuple(rows))


def ablation_table(study: Study, grid: Grid) -> Table:
    """KDRL's variants against KDRL."""
    task = grid.ablation_task
    rows = []
    for method in ("kdrl", *grid.ablations):
        if not study.has(task, method):
            continue
        accuracy = _mean(study, task, method, "accuracy")
        row = [_name(method, note=True), level(accuracy, 100)]
        for metric, scale, less in (("accuracy", 100.0, False), ("length", 1.0, True)):
            gain = study.difference(task, metric, method, "kdrl")
            row.append(Entry(NONE) if method == "kdrl" else change(gain, scale, less=less))
        row.append(level(_mean(study, task, method, "drop"), 100))
        row.append(level(_mean(study, task, method, "kl"), 1.0, 3))
        rows.append(tuple(row))
    head = ("Variant", "accuracy, %", "Δ KDRL", "Δ tokens", "lost, %", "KL, nats")
    note = "Lost: best accuracy minus the last. With a weaker teacher the KL is to that teacher."
    return Table("ablations", f"{title(task)}: variants of KDRL and RLAD", note, head, tuple(rows))


def seed_table(study: Study, grid: Grid) -> Table:
    """Final accuracy of every cell."""
    rows = []
    for task in grid.tasks:
        begun = study.start(task)
        starts = (Entry(number(100 * begun.get(seed, math.nan))) for seed in grid.seeds)
        rows.append((Entry(f"{title(task)}: student before", "", "name"), *starts))
        found = dict.fromkeys(r.method for r in study.results if r.task == task)
        for method in found:
            values = study.values(task, method, "accuracy")
            cells = study.cells(task, method)
            entries = [
                Entry(
                    number(100 * values.get(seed, math.nan)),
                    "diverged" if seed in cells and cells[seed].status == "diverged" else "",
                )
                for seed in grid.seeds
            ]
            rows.append((Entry(f"{title(task)}: {METHODS[method].label}", "", "name"), *entries))
    head = ("Final accuracy, %", *(f"seed {seed}" for seed in grid.seeds))
    return Table("seeds", "Every seed", "", head, tuple(rows))


def failure_table(study: Study, expected: int) -> Table:
    """The cells that did not finish."""
    rows = [
        (
            Entry(f"{r.task}/{r.method}/{r.seed}", "", "name"),
            Entry(r.status),
            Entry(f"{r.steps[-1]}" if r.steps else NONE),
            Entry(r.message or NONE),
        )
        for r in study.results
        if r.status != "finished"
    ]
    missing = expected - len(study.results)
    note = f"{missing} cells have not been started." if missing else ""
    if not rows and not missing:
        note = f"None: all {expected} runs finished."
    head = ("Cell", "state", "last evaluation", "what it said")
    return Table("failures", "Runs that did not finish", note, head, tuple(rows))


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One difference of a claim: in words, and as a bar whose middle is 0 and right is as claimed.

    low, mean, high: in per cent of the bar's width; None without an interval.
    """

    text: str
    interval: str
    what: str
    low: float | None
    mean: float | None
    high: float | None


def evidence(judgements: Sequence[Judgement]) -> list[list[Evidence]]:
    """For each judgement its differences; bars of one unit share one scale."""
    pairs = [
        (_unit(difference), difference, interval)
        for judgement in judgements
        for difference, interval in zip(
            judgement.claim.differences, judgement.intervals, strict=True
        )
    ]
    reach: dict[str, float] = {}
    for unit, _, interval in pairs:
        bounds = [abs(x) for x in (interval.low, interval.high) if not math.isnan(x)]
        reach[unit] = max([reach.get(unit, 0.0), *bounds])
    left = iter(pairs)
    return [
        [_evidence(*next(left), reach) for _ in judgement.intervals] for judgement in judgements
    ]


def _unit(difference: Difference) -> str:
    return "tokens" if difference.metric == "length" else "points"


def _evidence(
    unit: str, difference: Difference, interval: Interval, reach: Mapping[str, float]
) -> Evidence:
    shown = change(interval, 100.0 if unit == "points" else 1.0, less=difference.less)
    left, right = METHODS[difference.left].label, METHODS[difference.right].label
    places: list[float | None] = [None, None, None]
    if not math.isnan(interval.low) and reach[unit]:
        sign = -1 if difference.less else 1
        ends = sorted(sign * x for x in (interval.low, interval.high))
        where = (ends[0], sign * interval.mean, ends[1])
        places = [round(50 + 50 * x / reach[unit], 2) for x in where]
    return Evidence(
        f"{shown.text} {unit}",
        shown.sub,
        f"{left} {MINUS} {right}, {NAMES[difference.metric]}",
        *places,
    )
