"""What a person, a pipe and a program see of a training; Weights & Biases; Ctrl-C."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import jax
import pyte
import pytest
from commands import HANG_S
from test_train import TINY

from kdrl_jax import train
from kdrl_jax.cli import EXIT_INTERRUPTED, command_line, run_entry
from kdrl_jax.training import compiling, display
from kdrl_jax.training.compiling import COMPILING
from kdrl_jax.training.display import Display, speaking
from kdrl_jax.training.metrics import read_metrics
from kdrl_jax.training.stopping import EXIT_STOPPED
from kdrl_jax.training.validation import validate
from kdrl_jax.training.wandb_run import WandbRun
from kdrl_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 80, 30
SETTINGS = TINY | {
    "steps": 4,
    "checkpoint.every": 2,
    "eval.every": 2,
    "samples.every": 0,
    "health.teacher_every": 0,
    "mesh.devices": "0:1",  # quicker to compile for
}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def arguments(workdir, cache, **changes):
    settings = SETTINGS | {"cache_dir": str(cache)} | changes
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={ROOT / 'configs' / 'demo.py'}", f"--workdir={workdir}", *flags]


def entered(monkeypatch, main, *argv):
    """Run an entry with these arguments; its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    try:
        run_entry(main)
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def logged(tmp_path_factory, cache):
    """A run with `--log=json` that is logged by Weights & Biases: its folder and its stdout."""
    workdir = tmp_path_factory.mktemp("logged") / "run"
    out = workdir.parent / "out.txt"
    with pytest.MonkeyPatch.context() as patch, out.open("w", encoding="utf-8") as file:
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(sys, "stdout", file)
        flags = arguments(workdir, cache, **{"wandb.project": "kdrl", "wandb.name": "tiny"})
        with jax.numpy_rank_promotion("raise"):
            assert entered(patch, train.main, *flags, "--log=json") == 0
    return workdir, out.read_text()


# --- JSON -------------------------------------------------------------------------------------


def test_every_line_is_an_object(logged):
    events = [json.loads(line) for line in logged[1].splitlines()]
    for event in events:
        assert event["time"].startswith("20")
    kinds = {event["event"] for event in events}
    assert kinds >= {"say", "step", "eval", "phase", "progress", "result", "end"}
    assert events[-1]["event"] == "end"
    assert events[-1]["exit"] == 0


def test_steps_carry_the_metrics_exactly(logged):
    workdir, out = logged
    events = [json.loads(line) for line in out.splitlines()]
    known = ("event", "time")
    steps = [
        {k: v for k, v in event.items() if k not in known}
        for event in events
        if event["event"] == "step"
    ]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    assert steps == rows[: len(steps)]  # it may have been continued
    assert len(steps) == 5
    result = next(event for event in events if event["event"] == "result")
    assert result["steps"] == 4
    assert result["last"] == {k: v for k, v in steps[-1].items() if isinstance(v, float)}


def test_errors_are_events_with_the_same_exit_code(monkeypatch, capsys, tmp_path):
    flags = arguments(tmp_path / "run", tmp_path, **{"steps": 0, "kd_mask": "some"})
    assert entered(monkeypatch, train.main, *flags, "--log", "json") == 2
    out, err = capsys.readouterr()
    error, end = (json.loads(line) for line in out.splitlines())
    assert error["event"] == "error"
    assert [line.split(":")[0] for line in error["problems"]] == ["kd_mask", "steps"]
    assert end["exit"] == 2
    assert [f"error: {line}" for line in error["problems"]] == err.splitlines()


def test_arguments_that_are_not_understood(monkeypatch, capsys):
    assert entered(monkeypatch, train.main, "--log=json") == 2
    out, err = capsys.readouterr()
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["error", "end"]
    assert "--config" in err


def test_a_program_of_ones_own_that_fails(monkeypatch, capsys):
    def main():
        print("half a", end=" ")
        print("line")
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(sys, "argv", ["x", "--log=json"])
    with pytest.raises(ZeroDivisionError):
        run_entry(main)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["say", "error", "end"]
    assert events[0]["text"] == "half a line"
    assert events[1]["problems"] == ["ZeroDivisionError: oh"]
    assert events[2]["exit"] == 1
    assert sys.argv == ["x", "--log=json"]


