"""The book-keeping of a run: metrics one step late, samples, checkpoints, the summary."""

from __future__ import annotations

import json
import platform
import signal
import time
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from kdrl_jax import processes
from kdrl_jax.config import to_json
from kdrl_jax.data import Tokenizer
from kdrl_jax.models import ModelConfig
from kdrl_jax.objectives import METHODS, AdaptiveEntropy, Trend
from kdrl_jax.training.adapters import FILE as BASE_FILE
from kdrl_jax.training.baseline import Baseline
from kdrl_jax.training.checkpoints import CheckpointStore, stored_steps
from kdrl_jax.training.collect import Collected
from kdrl_jax.training.compiling import CompileCounter
from kdrl_jax.training.display import Display, finite
from kdrl_jax.training.health import Health
from kdrl_jax.training.host_memory import give_back
from kdrl_jax.training.memory_check import MemoryCheck, out_of_memory
from kdrl_jax.training.metrics import MetricsWriter, lock_folder, read_metrics, sparkline
from kdrl_jax.training.performance import Ideal, Meter, speeds
from kdrl_jax.training.phases import Phases
from kdrl_jax.training.provenance import add_provenance
from kdrl_jax.training.roles import write_model_files
from kdrl_jax.training.samples import TokenTraces, write_samples
from kdrl_jax.training.stopping import StopRequest
from kdrl_jax.training.storage import storage_problem, sweep, write_atomic
from kdrl_jax.training.telemetry import StepClock, rollout_metrics, split_kl
from kdrl_jax.training.wandb_run import WandbRun
from kdrl_jax.types import Scores, TrainState, UserError


def open_workdir(
    workdir: Path,
    config: ConfigDict,
    models: Mapping[str, Path],
    shape: ModelConfig,
    tokenizer: Tokenizer,
    data_report: Mapping[str, Any],
    devices: Mapping[str, Any],
) -> CheckpointStore:
    """Take hold of a run's folder, and write down in it what is run.

    Args:
      config: with the models' names as the user gave them.
      models: their folders, by key.
      devices: facts on them, for `add_provenance`.

    Raises:
      UserError: another run holds it, or processes do not share it.
    """
    nonce = workdir / ".processes"

    def begin() -> None:
        lock_folder(workdir)
        for folder in (workdir, workdir / "model", workdir / "samples"):
            sweep(folder)
        if not stored_steps(workdir / "checkpoints"):  # of an earlier try: nothing belongs to it
            (workdir / BASE_FILE).unlink(missing_ok=True)
        write_atomic(workdir / "config.json", to_json(config))
        write_atomic(workdir / "data.json", json.dumps(data_report, indent=2) + "\n")
        write_model_files(workdir, shape, tokenizer, models.get("student.path"))
        add_provenance(workdir, config, models, data_report, devices)
        if processes.count() > 1:
            write_atomic(nonce, uuid.uuid4().hex)

    processes.first_does(begin)
    with processes.together():
        if processes.count() > 1 and not nonce.exists():
            raise UserError(f"--workdir: {workdir} is not shared by all hosts; give one that is")
    if processes.count() > 1:
        processes.agree("--workdir", {"folder": nonce.read_text(encoding="ascii")})
    return CheckpointStore(workdir, config.checkpoint.keep)


