"""Which metrics a report draws, and how they are put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Panel:
    """A chart: one metric or a few of one unit, drawn for every run that has them.

    Attributes:
      series: metric → what it is called beside the others of the panel.
      unit: of the vertical axis.
      share: whether the axis goes from 0 to 1.
      against: a metric that takes the place of step or time; "": none.
    """

    title: str
    series: dict[str, str]
    unit: str = ""
    share: bool = False
    against: str = ""


def panel(title: str, *metrics: str, **options: Any) -> Panel:
    """A panel of one metric, or of several given as "metric=name"."""
    parts = (metric.partition("=") for metric in metrics)
    return Panel(title, {metric: name for metric, _, name in parts}, **options)


GROUPS: dict[str, tuple[Panel, ...]] = {
    "Learning": (
        panel("Held-out accuracy", "eval/accuracy", share=True),
        panel(
            "Accuracy over length",
            "eval/accuracy",
            unit="by tokens of a response",
            share=True,
            against="eval/length",
        ),
        panel("Accuracy less the baseline's", "eval/gain_over_baseline", unit="mean of three"),
        panel("Reward of rollouts", "reward/mean=trained on", "reward/drawn_mean=drawn"),
        panel(
            "Groups without a difference",
            "reward/all_right_frac=all right",
            "reward/all_wrong_frac=all wrong",
            "reward/equal_frac=equal rewards",
            unit="share of groups",
            share=True,
        ),
        panel(
            "Responses without a usable answer",
            "reward/format_frac=wrong format",
            "reward/unparsable_frac=unparsable",
            "reward/timeout_frac=timed out",
            unit="share of responses",
        ),
    ),
    "Distillation": (
        panel(
            "KL(student‖teacher)",
            "kl/teacher=k1",
            "kl/teacher_k3=k3",
            unit="nats per token",
        ),
        panel(
            "KL by mask",
            "kl/distilled=tokens that are distilled",
            "kl/masked=tokens masked from it",
            unit="nats per token",
        ),
        panel("KL loss of distilled tokens", "kl/distilled_k2", unit="k2, nats per token"),
        panel("β", "beta"),
        panel("α of TRRD", "alpha", share=True),
        panel("Distilled", "kd/active_frac", unit="share of weight", share=True),
        panel("Log-ratios clamped by TRRD", "trrd/clamped_frac", unit="share", share=True),
        panel("Gradient's change with a shuffled teacher", "health/teacher_effect", unit="share"),
    ),
    "Policy": (
        panel("Entropy", "entropy/mean", unit="nats per token"),
        panel("Coefficient of the entropy bonus", "entropy/coef"),
        panel("Importance ratios clipped", "policy/clip_frac", unit="share of weight"),
        panel("Importance ratio", "policy/ratio_mean", unit="mean"),
        panel("KL(sampler‖trainer)", "mismatch/kl", unit="nats per token"),
        panel("KL(student‖initial student)", "kl/reference", unit="nats per token"),
        panel("Gradient norm", "gradient/norm", unit="before clipping"),
        panel("Loss", "loss=all terms", "loss/policy=policy", "loss/kd=distillation"),
        panel("Updates skipped", "update/skipped", unit="share"),
    ),
    "Length": (
        panel("Response length", "length/mean=mean", "length/max=longest", unit="tokens"),
        panel(
            "Clip ratio",
            "length/truncated_frac=of rollouts",
            "eval/truncated_frac=of evaluations",
            unit="share of responses cut at the limit",
        ),
        panel(
            "Repetition rate",
            "length/overlong_repetition_frac=of overlong rollouts",
            "eval/overlong_repetition_frac=of overlong evaluations",
            "length/repetition_frac=of all rollouts",
            unit="share that repeats itself",
        ),
    ),
    "Throughput": (
        panel(
            "Tokens per second",
            "tokens_per_s/rollout=rollout",
            "tokens_per_s/update=update",
            "tokens_per_s/total=whole step",
            unit="tokens/s",
        ),
        panel(
            "Use of the devices",
            "perf/mfu_update=MFU of updates",
            "perf/mfu_score=MFU of scoring",
            "perf/decode_roofline=decoding, of its roofline",
            unit="share of peak",
        ),
        panel("Slots in use while decoding", "perf/slot_use", unit="share", share=True),
        panel(
            "Partial rollouts",
            "rollout/carried_frac=problems begun before",
            "rollout/stale_frac=tokens drawn before",
            unit="share",
        ),
        panel("Rollout batches a step", "rollout/batches", unit="batches"),
    ),
}


def all_groups(metrics: Iterable[str]) -> dict[str, tuple[Panel, ...]]:
    """GROUPS, and what reward functions of the user's own gave, by their names in `metrics`."""
    start, end = "reward/", "_failed_frac"
    failed = sorted(name for name in metrics if name.startswith(start) and name.endswith(end))
    if not failed:
        return GROUPS
    names = [name.removeprefix(start).removesuffix(end) for name in failed]
    own = (
        panel("Reward functions", *(f"{start}{name}={name}" for name in names), unit="mean"),
        panel(
            "Reward functions that failed",
            *(f"{start}{name}{end}={name}" for name in names),
            unit="share of groups",
            share=True,
        ),
    )
    return {**GROUPS, "Learning": GROUPS["Learning"] + own}


def panels_of(metrics: Iterable[str]) -> list[dict[str, Any]]:
    """The groups with what they have to show, as JSON: panels without any of `metrics` are out."""
    found, known = [], set(metrics)
    for title, panels in all_groups(known).items():
        shown = [
            dataclasses.asdict(p) | {"series": {m: n for m, n in p.series.items() if m in known}}
            for p in panels
            if known & p.series.keys() and {p.against} - {""} <= known
        ]
        if shown:
            found.append({"title": title, "panels": shown})
    return found


def drawn_metrics(metrics: Iterable[str]) -> set[str]:
    """Those of `metrics` that any panel has."""
    known = set(metrics)
    panels = (panel for group in all_groups(known).values() for panel in group)
    return known & {m for panel in panels for m in (*panel.series, panel.against)}