def test_quiet_and_unknown_kinds(monkeypatch, capsys):
    def main():
        Display().say("loud")
        print("printed")

    assert entered(monkeypatch, main, "--log=quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert entered(monkeypatch, main, "--log=xml") == 2
    assert capsys.readouterr().err == "error: --log: 'xml' is none of text, json, quiet\n"


def test_help_names_the_option_of_all_commands(monkeypatch, capsys):
    assert entered(monkeypatch, train.main, "--help") == 0
    assert "--log {text,json,quiet}" in capsys.readouterr().out


def test_numbers_that_json_has_not(capsys):
    with speaking("json"):
        Display().event("result", {"loss": math.nan, "all": [{"at": math.inf}, 0.5]})
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] is None
    assert found["all"] == [{"at": None}, 0.5]


# --- a pipe -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def continued(logged, cache):
    """The same run goes on to step 6 into a pipe: its folder and what was printed."""
    workdir, _ = logged
    out = workdir.parent / "more.txt"
    with pytest.MonkeyPatch.context() as patch, out.open("w", encoding="utf-8") as file:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("FORCE_COLOR", "1")  # as CI sets it
        patch.setattr(sys, "stdout", file)
        flags = {"steps": 6, "wandb.project": "kdrl", "wandb.name": "tiny"}
        with jax.numpy_rank_promotion("raise"):
            assert entered(patch, train.main, *arguments(workdir, cache, **flags)) == 0
    return workdir, out.read_text()


def test_a_pipe_gets_a_line_a_step(continued):
    _, out = continued
    assert not CONTROL.search(out)
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(steps) == 2
    number = r"[\d.]+(e-\d+)?"
    shape = rf"step 5/6  reward {number}  length \d+  kl {number}  beta {number}  ETA 0:\d\d:\d\d"
    assert re.fullmatch(shape, steps[0])
    assert "accuracy" in steps[1]
    assert "continuing after step 4 of 6" in out


def wandb_history(workdir):
    """What the service is sent of a run: its id and its rows, from the file that is kept of it.

    The file is a LevelDB log: blocks of 32 KiB with records of a checksum, a length and a kind
    (whole, first, middle, last), after a header of 7 bytes; each whole is a protocol buffer.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    rows, ids = [], set()
    for file in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        content, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
            whole += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind not in (1, 4):
                continue
            record, whole = Record.FromString(whole), b""
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
            if record.HasField("history"):
                items = record.history.item
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                rows.append(row)
    return ids, rows


def test_weights_and_biases_have_the_same_rows(continued):
    """Two starts of a run are one run there, and no row is there twice."""
    workdir, _ = continued
    ids, rows = wandb_history(workdir)
    kept = json.loads((workdir / "wandb.json").read_text())
    assert ids == {(kept["id"], "kdrl", "tiny")}
    found = [
        {k: v for k, v in row.items() if not k.startswith("_")} | {"step": row["_step"]}
        for row in rows
    ]
    assert found == read_metrics(workdir / "metrics.jsonl")
    assert kept["step"] == 6


def test_steps_that_are_made_again_are_not_logged_again(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = train.parse_config_args(arguments(tmp_path, tmp_path), "")[0]
    config.wandb.project = "kdrl"
    said = []
    for start, steps in ((None, (0, 1, 2, 3)), (2, (3, 4))):  # killed after step 3, saved at 2
        run = WandbRun(config, tmp_path, start, said.append)
        for step in steps:
            run.write(step, {"step": step, "loss": step / 2, "bad": math.nan})
        run.close({"finished": True})
        time.sleep(1.1)  # its folders are named by the second
    ids, rows = wandb_history(tmp_path)
    assert len(ids) == 1
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["loss"] for row in rows] == [0, 0.5, 1, 1.5, 2]
    assert all("wandb sync" in line for line in said)
    assert len(said) == 2


def test_trouble_with_the_service_is_said_once(tmp_path, monkeypatch):
    import wandb

    def fail(**_):
        raise wandb.errors.CommError("no such\nhost")

    monkeypatch.setattr(wandb, "init", fail)
    config = train.parse_config_args(arguments(tmp_path, tmp_path), "")[0]
    said = []
    run = WandbRun(config, tmp_path, None, said.append)
    for step in range(3):
        run.write(step, {"loss": 1.0})
    run.close()
    assert said == ["Weights & Biases: CommError: no such host; the run goes on without it"]


def test_keys_of_weights_and_biases_are_checked(tmp_path, monkeypatch):
    config = train.parse_config_args(arguments(tmp_path, tmp_path), "")[0]
    config.wandb.entity = "us"
    with pytest.raises(UserError, match=r"wandb\.entity: 'us', but wandb\.project is empty"):
        validate(config)
    config.wandb.project = "kdrl"
    validate(config)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'kdrl_jax\[wandb\]'"):
        validate(config)


# --- a terminal -------------------------------------------------------------------------------


class Terminal:
    """A command on a terminal of WIDTH x HEIGHT, and what its screen showed at each moment."""

    def __init__(self, argv, env):
        self.fd, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *argv],  # so that Ctrl-C typed there is a signal
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm-256color"} | env,
            **dict.fromkeys(("stdin", "stdout", "stderr"), other),
        )
        os.close(other)
        self.screen = pyte.HistoryScreen(WIDTH, HEIGHT, history=1000)
        self.stream, self.frames = pyte.ByteStream(self.screen), []

    def lines(self):
        past = [
            "".join(row[i].data for i in range(WIDTH)).rstrip() for row in self.screen.history.top
        ]
        return [line for line in (*past, *map(str.rstrip, self.screen.display)) if line]

    def read(self, until, limit_s=HANG_S):
        """Read on until a line matches, or to the end."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 1)[0]:
                try:
                    data = os.read(self.fd, 1 << 16)
                except OSError:  # how Linux tells that the other side is closed
                    return
                self.stream.feed(data)
                self.frames.append(self.lines())
                if until and any(re.search(until, line) for line in self.frames[-1]):
                    return
        raise AssertionError(f"no {until!r} in time:\n" + "\n".join(self.lines()))