class Run:
    """A run's folder while it is being written. Use as a context manager.

    A step's device metrics are read when the next step's rollouts have been started, so the
    devices are never waited for in vain. Of several processes the first writes the files, and all
    write their part of checkpoints.

    Args:
      start: updates already made; lines of `metrics.jsonl` after it are dropped.
      data: digest of the problems, kept with each checkpoint.
      trend: of KL and reward up to `start`.
      health: its watches up to `start`.
      memory: explains it when the devices run out of memory.
      meter: of the speed of a step.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        start: int | None,
        store: CheckpointStore,
        display: Display,
        data: str,
        trend: Trend,
        health: Health,
        memory: MemoryCheck,
        meter: Meter,
    ):
        self._data, self.trend, self._health = data, trend, health
        self._baseline = Baseline(config.health.baseline)
        self._entropy = AdaptiveEntropy(config.entropy_coef, **config.adaptive_entropy)
        self._memory, self._meter, self._step = memory, meter, start or 0
        self.config, self.workdir, self.store = config, workdir, store
        self.display, self.compiles = display, CompileCounter()
        self.stopping = StopRequest(self._told)
        self._begun, self._start, self._accuracy = time.monotonic(), start, ""
        before = [] if start is None else read_metrics(workdir / "metrics.jsonl", up_to=start)
        key = "eval/accuracy"
        self._accuracies = [(row["step"], row[key]) for row in before if key in row]
        self._writer = MetricsWriter(workdir, start) if processes.is_first() else None
        self._wandb: WandbRun | None = None
        self._numbers: dict[str, float] | None = None  # of the last step, to be written
        self._computed: Mapping[str, jax.Array] | None = None  # more of them, to be waited for
        self._ideal: Ideal | None = None

    def __enter__(self) -> Run:
        self.stopping.__enter__()
        c, display = self.config, self.display
        if processes.is_first() and c.wandb.project:
            self._wandb = WandbRun(c, self.workdir, self._start, display.say)
        self._track = display.track("step", c.steps, self._step)
        self.phases = Phases(display, teacher=METHODS[c.objective].uses_teacher)
        self.clock = StepClock(self.phases.enter)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self.config.debug:
            error.add_note(f"debug: in step {self._now()}, phase {self.clock.phase}")
        try:
            alone = processes.count() == 1
            failed = self._close(wait=alone or not isinstance(error, JaxRuntimeError))
            if self._wandb:
                self._wandb.close(code=int(error is not None))
        finally:
            self.stopping.__exit__()  # until here a second signal does no harm
        if isinstance(error, KeyboardInterrupt):
            self.display.say(f"ended in step {self._step + 1}; {self.store.newest()}")
        if error is None and failed:
            error = failed[0]
            if not storage_problem(error, self.workdir):
                raise error
        if problem := storage_problem(error, self.workdir):
            raise UserError(problem, self.store.newest()) from error
        if error is not None and out_of_memory(error):
            # The state may have been donated: nothing can be saved any more.
            saved = self.store.latest_step()
            raise self._memory.explain(error, self.clock.phase, self._now(), saved) from error

    def _now(self) -> int:
        """The step that is being made."""
        phase = self.clock.phase
        waited_for = phase == "update" and self._computed is not None
        return self._step + (not waited_for and phase not in ("eval", "checkpoint"))

    def _told(self, number: int) -> None:
        """Say at once what becomes of a signal; the main thread may be waiting for devices."""
        again = "; Ctrl-C again to end at once" if number == signal.SIGINT else ""
        self.display.say(f"finishing step {self._step + 1}, then saving{again}")

    def _close(self, wait: bool) -> list[Exception]:
        """Close all files, whichever of them fails; what failed.

        Args:
          wait: for a save under way, which may wait for a process that is lost.
        """
        failed = []
        files: list[Any] = [self._track, self.phases, self._writer, self.store if wait else None]
        for file in files:
            try:
                if file:
                    file.close()
            except Exception as error:
                failed.append(error)
        return failed

    def step_done(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        scalars: Mapping[str, float],
        found: Collected,
        scores: Scores,
    ) -> None:
        """Remember a step, whose `metrics` may not have been computed yet."""
        of = (found.rollouts, found.verdicts, found.rewards, found.own)
        numbers = {**scalars, **rollout_metrics(*of)}
        numbers |= self.clock.take()
        self._ideal = self._meter.ideal(found, scores)
        self._numbers, self._computed, self._step = numbers, metrics, step
        self.stopping.step_made()
        self.phases.next_step()
        self.clock.phase = "rollout"

    def goes_on(self) -> bool:
        """Whether nobody has told the run to stop. All processes must call."""
        self.stopping.agree()
        return not self.stopping

    def wait(self, then: str = "rollout") -> dict[str, float] | None:
        """Wait for the remembered step's update; its numbers, or None if there is none.

        Args:
          then: what comes next, for the clock.
        """
        if self._numbers is None:
            self.clock.phase = then
            return None
        if self._computed is not None:
            self.clock.phase = "update"
            computed, self._computed = jax.device_get(self._computed), None
            self._numbers |= split_kl({name: float(value) for name, value in computed.items()})
            self.clock.lap("update", then)
            self._numbers |= self.clock.take()
            self._numbers["time/compilations"] = self.compiles.count
        return self._numbers

    def settle(self) -> None:
        """Write the remembered step's line, and see whether anybody was told to stop."""
        self.stopping.agree()
        numbers, step = self.wait(), self._step
        if numbers is None:
            return
        assert self._ideal
        numbers |= speeds(self._ideal, numbers)
        self._numbers = None
        kl = numbers.get("kl/teacher", self.trend.kl)  # the last known where no teacher was asked
        if not numbers["update/skipped"]:
            self.trend = self.trend.observe(kl, numbers["reward/mean"])
            self.trend = self._entropy.observe(self.trend, numbers["entropy/mean"])
        alerts, lines = self._health.observe(step, numbers)
        numbers |= alerts
        for line in lines:
            self.display.alert(line, step=step)
        self.stopping.unhealthy |= bool(self._health.stop)
        self._write(step, dict(sorted(numbers.items())))
        self._say_step(step, numbers)

    def _say_step(self, step: int, numbers: Mapping[str, float]) -> None:
        """A step's line; with an evaluation also how accuracy has gone so far."""
        shown = f"reward {numbers['reward/mean']:.3f}  length {numbers['length/mean']:.0f}"
        if "kl/teacher" in numbers:
            shown += f"  kl {numbers['kl/teacher']:.4f}"
        if "eval/accuracy" in numbers:
            self._accuracy = f"  accuracy {numbers['eval/accuracy']:.3f}"
        if "eval/accuracy" in numbers or self.display.live:  # which keeps the last one in sight
            shown += self._accuracy
        self._track.advance(f"{shown}  beta {numbers['beta']:.2g}")
        if self._writer and "eval/accuracy" in numbers:
            shares = [share for _, share in self._accuracies]
            curve = f"{shares[0]:.1%} {sparkline(shares)} {shares[-1]:.1%}"
            self.display.say(f"held-out accuracy so far: {curve}")
        if step == (self._start or 0) + 1 and self.compiles.seconds > 1:
            compiled = f"{self.compiles.count} programs in {self.compiles.seconds:.0f} s"
            self.display.say(f"compiled {compiled}")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add an evaluation to the step's line; before the first step it is a line of its own."""
        self.clock.lap("eval")
        so_far = [*self._accuracies, (step, metrics["eval/accuracy"])]
        metrics = {**metrics, **self._baseline.gain(so_far)}
        self.display.event("eval", {"step": step, **metrics})
        numbers = self.wait()
        if numbers is None:
            self._health.observe(step, metrics)
            self._write(step, {**metrics, **self.clock.take()})
            self._accuracy = f"  accuracy {metrics['eval/accuracy']:.3f}"
            self.display.say(f"step {step}: held-out accuracy {metrics['eval/accuracy']:.3f}")
        else:
            numbers |= {**metrics, **self.clock.take()}

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        if "eval/accuracy" in numbers:
            self._accuracies.append((step, numbers["eval/accuracy"]))
        if self._writer:
            row = self._writer.write(step, numbers)
            self.display.event("step", row)
            if self._wandb:
                self._wandb.write(step, row)

    def samples_due(self, step: int) -> int:
        """Returns how many rollouts of a step are to be written.

        Some of the first, of the last and of every `samples.every`-th step.
        """
        s = self.config.samples
        due = s.every and (step % s.every == 0 or step in (1, self.config.steps))
        return s.count if due else 0

    def write_samples(
        self, step: int, found: Collected, tokenizer: Tokenizer, traces: TokenTraces | None
    ) -> None:
        """`samples/step_000010.jsonl`, where they are due: then there are `traces`."""
        if traces is not None and processes.is_first():
            path = self.workdir / "samples" / f"step_{step:06d}.jsonl"
            write_samples(path, found, self.config.samples.count, tokenizer, traces)

    def save(self, step: int, state: TrainState, position: int, carried: str) -> None:
        """Start a checkpoint, after the metrics up to it are in the file."""
        self.settle()
        if self._writer:
            self._writer.sync()
        meta = {"step": step, "seed": self.config.seed, "data_position": position}
        meta |= {"data": self._data, "trend": list(self.trend), "carried": carried}
        meta |= {"health": self._health.to_json()}
        self.clock.phase = "checkpoint"
        self.store.save(step, state, meta)
        give_back()
        self.clock.lap("checkpoint")

    def finish(self, step: int) -> dict[str, Any]:
        """Write and return `summary.json`; say in words how the run ended."""
        self.settle()
        self.store.wait()  # only what is written has been finished
        self._track.close()
        rows, accuracy = read_metrics(self.workdir / "metrics.jsonl"), self._accuracies
        summary: dict[str, Any] = {
            "steps": step,
            "finished": step == self.config.steps,
            "health": self._health.summary(),
            "stopped_by": self._health.stop if step < self.config.steps else "",
            "seconds": round(time.monotonic() - self._begun, 1),
            "compile/count": self.compiles.count,
            "compile/seconds": round(self.compiles.seconds, 1),
            "objective": self.config.objective,
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": processes.count(),
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("jax", "flax", "optax")},
            },
        }
        if accuracy:
            summary["eval/accuracy/first"] = accuracy[0][1]
            summary["eval/accuracy/last"] = accuracy[-1][1]
        if rows:
            summary["last"] = finite({k: v for k, v in rows[-1].items() if isinstance(v, float)})
        if processes.is_first():
            write_atomic(self.workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.display.event("result", summary)
        if self._wandb:
            self._wandb.close({k: v for k, v in summary.items() if k != "last"})
        self._say_end(step, accuracy)
        return summary

    def _say_end(self, step: int, accuracy: list[tuple[int, float]]) -> None:
        say = self.display.say
        if self._health.stop and step < self.config.steps:
            say(f"stopped by health: {self._health.stop}")
            say(
                f"stopped after step {step} and saved. The same command goes on, without "
                "stopping for what it has stopped for; health.* may be changed. Keys that shape "
                "the result need another --workdir, which may begin with these weights: "
                f"--config.student.path={self.workdir}"
            )
        elif step < self.config.steps:
            say(f"stopped after step {step} and saved: nothing is lost, the same command goes on")
        if accuracy:
            say(
                f"held-out accuracy: {accuracy[0][1]:.1%} before (step {accuracy[0][0]}), "
                f"{accuracy[-1][1]:.1%} after step {accuracy[-1][0]}"
            )
        say(f"everything is in {self.workdir}")
