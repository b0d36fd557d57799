"""The page: one HTML file that needs nothing from outside and cannot ask for it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kdrl_jax.reporting.panels import panels_of
from kdrl_jax.reporting.runs import RunRecord
from kdrl_jax.training.health import WATCHES
from kdrl_jax.types import UserError

HERE = Path(__file__).parent
SCRIPTS = ("theme.js", "common.js", "charts.js", "samples.js")
"""The first one before the page, the others after it."""


def render(runs: Sequence[RunRecord]) -> str:
    """The HTML of a report.

    Everything that runs wrote is data for the scripts, who put it on the page as text. The page's
    policy admits these scripts alone, by their digests, and no connection.

    Raises:
      UserError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("plotly: not installed; pip install 'kdrl_jax[plot]'") from error
    own = [(HERE / name).read_text(encoding="utf-8") for name in SCRIPTS]
    scripts = [own[0], get_plotlyjs(), *own[1:]]
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((HERE / "page.html.j2").read_text(encoding="utf-8"))
    data = {
        "runs": [dataclasses.asdict(run) for run in runs],
        "groups": panels_of({name for run in runs for name in run.columns}),
    }
    return template.render(
        title=" · ".join(run.name for run in runs),
        runs=runs,
        advice={name: watch.advice for name, watch in WATCHES.items()},
        has_samples=any(run.samples for run in runs),
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy=" ".join(f"'sha256-{digest}'" for digest in digests),
        data=Markup(script_json(data)),
    )


def script_json(data: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