def test_a_terminal_shows_the_phases_and_ctrl_c_says_how_to_go_on(tmp_path, cache, logged):
    """Depends on `logged` for the compiled programs alone."""
    flags = arguments(tmp_path / "a run", cache, steps=500)
    env = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": os.environ["XLA_FLAGS"]}
    terminal = Terminal([sys.executable, "-m", "kdrl_jax.train", *flags], env)
    try:
        terminal.read(r"^step .* ([3-9]|\d\d+)/500 ")
        os.write(terminal.fd, b"\x03")
        terminal.read(None)
        code = terminal.process.wait(HANG_S)
    finally:
        terminal.process.kill()
        os.close(terminal.fd)
    assert code == EXIT_STOPPED
    seen = {line.split(" ")[0] for frame in terminal.frames for line in frame}
    assert {"step", "rollout", "verification", "teacher", "update", "evaluation"} <= seen
    everything = "\n".join("\n".join(frame) for frame in terminal.frames)
    assert re.search(r"rollout +━+ +16/16  \d+ tokens  [\d,]+/s", everything)
    assert re.search(r"verification +━+ +16/16", everything)
    assert re.search(r"reward [\d.]+  length \d+  kl [\d.]+  accuracy [\d.]+  beta", everything)
    # Bars are drawn in place: a screen never has two of a kind.
    for frame in terminal.frames:
        assert sum(line.startswith("step  ") for line in frame) <= 1, frame
        assert sum(line.startswith("rollout ") for line in frame) <= 1, frame
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(frame)
    last = terminal.frames[-1]
    assert not any(line.startswith(("rollout ", "verification ", "update ")) for line in last)
    text = "\n".join(last)
    assert re.search(r"finishing step \d+, then saving; Ctrl-C again to end at once", text)
    assert re.search(r"stopped after step \d+ and saved: nothing is lost", text)
    assert not terminal.screen.cursor.hidden
    # The command is one that a shell takes.
    command = "".join(last[next(i for i, x in enumerate(last) if x.startswith("to go on: ")) :])
    assert "python -m kdrl_jax.train --config=" in command
    assert f"'--workdir={tmp_path}/a run'".replace(" ", "") in command.replace(" ", "")


