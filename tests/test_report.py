"""The report: what it reads of runs, and the page in a real browser, headless Chromium."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from commands import HANG_S

from kdrl_jax import report
from kdrl_jax.reporting.panels import GROUPS, drawn_metrics, panels_of
from kdrl_jax.reporting.runs import MOST_POINTS, labels, pick_evenly, read_runs
from kdrl_jax.types import UserError

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")

STEPS = 30
HOSTILE = "</script><img src=x onerror=\"window.harmed=1\"> <b>bold</b> \u2028 & 'quotes'"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def metrics_of(step: int, teacher: bool) -> dict:
    row = {
        "step": step,
        "reward/mean": step / 100,
        "reward/all_right_frac": 0.1,
        "reward/all_wrong_frac": 0.2,
        "length/mean": 20.0 + step,
        "entropy/mean": 1.0 / (1 + step),
        "policy/clip_frac": 0.01 * (step % 3),
        "health/alerts": 0.0,
        "time/rollout_s": 2.0,
        "time/update_s": 1.0,
        "time/compilations": 40,
        "tokens_per_s/total": 100.0,
    }
    if teacher:
        row |= {"kl/teacher": 0.5, "kl/distilled": 0.7, "kl/masked": 0.2, "beta": 0.6 - step / 100}
    if 12 <= step <= 15 or step == 20:
        row |= {"health/alerts": 1.0, "health/kl_blowup": 1.0}
    if step % 10 == 0:
        row |= {"eval/accuracy": 0.25 + step / 100, "time/eval_s": 4.0}
    return row


def sample(step: int, i: int, **changes) -> dict:
    pieces = [f"{step}", " + ", f"{i}", " =", " é", "\n", f"{step + i}", ""]
    row = {
        "id": f"p{i // 4}",
        "sample": i % 4,
        "problem": f"What is {step} + {i}?",
        "answer": str(step + i),
        "completion": "".join(pieces),
        "reward": float(i % 2),
        "outcome": "correct" if i % 2 else ("timeout" if i == 4 else "wrong"),
        "length": len(pieces),
        "finish_reason": "eos",
        "advantage": 0.5 if i % 2 else -0.5,
        "trained": True,
        "distilled": i % 2 == 0,
        "tokens": pieces,
        "log_probs": [-0.1 * j for j in range(len(pieces))],
        "teacher_log_probs": [*(-0.1 * j - (-1) ** j for j in range(len(pieces) - 1)), None],
    }
    return row | changes


def old(row: dict) -> dict:
    """As files were before they had anything about tokens."""
    new = ("advantage", "trained", "distilled", "tokens", "log_probs", "teacher_log_probs")
    return {key: value for key, value in row.items() if key not in new}


def write_run(folder: Path, objective: str, *, teacher: bool) -> Path:
    (folder / "samples").mkdir(parents=True)
    rows = [{"step": 0, "eval/accuracy": 0.25, "time/eval_s": 4.0}]
    rows += [metrics_of(step, teacher) for step in range(1, STEPS + 1)]
    lines = [json.dumps(row) for row in rows]
    lines[6] = lines[6].replace('"kl/teacher": 0.5', '"kl/teacher": null')
    torn = json.dumps(metrics_of(STEPS + 1, teacher))[:40]  # a run that is being written
    (folder / "metrics.jsonl").write_text("\n".join([*lines, torn]))
    config = {"objective": objective, "steps": 50}
    (folder / "config.json").write_text(json.dumps(config))
    for step in (10, 20, 30):
        rows = [sample(step, i) for i in range(8)]
        if step == 10:
            rows = [old(row) for row in rows]
        if step == 30:
            pieces = [*re.findall(r".{1,5}", HOSTILE, re.DOTALL), ""]
            rows[1] |= {"problem": HOSTILE, "answer": HOSTILE, "completion": HOSTILE}
            rows[1] |= {"id": HOSTILE, "tokens": pieces, "length": len(pieces)}
            rows[1] |= {key: [-0.5] * len(pieces) for key in ("log_probs", "teacher_log_probs")}
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "samples" / f"step_{step:06d}.jsonl").write_text(text + '{"completion": "to')
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    hostile = folder / "gr<img src=x onerror='window.harmed=1'>po"
    return [
        write_run(folder / "kdrl", "kdrl", teacher=True),
        write_run(hostile, "grpo", teacher=False),
    ]


@pytest.fixture(scope="module")
def page_file(runs):
    report.main([str(run) for run in runs])
    return runs[0] / "report.html"


# --- what is read ---------------------------------------------------------------------------


def test_numbers_of_a_run_that_goes_on(runs):
    run = read_runs(runs)[0]
    assert (run.name, run.objective, run.steps) == ("kdrl", "kdrl", (STEPS, 50))
    assert run.columns["step"] == list(range(STEPS + 1))
    assert run.columns["kl/teacher"][5:8] == [0.5, None, 0.5]
    # An evaluation before the first step, then 3 s a step, 4 s more where it evaluates.
    assert run.columns["seconds"][0] == 4.0
    assert run.columns["seconds"][-1] == 4 + 3 * STEPS + 4 * 3
    assert run.phases == ["rollout", "update", "eval"]  # a count of compilations is no time
    assert run.alerts == [
        {"name": "kl_blowup", "first": 12, "last": 15},
        {"name": "kl_blowup", "first": 20, "last": 20},
    ]
    assert (run.first("eval/accuracy"), run.last("eval/accuracy")) == (0.25, 0.55)
    assert [(s["step"], len(s["rows"])) for s in run.samples] == [(10, 8), (20, 8), (30, 8)]
    assert run.samples[0]["rows"][0]["tokens"] is None
    assert run.notes == []


def test_folders_that_are_no_runs_are_named_all_at_once(tmp_path, runs):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    bad = [str(tmp_path / name) for name in ("empty", "file", "missing")]
    with pytest.raises(UserError) as error:
        report.main([str(runs[0]), *bad, f"--output={tmp_path / 'x.html'}"])
    assert error.value.problems == [
        f"{path}: holds no metrics.jsonl with a step; give a run's folder" for path in bad
    ]
    assert not (tmp_path / "x.html").exists()
    with pytest.raises(UserError, match=r"--output: .*x\.pdf must end in \.html or \.png"):
        report.main([str(runs[0]), f"--output={tmp_path / 'x.pdf'}"])


def test_the_picture_alone(tmp_path, runs, capsys):
    report.main([str(runs[0]), f"--output={tmp_path / 'a' / 'b.png'}"])
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.png"]
    assert capsys.readouterr().out == f"written: {tmp_path / 'a' / 'b.png'}\n"


def test_a_page_and_a_picture_beside_it(page_file):
    assert (page_file.with_name("curves.png")).read_bytes().startswith(b"\x89PNG")
    text = page_file.read_text(encoding="utf-8")
    assert text.count("</script>") == text.count("<script") == 6
    assert "<img" not in text.partition("plotly.js v")[0]  # nothing that a run wrote is markup


def test_a_panel_is_there_if_a_run_has_its_metric():
    own = ["reward/brevity", "reward/brevity_failed_frac", "reward/equal_frac"]
    found = panels_of(["kl/distilled", "kl/masked", "beta", "reward/mean", "nonsense", *own])
    assert [group["title"] for group in found] == ["Learning", "Distillation"]
    assert [p["title"] for p in found[1]["panels"]] == ["KL by mask", "β"]
    series = {p["title"]: list(p["series"].values()) for p in found[0]["panels"]}
    assert series == {
        "Reward of rollouts": ["trained on"],
        "Groups without a difference": ["equal rewards"],
        "Reward functions": ["brevity"],
        "Reward functions that failed": ["brevity"],
    }
    assert drawn_metrics(["nonsense", "beta", *own]) == {"beta", *own}
    both = panels_of(["eval/accuracy", "eval/length"])[0]["panels"]
    assert ["Accuracy over length" in p["title"] for p in both].count(True) == 1
    assert not any(p["against"] for p in panels_of(["eval/accuracy"])[0]["panels"])
    named = [m for group in GROUPS.values() for p in group for m in p.series if not p.against]
    assert len(named) == len(set(named))


def test_runs_of_one_name_are_told_apart():
    assert labels([Path("a/run"), Path("b/run"), Path("c/x")]) == ["a/run", "b/run", "x"]


def test_what_is_embedded_is_bounded(tmp_path, monkeypatch):
    assert pick_evenly([10] * 10, 1000) == list(range(10))
    assert pick_evenly([10] * 10, 45) == [0, 3, 6, 9]
    assert pick_evenly([10, 10, 99], 50) == [2]
    assert pick_evenly([], 50) == []
    folder = write_run(tmp_path / "kdrl", "kdrl", teacher=True)
    size = (folder / "samples" / "step_000020.jsonl").stat().st_size
    monkeypatch.setattr("kdrl_jax.reporting.runs.SAMPLE_BYTES", int(2.2 * size))
    (run,) = read_runs([folder])
    assert [s["step"] for s in run.samples] == [10, 30]
    assert run.notes == ["Left out to keep the page small: samples of 1 of 3 steps."]
    monkeypatch.setattr("kdrl_jax.reporting.runs.SAMPLE_BYTES", size // 2)
    (run,) = read_runs([folder])
    assert [s["step"] for s in run.samples] == [30]
    assert 0 < len(run.samples[0]["rows"]) < 8
    assert "rollouts of the newest step" in run.notes[0]
    rows = [metrics_of(step, False) for step in range(1, 2 * MOST_POINTS + 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run,) = read_runs([folder])
    assert len(run.columns["step"]) < 1.2 * MOST_POINTS
    assert run.columns["seconds"][-1] == pytest.approx(sum(_time(row) for row in rows))
    assert run.columns["eval/accuracy"][run.columns["step"].index(10)] == 0.35  # none is lost
    assert run.notes[0] == f"Of {len(rows):,} steps one in 3 is drawn."


def _time(row: dict) -> float:
    return sum(value for name, value in row.items() if re.fullmatch("time/.*_s", name))


def test_log_ratios_between_two_temperatures_are_said(tmp_path):
    folder = write_run(tmp_path / "kdrl", "kdrl", teacher=True)
    config = {"logprob_temperature": "1.0", "rollout": {"temperature": 0.6}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "temperature 0.6, and the teacher was asked at 1.0" in read_runs([folder])[0].notes[0]
    config["logprob_temperature"] = "0.6"
    (folder / "config.json").write_text(json.dumps(config))
    assert read_runs([folder])[0].notes == []


# --- the page in a browser ------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        browser.new_context().close()
        yield browser
        browser.close()


class Tab:
    """The page in a tab of its own, with what went wrong in it."""

    def __init__(self, browser, file: Path, **options):
        self.faults: list[str] = []
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * HANG_S)
        note = self.faults.append
        self.page.on("console", lambda m: note(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: note(str(error)))
        self.page.on("request", self._asked)
        self.page.goto(file.resolve().as_uri())
        self.wait()

    def _asked(self, request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.faults.append(request.url)

    def wait(self) -> None:
        """Until all charts are drawn."""
        self.page.wait_for_selector("html[data-charts=drawn]", state="attached")

    def traces(self, metric: str) -> list[dict]:
        """What Plotly draws of a metric: from the page, not from what was written into it."""
        return self.page.evaluate(
            """metric => [...document.querySelectorAll("figure[data-metrics]")]
                .flatMap(f => f.querySelector(".chart").data)
                .filter(t => t.meta && t.meta.metric === metric)
                .map(t => ({x: [...t.x], y: [...t.y], run: t.meta.run, raw: !!t.meta.raw,
                            color: t.line.color, dash: t.line.dash}))""",
            metric,
        )

    def tokens(self) -> list[str]:
        return self.page.eval_on_selector_all("#completion > *", "x => x.map(t => t.textContent)")

    def classes(self) -> list[str]:
        return self.page.eval_on_selector_all("#completion > *", "x => x.map(t => t.className)")

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.fixture(scope="module")
def tab(chromium, page_file):
    tab = Tab(chromium, page_file, viewport={"width": 1280, "height": 800}, color_scheme="light")
    yield tab
    assert tab.faults == []  # of everything the tests below did
    tab.context.close()


def test_charts_show_the_numbers(tab, runs):
    rows = read_runs(runs)
    for metric in ("reward/mean", "entropy/mean", "policy/clip_frac", "length/mean"):
        found = tab.traces(metric)
        assert [t["run"] for t in found] == [0, 1], metric
        for trace, run in zip(found, rows, strict=True):
            assert trace["x"] == list(range(STEPS + 1))
            assert trace["y"] == run.columns[metric]
        assert found[0]["color"] != found[1]["color"]
    for metric, dash, value in (("kl/distilled", "solid", 0.7), ("kl/masked", "dash", 0.2)):
        (trace,) = tab.traces(metric)
        assert (trace["run"], trace["dash"], trace["y"][1]) == (0, dash, value)
    (beta,) = tab.traces("beta")
    assert beta["y"][1:] == [pytest.approx(0.6 - s / 100) for s in range(1, STEPS + 1)]
    phases = tab.page.evaluate(
        'document.querySelector("#timeline .chart").data.map(t => [t.name, ...t.y.slice(9, 12)])'
    )
    assert phases == [["rollout", 2, 2, 2], ["update", 1, 1, 1], ["eval", 0, 4, 0]]
    shown = tab.page.locator("#charts figcaption strong").all_text_contents()
    assert "KL by mask" in shown
    assert "Slots in use while decoding" not in shown


def test_alerts_are_marked_and_said(tab):
    shapes = tab.page.evaluate(
        """[...document.querySelector('figure[data-metrics~="kl/teacher"] .chart').layout.shapes]
           .map(s => [s.x0, s.x1, s.y1])"""
    )
    assert [12, 12, 1] in shapes  # where it begins
    assert [12, 15, 0] in shapes  # how long it lasts
    assert [20, 20, 0] in shapes
    said = tab.page.locator("#alerts li").all_text_contents()
    assert len(said) == 2
    assert said[0].startswith("kl_blowup in kdrl, step 12 to 15, 20")
    assert "optimizer.learning_rate" in said[0]  # what to do


def test_axis_smoothing_and_runs_are_switched(tab):
    page = tab.page
    page.get_by_label("time", exact=True).check()
    tab.wait()
    minutes = tab.traces("reward/mean")[0]["x"]
    assert minutes[:3] == [pytest.approx(s / 60) for s in (4, 7, 10)]
    page.get_by_label("step", exact=True).check()
    page.get_by_label("Smoothing").select_option("mean")
    tab.wait()
    raw, mean = (t for t in tab.traces("reward/mean") if t["run"] == 0)
    assert (raw["raw"], mean["raw"]) == (True, False)
    assert mean["y"][20] == pytest.approx(sum(s / 100 for s in range(11, 21)) / 10)
    assert mean["y"][2] == pytest.approx(0.015)
    kl = next(t for t in tab.traces("kl/teacher") if not t["raw"])
    assert kl["y"][6] is None  # what was not measured stays away
    page.get_by_label("Smoothing").select_option("ema")
    tab.wait()
    _, average = (t for t in tab.traces("reward/mean") if t["run"] == 0)
    weights = [0.9**age for age in range(19, -1, -1)]  # the first of them is not measured
    expected = sum(w * s / 100 for w, s in zip(weights, range(1, 21), strict=True)) / sum(weights)
    assert average["y"][20] == pytest.approx(expected)
    page.get_by_label("Smoothing").select_option("")
    chip = page.locator("#legend button").first
    chip.click()
    tab.wait()
    assert chip.get_attribute("aria-pressed") == "false"
    assert [t["run"] for t in tab.traces("reward/mean")] == [1]
    chip.click()
    tab.wait()
    assert [t["run"] for t in tab.traces("reward/mean")] == [0, 1]


def choose(tab, **filters) -> list[str]:
    """Set the filters, and what the list then says."""
    page = tab.page
    page.select_option("#outcome", filters.get("outcome", ""))
    page.select_option("#reward", filters.get("reward", ""))
    page.fill("#search", filters.get("text", ""))
    page.locator("#all-steps").set_checked(filters.get("every", False))
    return page.locator("#list button").all_text_contents()


def step_to(tab, step: int) -> None:
    """Move the slider by keys, as somebody without a mouse would."""
    slider = tab.page.locator("#sample-step")
    slider.focus()
    tab.page.keyboard.press("Home")
    for _ in range(step // 10 - 1):
        tab.page.keyboard.press("ArrowRight")
    assert tab.page.locator("#sample-step-shown").text_content() == str(step)
    assert slider.get_attribute("aria-valuetext") == f"step {step}"


def test_slider_and_filters(tab):
    assert tab.page.locator("#sample-step-shown").text_content() == "30"  # the newest
    step_to(tab, 20)
    assert len(choose(tab)) == 8
    assert tab.page.locator("#problem").text_content() == "What is 20 + 0?"
    assert len(choose(tab, outcome="wrong")) == 3
    assert len(choose(tab, reward="1")) == 4
    assert len(choose(tab, reward="0", outcome="timeout")) == 1
    assert tab.page.locator("#facts").text_content().startswith("… timeout")
    (only,) = choose(tab, text="20 + 7?")
    assert "✓ correct" in only
    assert tab.page.locator("#count").text_content() == "1 of 8 rollouts"
    assert len(choose(tab, every=True, outcome="timeout")) == 3
    assert choose(tab, text="no such text") == []
    assert tab.page.locator("#detail").is_hidden()
    assert len(choose(tab)) == 8


def test_tokens_carry_their_numbers(tab):
    page = tab.page
    step_to(tab, 20)
    choose(tab)
    page.locator("#list button").nth(2).click()
    assert tab.tokens() == ["20", " + ", "2", " =", " é", "\n", "22", ""]
    plus, minus = "t plus", "t minus"
    # ℓ = (−1)^j but of the end token, of which the teacher says nothing.
    assert tab.classes() == [plus, minus, plus, minus, plus, minus, plus, "t end"]
    assert page.locator("#scale-high").text_content() == "≥ +1 student likelier"
    amounts = page.eval_on_selector_all(
        "#completion > *", "x => x.map(t => t.style.getPropertyValue('--amount'))"
    )
    assert amounts == ["62.0%"] * 7 + ["0.0%"]
    page.get_by_label("advantage", exact=True).check()
    assert all("minus" in name for name in tab.classes())
    page.get_by_label("log-prob", exact=True).check()
    assert tab.classes()[0] == "t"
    assert all("minus" in name for name in tab.classes()[1:])
    page.get_by_label("none", exact=True).check()
    assert not any("minus" in name or "plus" in name for name in tab.classes())
    assert page.locator("#scale").is_hidden()
    page.get_by_label("log-ratio", exact=True).check()
    page.locator("#completion > *").nth(3).hover()
    said = page.locator("#readout").text_content()
    assert said == " =token 4 of 8student −0.300teacher +0.700log-ratio −1.000advantage −0.500"
    page.locator("#completion").focus()
    page.keyboard.press("ArrowRight")
    assert "token 5 of 8" in page.locator("#readout").text_content()
    text = page.evaluate("getSelection().selectAllChildren($('completion')) ?? `${getSelection()}`")
    assert text == "20 + 2 = é\n22"


def test_old_files_show_without_numbers(tab):
    step_to(tab, 10)
    choose(tab)
    tab.page.locator("#list button").first.click()
    assert tab.tokens() == ["10 + 0 = é\n10"]
    assert "Nothing was recorded" in tab.page.locator("#scale-said").text_content()
    assert tab.page.get_by_label("advantage", exact=True).is_disabled()


def test_what_a_model_writes_is_text(tab):
    page = tab.page
    step_to(tab, 30)
    (found,) = choose(tab, text="onerror")
    assert HOSTILE in found
    for place in ("problem", "answer", "completion"):
        assert page.locator(f"#{place}").text_content() == HOSTILE
    assert f"problem {HOSTILE} #1" in page.locator("#facts").text_content()
    assert page.evaluate("window.harmed") is None
    assert page.locator("img").count() == 0
    assert page.locator("main b").all_text_contents().count("bold") == 0
    # Even markup that found a way in could neither run nor ask for anything.
    assert page.evaluate(
        """async () => {
            const injected = document.createElement("div");
            injected.innerHTML = '<img src="data:," onerror="window.harmed = 2">';
            const said = new Promise(done => document.addEventListener(
                "securitypolicyviolation", event => done(event.violatedDirective), {once: true}));
            document.body.append(injected);
            const directive = await said;
            injected.remove();
            return [directive, window.harmed ?? null];
        }"""
    ) == ["script-src-attr", None]
    tab.faults[:] = [fault for fault in tab.faults if "Content Security Policy" not in fault]
    choose(tab)


def luminance(rgb: str) -> float:
    """Relative luminance, by WCAG 2."""
    values = [float(x) / 255 for x in re.findall(r"[\d.]+", rgb)[:3]]
    parts = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def contrast(a: str, b: str) -> float:
    one, other = sorted((luminance(a), luminance(b)))
    return (other + 0.05) / (one + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(chromium, page_file, scheme):
    tab = Tab(chromium, page_file, viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    page = tab.page
    pixel = """([colour, amount]) => {
        const canvas = document.createElement("canvas").getContext("2d");
        const all = getComputedStyle(document.documentElement);
        const paint = (name, alpha) => {
            canvas.globalAlpha = alpha;
            canvas.fillStyle = all.getPropertyValue(name).trim();
            canvas.fillRect(0, 0, 1, 1);
        };
        paint("--paper", 1);
        paint(colour, amount);
        return "rgb(" + canvas.getImageData(0, 0, 1, 1).data.slice(0, 3).join(",") + ")";
    }"""
    paper, ink = page.evaluate(pixel, ["--paper", 1]), page.evaluate(pixel, ["--ink", 1])
    assert (luminance(paper) > 0.5) == (scheme == "light")
    for name in ("--soft", "--right", "--wrong", "--alert", "--accent"):
        assert contrast(page.evaluate(pixel, [name, 1]), paper) >= 4.5, name
    for name in ("--plus", "--minus"):  # text on the strongest colour of a token
        assert contrast(page.evaluate(pixel, [name, 0.62]), ink) >= 4.5, name
    lines = tab.traces("reward/mean")[0]["color"]
    colours = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--runs')")
    assert lines == colours.split()[0]
    for hexadecimal in colours.split():
        rgb = ",".join(str(int(hexadecimal[i : i + 2], 16)) for i in (1, 3, 5))
        assert contrast(f"rgb({rgb})", paper) >= 3, hexadecimal
    other = {"light": "dark", "dark": "light"}[scheme]
    while page.locator("html").get_attribute("data-theme") != other:
        page.locator("#theme").click()
    tab.wait()
    assert tab.traces("reward/mean")[0]["color"] != lines
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
    assert tab.faults == []
    tab.context.close()


def test_a_phone_scrolls_one_way(chromium, page_file):
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    tab = Tab(chromium, page_file, **phone)
    assert tab.overflow() == 0
    boxes = tab.page.eval_on_selector_all(
        "main *:not(svg *):not(.scroll *)",
        "x => x.map(e => [e.getBoundingClientRect().right, e.outerHTML.slice(0, 200)])",
    )
    assert max(boxes)[0] <= 391, max(boxes)
    tab.page.locator("#list button").nth(1).tap()
    tab.page.locator("#completion > *").nth(1).tap()
    assert "token 2 of" in tab.page.locator("#readout").text_content()
    assert tab.overflow() == 0
    assert tab.faults == []
    tab.context.close()


def test_one_run_without_samples(chromium, tmp_path):
    folder = write_run(tmp_path / "run", "grpo", teacher=False)
    shutil.rmtree(folder / "samples")
    report.main([str(folder), f"--output={tmp_path / 'page.html'}"])
    tab = Tab(chromium, tmp_path / "page.html")
    assert tab.page.locator("#samples").count() == 0
    assert math.isclose(tab.traces("reward/mean")[0]["y"][-1], 0.3)
    assert tab.faults == []
    tab.context.close()
