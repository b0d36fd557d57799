"""Draw learning curves of one or several runs.

    python -m kdrl_jax.report RUN [RUN …] [--output=FILE.png]

Held-out accuracy, reward, KL to the teacher and response length against the step, one line a run.
Without --output the picture is RUN/curves.png of the first run. Needs the `plot` extra.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kdrl_jax.cli import run_entry
from kdrl_jax.training.metrics import read_metrics
from kdrl_jax.types import UserError

PANELS = (
    ("eval/accuracy", "held-out accuracy"),
    ("reward/mean", "reward of rollouts"),
    ("kl/teacher", "KL(student‖teacher), nats per token"),
    ("length/mean", "response length, tokens"),
)


def draw(runs: list[Path], output: Path) -> None:
    """Write a PNG of the panels above.

    Args:
      runs: folders with a `metrics.jsonl`.
      output: the PNG's path.

    Raises:
      UserError: a run without metrics, or matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError("matplotlib: not installed; pip install 'kdrl_jax[plot]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = {run: read_metrics(run / "metrics.jsonl") for run in runs}
    empty = [
        f"{run}: holds no metrics.jsonl with a step; give a run's folder"
        for run in runs
        if not rows[run]
    ]
    if empty:
        raise UserError(*empty)
    shown = [p for p in PANELS if any(p[0] in row for run in runs for row in rows[run])]
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3.2), squeeze=False)
    for axis, (name, title) in zip(axes[0], shown, strict=True):
        for i, run in enumerate(runs):
            points = [(row["step"], row[name]) for row in rows[run] if name in row]
            if points:
                marker = "o" if name.startswith("eval/") else None
                style = {"marker": marker, "ms": 4, "color": f"C{i}", "label": _label(run)}
                axis.plot(*zip(*points, strict=True), **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if name in ("eval/accuracy", "reward/mean"):
            axis.set_ylim(0, 1)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def _label(run: Path) -> str:
    config = run / "config.json"
    objective = (
        json.loads(config.read_text(encoding="utf-8"))["objective"] if config.exists() else ""
    )
    return f"{run.name} ({objective})" if objective else run.name


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, metavar="FILE.png")
    args = parser.parse_args(argv)
    output = args.output or args.runs[0] / "curves.png"
    draw(args.runs, output)
    print(f"written: {output}")


if __name__ == "__main__":
    run_entry(main)