def test_compilations_that_last_are_told_of(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "PATIENCE_S", 0.05)
    told = threading.Event()
    Display()
    lasts = COMPILING.lasts
    monkeypatch.setattr(COMPILING, "lasts", lambda *x: (lasts(*x), told.set()))
    events = jax.monitoring
    compiled = "/jax/core/compile/backend_compile_duration"
    events.record_scalar(compiled, 0.0, fun_name="jit(quick)")
    events.record_event_duration_secs(compiled, 0.01, fun_name="jit(quick)")
    events.record_scalar(compiled, 0.0, fun_name="jit(slow)")
    assert told.wait(HANG_S)
    assert COMPILING.running
    events.record_event_duration_secs(compiled, 42.4, fun_name="jit(slow)")
    assert COMPILING.running is None
    assert capsys.readouterr().out == "compiling slow …\ncompiled slow in 42 s\n"


def test_a_display_whose_stream_is_closed_does_no_harm(monkeypatch):
    """The command is over, the process goes on: a notebook, or a program that calls `train`."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    Display()
    monkeypatch.undo()
    COMPILING.lasts("something", 9.0, True)
    assert stream.getvalue() == "compiled something in 9 s\n"
    stream.close()
    COMPILING.lasts("something", 9.0, True)


def test_jax_tells_when_it_compiles():
    """Of the program that is being compiled, while it is: what the rows above rest on."""
    seen = []

    def look(event, *_, **__):
        if event.endswith("cache/compile_requests_use_cache"):
            seen.append(COMPILING.running)

    jax.monitoring.register_event_listener(look)

    def named(x):
        return x * 3 + 1

    jax.jit(named)(2.0)
    assert [name for name, _ in seen] == ["named"]
    assert COMPILING.running is None


def test_the_time_left_is_that_of_steps_without_compilations(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(COMPILING, "seconds", 0.0)
    track = Display().track("step", 10)
    now[0] += 33
    COMPILING.seconds += 30
    track.advance("reward 1.000")
    now[0] += 3
    track.advance("reward 0.500")
    assert track.eta() == 24
    assert capsys.readouterr().out == (
        "step 1/10  reward 1.000  ETA 0:00:27\nstep 2/10  reward 0.500  ETA 0:00:24\n"
    )
    track.set(10)
    assert capsys.readouterr().out == "step 10/10  took 0:00:36\n"


def test_what_lasts_is_said_in_a_pipe(monkeypatch, capsys):
    monkeypatch.setattr(display, "PATIENCE_S", 0.01)
    monkeypatch.setattr(display, "HEARTBEAT_S", 0.0)
    shown, told = Display(), threading.Event()
    say = shown.say
    monkeypatch.setattr(shown, "say", lambda text: (say(text), told.set()))
    with shown.doing("reading the checkpoint"):
        assert told.wait(HANG_S), "nothing was said of what lasts"
    monkeypatch.setattr(display, "PATIENCE_S", HANG_S)
    with shown.doing("quick"):
        pass
    with shown.loading("weights") as progress:
        progress(1_000_000_000, 4_000_000_000)
    with shown.track("attempts", 4, part=True) as part:
        part.drawn(1, 100)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "reading the checkpoint …"
    assert re.fullmatch(r"reading the checkpoint: \d+ s", second)
    assert re.fullmatch(r"weights 1\.0 GB/4\.0 GB  ETA 0:\d\d:\d\d", third)


# --- how to go on -----------------------------------------------------------------------------


def test_ctrl_c_names_what_is_kept_and_the_command(monkeypatch, capsys):
    from kdrl_jax import evaluate

    def main():
        raise KeyboardInterrupt

    entry = evaluate.main
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--output=my runs"])
    assert command_line(entry) == "python -m kdrl_jax.evaluate '--output=my runs'"
    monkeypatch.setattr(evaluate, "split_overrides", lambda argv: main())
    monkeypatch.setattr("kdrl_jax.cli.leave", sys.exit)
    with pytest.raises(SystemExit, match=str(EXIT_INTERRUPTED)):
        run_entry(entry)
    assert capsys.readouterr().err == (
        "interrupted; whole batches of responses are kept; "
        "to go on: python -m kdrl_jax.evaluate '--output=my runs'\n"
    )
    monkeypatch.setattr(sys, "argv", ["/usr/bin/kdrl-eval", "--limit=3"])
    assert command_line(entry) == "kdrl-eval --limit=3"


def test_the_hubs_bars_are_for_terminals(monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], name, None)
    enable_progress_bars()
    assert not are_progress_bars_disabled()
    assert entered(monkeypatch, lambda: None) == 0  # pytest's stderr is none
    assert are_progress_bars_disabled()
    assert os.environ[name] == "1"  # for children, and where the library is not loaded yet
