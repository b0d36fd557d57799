"""The report's pictures: one drawing for PNG files and for SVG that takes the page's colours.

A method has one colour and dash everywhere. Hue is the family, so that five hues, told apart in
every common form of colour blindness, serve all methods: blue the joint loss, red reinforcement
learning, green distillation, purple RLAD, grey supervised.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_jax.reproduction.methods import METHODS
from kdrl_jax.reproduction.results import ACCURACY
from kdrl_jax.reproduction.study import Study
from kdrl_jax.reproduction.tables import title
from kdrl_jax.types import UserError

BLUE, RED, GREEN, PURPLE, GREY = "#2b7bba", "#d55e00", "#1a936f", "#b565a7", "#808890"
SOLID, DASHED, DOTTED, DASHDOT = "-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (5, 1.5, 1.2, 1.5))
STYLES: dict[str, tuple[str, Any]] = {
    "sft": (GREY, SOLID),
    "kd_rkl": (GREEN, SOLID),
    "grpo": (RED, SOLID),
    "kdrl": (BLUE, SOLID),
    "kdrl_annealing": (BLUE, DASHED),
    "kdrl_adaptive": (BLUE, DOTTED),
    "reward_shaping": (RED, DASHED),
    "trrd": (PURPLE, SOLID),
    "distil_then_rl": (GREEN, DASHED),
    "trrd_straight_through": (PURPLE, DASHED),
    "estimator_k1": (PURPLE, DASHED),
    "estimator_k3": (RED, DASHED),
    "estimator_topk": (GREEN, DASHED),
    "estimator_full": (GREY, DASHED),
    "mask_response": (GREEN, DASHED),
    "mask_group": (PURPLE, DASHED),
    "beta_quarter": (RED, DASHED),
    "beta_fourfold": (GREEN, DASHED),
    "beta_half": (RED, DOTTED),
    "beta_more": (GREEN, DOTTED),
    "weak_kdrl": (BLUE, DASHED),
    "weak_kd_rkl": (GREEN, DASHED),
}
SIZE = (5.4, 3.3)  # inches of one panel
MARGINS = {"left": 0.1, "right": 0.66, "bottom": 0.14, "top": 0.89}  # names stand on the right
INK, FAINT = "#1f2328", "#d0d7de"  # on paper; in SVG they become the page's own
FRACTIONS = (ACCURACY, "eval/truncated_frac", "eval/repetition_frac", "reward/mean")


@dataclasses.dataclass(frozen=True)
class Panel:
    """One diagram: a series of some methods on a task, by step or by training time."""

    id: str
    title: str
    task: str
    series: str
    methods: tuple[str, ...]
    by: str = "step"
    """step | time | length, the mean length of held-out responses."""

    @property
    def x_label(self) -> str:
        names = {"time": "training time, s", "length": "mean length of a response, tokens"}
        return names.get(self.by, "step")


def panels_of(task: str, methods: Sequence[str]) -> list[Panel]:
    """The learning curves and dynamics of a task."""
    wanted = (
        ("accuracy", "Held-out accuracy", ACCURACY, "step"),
        ("accuracy_time", "Held-out accuracy at equal training time", ACCURACY, "time"),
        ("accuracy_length", "Held-out accuracy over response length", ACCURACY, "length"),
        ("length", "Response length, tokens", "eval/length", "step"),
        ("truncated", "Clip ratio: responses cut at the limit", "eval/truncated_frac", "step"),
        ("kl", "KL(student‖teacher), nats per token", "kl/teacher", "step"),
        ("repetition", "Responses that repeat themselves", "eval/repetition_frac", "step"),
        ("entropy", "Entropy of the student, nats per token", "entropy/mean", "step"),
        ("beta", "β", "beta", "step"),
    )
    return [
        Panel(f"{task}_{key}", heading, task, series, tuple(methods), by)
        for key, heading, series, by in wanted
    ]


ABLATIONS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        "estimators",
        "Estimators of the KL",
        ACCURACY,
        ("kdrl", "estimator_k1", "estimator_k3", "estimator_topk", "estimator_full"),
    ),
    ("masks", "Reward-guided masks", ACCURACY, ("kdrl", "mask_response", "mask_group")),
    (
        "masks_length",
        "Reward-guided masks: length, tokens",
        "eval/length",
        ("kdrl", "mask_response", "mask_group"),
    ),
    (
        "betas",
        "Size of β",
        ACCURACY,
        ("kdrl", "beta_quarter", "beta_half", "beta_more", "beta_fourfold"),
    ),
    ("teachers", "A weaker teacher", ACCURACY, ("kdrl", "weak_kdrl", "kd_rkl", "weak_kd_rkl")),
    ("rlad", "RLAD's clamp", ACCURACY, ("kdrl", "trrd", "trrd_straight_through")),
)


def ablation_panels(study: Study, task: str) -> list[Panel]:
    """The ablations of which the task has at least one variant."""
    found = []
    for key, heading, series, methods in ABLATIONS:
        there = tuple(method for method in methods if study.has(task, method))
        if there and set(there) - {"kdrl", "kd_rkl", "trrd"}:
            found.append(Panel(f"ablation_{key}", heading, task, series, there))
    return found


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError("matplotlib: not installed; pip install 'kdrl_jax[plot]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _style() -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "kdrl_jax",
        "font.size": 10,
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
    }


def has_data(study: Study, panel: Panel) -> bool:
    """Whether any method has the panel's series, and anywhere other than 0."""
    curves = [study.curve(panel.task, m, panel.series, panel.by) for m in panel.methods]
    return any(len(x) and np.any(mean != 0) for x, mean, _, _ in curves)


