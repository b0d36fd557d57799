"""Evaluating as a function."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kdrl_jax.api.common import Log, Rows, config_of, refuse_others, speaking_as
from kdrl_jax.config import saved_config, update_config
from kdrl_jax.evaluate import evaluate as run_evaluation
from kdrl_jax.evaluation.benchmarks import find_benchmarks, load_benchmark, load_data, name_data
from kdrl_jax.evaluation.model import find_policy
from kdrl_jax.evaluation.planning import Refusals
from kdrl_jax.training.display import Display
from kdrl_jax.training.rows import write_rows
from kdrl_jax.training.run_weights import is_run, split_step


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation has come to.

    Attributes:
      output: the folder with every response, results.json and results.md.
      results: the content of results.json.
    """

    output: Path
    results: dict[str, Any]

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of right responses by benchmark, from 0 to 1."""
        return {name: x["avg"] for name, x in self.results["benchmarks"].items()}

    @property
    def table(self) -> str:
        """The results as Markdown."""
        return (self.output / "results.md").read_text(encoding="utf-8")

    def responses(self, name: str) -> list[dict[str, Any]]:
        """Every response to a benchmark's problems, with its verdict."""
        lines = (self.output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def evaluate(
    model: str | Path,
    output: str | Path | None = None,
    *,
    benchmarks: Sequence[str] = (),
    data: Rows | None = None,
    data_dir: str | Path | None = None,
    config: str | Path | ConfigDict | None = None,
    samples: int | None = None,
    limit: int | None = None,
    changes: Mapping[str, Any] | None = None,
    log: Log = "text",
    **others: Any,
) -> EvaluationResult:
    """Asks a model problems and grades its answers. The same call goes on where it was interrupted.

    Args:
      model: a run's folder, RUN/checkpoints/STEP, a Hugging Face folder, or OWNER/NAME of the hub.
      output: the folder of the results; None: `evaluation` in the run's folder, or
        runs/evaluation-NAME for any other model.
      benchmarks: 'math500', 'aime24', …; see `python -m kdrl_jax.evaluate --help`.
      data: problems of one's own, beside or instead of benchmarks.
      data_dir: a folder with the benchmarks' files; None: they come from the hub.
      config, changes: how answers are asked for and graded; None: the run's own config, or 'mine'.
      samples: answers to each problem; None: eval.samples of one's own, else the benchmark's.
      limit: the first so many problems of each; None: all.
      log: 'text' or 'quiet'.
      others: are refused, with the names that they have here.

    Raises:
      UserError: before weights are loaded, one line for each problem.
    """
    refuse_others(others, "evaluate")
    run = split_step(Path(model))[0]
    usual = run / "evaluation" if is_run(run) else Path(f"runs/evaluation-{run.name}")
    place = Path(output) if output else usual
    with speaking_as(log):
        wrong = Refusals()
        if not benchmarks and data is None:
            wrong.append("benchmarks: empty, and no data; give one of them")
        known = wrong.attempt(_evaluation_config, model, config, changes)
        policy = wrong.attempt(find_policy, model, "model", display=Display())
        folder = Path(data_dir) if data_dir else None
        chosen = wrong.attempt(find_benchmarks, list(benchmarks)) or []
        loaded = [x for b in chosen if (x := wrong.attempt(load_benchmark, b, folder))]
        if data is not None and known is not None:
            path = wrong.attempt(write_rows, place, "data", data)
            named = wrong.attempt(name_data, [path]) if path else None
            reading = {"on_bad": known.data.on_bad, "samples": known.eval.samples}
            for one in (named or {}).items():
                own = wrong.attempt(load_data, *one, known.data.fields, **reading)
                loaded += [own] if own else []
        wrong.raise_any()
        assert known is not None
        assert policy is not None
        results = run_evaluation(known, policy, loaded, place, samples=samples, limit=limit)
    return EvaluationResult(place, results)


def _evaluation_config(
    model: str | Path, config: str | Path | ConfigDict | None, changes: Mapping[str, Any] | None
) -> ConfigDict:
    saved = split_step(Path(model))[0] / "config.json"
    own = config is None and is_run(saved.parent) and saved.is_file()
    found = saved_config(saved) if own else config_of(config or "mine")[0]
    return update_config(found, changes or {})
