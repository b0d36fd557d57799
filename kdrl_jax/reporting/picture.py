"""The picture: four curves of one or several runs as a PNG, for a README or a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdrl_jax.reporting.runs import RunRecord
from kdrl_jax.types import UserError

PANELS = (
    ("eval/accuracy", "held-out accuracy"),
    ("reward/mean", "reward of rollouts"),
    ("kl/teacher", "KL(student‖teacher), nats per token"),
    ("length/mean", "response length, tokens"),
)


def draw(runs: Sequence[RunRecord], output: Path) -> None:
    """Write a PNG of the panels above, of those that any run has.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError("matplotlib: not installed; pip install 'kdrl_jax[plot]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [p for p in PANELS if any(p[0] in run.columns for run in runs)]
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3.2), squeeze=False)
    for axis, (name, title) in zip(axes[0], shown, strict=True):
        for i, run in enumerate(runs):
            values = run.columns.get(name, [])
            points = [p for p in zip(run.columns["step"], values, strict=False) if p[1] is not None]
            if points:
                marker = "o" if name.startswith("eval/") else None
                label = f"{run.name} ({run.objective})" if run.objective else run.name
                style = {"marker": marker, "ms": 4, "color": f"C{i}", "label": label}
                axis.plot(*zip(*points, strict=True), **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if name == "eval/accuracy":
            axis.set_ylim(0, 1)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)