def draw(axis: Any, study: Study, panel: Panel, heading: str) -> None:
    """Lines with 95 % bands, each line named at its end in its own colour."""
    ends: list[tuple[float, float, str]] = []
    right = 0.0
    for method in panel.methods:
        x, mean, low, high = study.curve(panel.task, method, panel.series, panel.by)
        if not len(x) or (panel.series == "beta" and not np.any(mean)):
            continue  # not measured, or a method without β
        colour, dash = STYLES[method]
        front = 3 if method == "kdrl" else 2
        axis.plot(x, mean, color=colour, linestyle=dash, zorder=front)
        if panel.by == "length":  # where it ends says it all
            axis.plot(x[-1], mean[-1], color=colour, marker="o", zorder=front)
        else:
            axis.fill_between(x, low, high, color=colour, alpha=0.10, linewidth=0, zorder=1)
        ends.append((float(mean[-1]), float(x[-1]), method))
        right = max(right, float(x[-1]))
    axis.set_title(heading, pad=10)
    axis.set_xlabel(panel.x_label)
    if panel.by != "length":
        axis.set_xlim(0, right or 1)
    axis.margins(y=0.08)
    if panel.series in FRACTIONS:
        from matplotlib.ticker import PercentFormatter

        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, 0.0), min(high, 1.02))
    _name_ends(axis, ends)


def _name_ends(axis: Any, ends: list[tuple[float, float, str]]) -> None:
    """Names beside the right edge at the height of the lines' ends, moved apart where they meet.

    Args:
      ends: y and x of each line's last point, and the method.
    """
    low, high = axis.get_ylim()
    gap = (high - low) * 0.068
    places = spread([y for y, _, _ in sorted(ends)], gap, low, high)
    for (y, x, method), place in zip(sorted(ends), places, strict=True):
        colour, _ = STYLES[method]
        axis.annotate(
            METHODS[method].label,
            xy=(x, y),
            xytext=(1.06, place),
            xycoords="data",
            textcoords=("axes fraction", "data"),
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 1,
            },
        )


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to increasing `values` as lets neighbours be `gap` apart, within bounds.

    Where there is no room for all within [low, high] they stand `gap` apart from `low` upward.
    """
    places = list(values)
    for _ in range(200):
        moved = False
        for i in range(len(places) - 1):
            short = gap - (places[i + 1] - places[i])
            if short > 1e-9 * gap:
                places[i] -= short / 2
                places[i + 1] += short / 2
                moved = True
        if places:
            shift = max(low - places[0], 0.0) or min(high - places[-1], 0.0)
            places = [place + shift for place in places]
        if not moved:
            break
    return places


def svg(study: Study, panel: Panel) -> str:
    """A panel as an inline `<svg>`: text as text, ink and lines in the page's CSS colours."""
    plt = _pyplot()
    with plt.rc_context(_style()):
        figure, axis = plt.subplots(figsize=SIZE, gridspec_kw=MARGINS)
        draw(axis, study, panel, panel.title)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return adapt(target.getvalue(), panel)


def adapt(text: str, panel: Panel) -> str:
    """Only the `<svg>` element, with ids of its own, a name, and colours from the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{panel.id}-", text)
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--rule)")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{panel.title}"', 1)


def write_png(study: Study, panels: Sequence[Panel], path: Path, columns: int = 2) -> None:
    """Panels on one sheet, on white."""
    plt = _pyplot()
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(_style()):
        size = (SIZE[0] * columns, SIZE[1] * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            draw(axis, study, panel, f"{title(panel.task)}: {panel.title}")
        figure.tight_layout(w_pad=3.0, h_pad=2.0)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
        plt.close(figure)
