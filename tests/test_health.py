"""The watches over a run, on streams of metrics made for them."""

import json
import math

import pytest

from kdrl_jax.config import ROOT, load_config
from kdrl_jax.objectives import METHODS
from kdrl_jax.training.baseline import Baseline
from kdrl_jax.training.health import WATCHES, Health
from kdrl_jax.types import UserError

CONFIG = load_config(ROOT / "configs" / "base.py").health.to_dict()
WELL = {
    "update/skipped": 0.0,
    "reward/mean": 0.4,
    "reward/correct_frac": 0.4,
    "reward/all_right_frac": 0.2,
    "reward/all_wrong_frac": 0.3,
    "length/mean": 100.0,
    "length/truncated_frac": 0.05,
    "length/repetition_frac": 0.0,
    "entropy/mean": 0.5,
    "kl/teacher": 0.3,
    "mismatch/kl": 1e-4,
    "weights/sum": 1.0,
    "health/teacher_effect": 0.1,
    "eval/accuracy": 0.5,
    "eval/gain_over_baseline": 0.02,
}
ILL = {  # what trips each watch and, with a window of 4, no other
    "nonfinite": {"update/skipped": 1.0, "kl/teacher": math.nan},
    "reward_collapse": {"reward/mean": 0.1},
    "accuracy_drop": {"eval/accuracy": 0.3},
    "no_gain": {"eval/gain_over_baseline": -0.01},
    "length_explosion": {"length/mean": 500.0},
    "length_collapse": {"length/mean": 20.0},
    "truncation": {"length/truncated_frac": 0.9},
    "entropy_collapse": {"entropy/mean": 0.001},
    "repetition": {"length/repetition_frac": 0.5},
    "kl_blowup": {"kl/teacher": 2.0},
    "mismatch": {"mismatch/kl": 0.3},
    "no_signal": {"reward/all_right_frac": 0.0, "reward/all_wrong_frac": 1.0},
    "teacher_ignored": {"health/teacher_effect": 0.0},
}


def health(objective="kdrl", kd_mask="none", saved=None, **changes) -> Health:
    return Health(CONFIG | {"window": 4} | changes, METHODS[objective], kd_mask, saved)


def feed(watched: Health, *rows, start: int = 1):
    """(metrics, lines) of each row."""
    return [watched.observe(start + i, WELL | row) for i, row in enumerate(rows)]


def tripped(found) -> list[set[str]]:
    names = [{k.removeprefix("health/") for k in metrics} - {"alerts"} for metrics, _ in found]
    assert [metrics["health/alerts"] for metrics, _ in found] == list(map(len, names))
    return names


def test_every_watch_has_a_case_and_a_threshold():
    assert ILL.keys() == WATCHES.keys()
    assert {watch.key for watch in WATCHES.values()} < CONFIG.keys()


def test_a_healthy_stream_is_silent():
    found = feed(health(), *[{}] * 50)
    assert tripped(found) == [set()] * 50
    assert not any(lines for _, lines in found)


@pytest.mark.parametrize("name", WATCHES)
def test_trips_by_name_once_and_recovers(name):
    watched = health()
    found = feed(watched, *[{}] * 12, *[ILL[name]] * 12, *[{}] * 60)
    during = tripped(found)
    assert not any(during[:12])
    assert during[23] == {name}
    assert not during[-1]
    said = [line for _, lines in found for line in lines]
    assert len(said) == 2, said
    assert said[0].startswith(f"health: {name} at step ")
    assert WATCHES[name].advice in said[0]
    assert said[1].startswith(f"health: {name} is over at step ")
    summary = watched.summary()
    assert summary.keys() == {name}
    assert 13 <= summary[name]["first_step"] <= 24
    assert summary[name]["trips"] == 1


@pytest.mark.parametrize("name", sorted(WATCHES.keys() - {"nonfinite"}))
def test_zero_turns_a_watch_off(name):
    found = feed(health(**{WATCHES[name].key: 0.0}), *[{}] * 12, *[ILL[name]] * 12)
    assert not any(tripped(found))


@pytest.mark.parametrize("name", sorted(k for k, watch in WATCHES.items() if not watch.at_once))
def test_one_bad_step_is_no_trend(name):
    value = {k: v for k, v in ILL[name].items() if k not in ("length/mean", "kl/teacher")}
    if name == "mismatch":
        value = {"mismatch/kl": 0.1}
    assert not any(tripped(feed(health(window=10), *[{}] * 20, value, *[{}] * 20)))


@pytest.mark.parametrize("name", WATCHES)
def test_memory_survives_a_checkpoint_to_the_bit(name):
    rows = [*[{}] * 7, *[ILL[name]] * 9, *[{}] * 9]
    whole = feed(health(), *rows)
    for cut in (1, 3, 8, 12, 20):
        first = health()
        feed(first, *rows[:cut])
        saved = json.loads(json.dumps(first.to_json(), allow_nan=False))
        again = health(saved=saved)
        assert feed(again, *rows[cut:], start=cut + 1) == whole[cut:]


@pytest.mark.parametrize("names", [("all",), ("reward_collapse",)])
def test_stops_once_and_a_run_given_again_goes_on(names):
    watched = health(stop=names)
    feed(watched, *[{}] * 12)
    assert not watched.stop
    feed(watched, *[ILL["reward_collapse"]] * 5, start=13)
    assert watched.stop.startswith("reward_collapse at step ")
    again = health(stop=names, saved=watched.to_json())
    found = feed(again, *[ILL["reward_collapse"]] * 5, start=18)
    assert tripped(found)[-1] == {"reward_collapse"}
    assert not again.stop


def test_only_named_watches_stop():
    watched = health(stop=("truncation",))
    feed(watched, *[{}] * 12, *[ILL["reward_collapse"]] * 5)
    assert not watched.stop


@pytest.mark.parametrize("most", [0, 1, 3])
def test_skipped_steps_in_a_row_stop_whatever_is_named(most):
    watched, bad = health(max_skipped=most), ILL["nonfinite"]
    feed(watched, bad, bad, {}, *[bad] * max(most - 1, 0))
    assert bool(watched.stop) == (most == 1)
    feed(watched, bad, start=9)
    assert bool(watched.stop) == (most > 0)
    again = health(max_skipped=most, saved=watched.to_json())
    feed(again, *[bad] * max(most - 1, 0), start=10)
    assert not again.stop  # as many tries again
    feed(again, bad, start=12)
    assert bool(again.stop) == (most > 0)


def test_what_is_not_measured_sleeps():
    """No teacher: neither its KL nor its effect; another sampler: no mismatch."""
    without = {k: v for k, v in WELL.items() if k not in ("kl/teacher", "mismatch/kl")}
    del without["health/teacher_effect"]
    watched = health("grpo")
    for step in range(1, 30):
        watched.observe(step, without)
    assert watched.to_json().keys() == WATCHES.keys() - {
        *("kl_blowup", "mismatch", "teacher_ignored")
    }


def test_the_gain_over_a_baseline(tmp_path):
    """Steps that both runs have, the last three of them; not the evaluation before training."""
    rows = [{"step": s, "eval/accuracy": a} for s, a in ((0, 0.2), (5, 0.3), (10, 0.4), (20, 0.5))]
    rows.insert(2, {"step": 7, "reward/mean": 0.1})
    write_rows(tmp_path / "grpo", rows)
    baseline = Baseline(str(tmp_path / "grpo"))
    ours = [(0, 0.9), (5, 0.3), (8, 0.9), (10, 0.43)]
    assert baseline.gain(ours) == {}
    assert baseline.gain([*ours, (20, 0.53)])["eval/gain_over_baseline"] == pytest.approx(0.02)
    assert Baseline("").gain([*ours, (20, 0.53)]) == {}
    write_rows(tmp_path / "none", rows[:1])
    for folder, words in (("nowhere", "no file"), ("none", "has no evaluation after its first")):
        with pytest.raises(UserError, match=f"^health.baseline: .*{words}"):
            Baseline(str(tmp_path / folder))


def write_rows(folder, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_collapse_in_the_first_steps_is_seen():
    """Before the average has `window` values there is already something to compare with."""
    rows = [{"reward/mean": 0.4}] * 3 + [{"reward/mean": 0.0}] * 12
    assert "reward_collapse" in tripped(feed(health(window=10), *rows))[9]


def test_accuracy_is_compared_with_that_before_training():
    watched = health()
    before = watched.observe(0, {"eval/accuracy": 0.4})
    after = watched.observe(20, WELL | {"eval/accuracy": 0.2})
    assert tripped([before, after]) == [set(), {"accuracy_drop"}]
    assert "0.200, after 0.400 at step 0" in after[1][0]


def test_longer_responses_with_more_reward_are_no_explosion():
    rows = [{"length/mean": 100.0 * 1.2**i, "reward/mean": 0.1 + 0.02 * i} for i in range(20)]
    assert not any(tripped(feed(health(), *rows)))


def test_small_losses_of_a_small_reward_are_noise():
    rows = [{"reward/mean": 0.04}] * 12 + [{"reward/mean": 0.0}] * 12
    assert not any(tripped(feed(health(), *rows)))


def test_dynamic_sampling_is_judged_by_what_was_drawn():
    rows = [{"reward/drawn_mean": 0.4}] * 12 + [{"reward/drawn_mean": 0.02}] * 12
    assert tripped(feed(health(), *rows))[-1] == {"reward_collapse"}


@pytest.mark.parametrize(
    ("objective", "kd_mask", "row", "judged"),
    [
        ("kdrl", "none", {"reward/correct_frac": 1.0}, True),
        ("kdrl", "response", {"reward/correct_frac": 1.0}, False),  # nothing wrong to distil
        ("kdrl", "response", {"reward/correct_frac": 0.9}, True),
        ("kdrl", "group", {"reward/all_wrong_frac": 0.0}, False),
        ("kdrl", "group", {"reward/all_wrong_frac": 0.1}, True),
        ("trrd", "none", {"reward/all_right_frac": 0.5, "reward/all_wrong_frac": 0.5}, False),
        ("trrd", "none", {}, True),
        ("reward_shaping", "response", {"reward/correct_frac": 1.0}, True),
        ("kdrl", "none", {"weights/sum": 0.0}, False),  # all responses were masked
    ],
)
def test_a_teacher_that_may_not_speak_is_not_ignored(objective, kd_mask, row, judged):
    found = feed(health(objective, kd_mask), ILL["teacher_ignored"] | row)
    assert tripped(found) == [{"teacher_ignored"} if judged else set()]


def test_when_the_teacher_is_probed():
    watched = health(teacher_every=10)
    assert watched.probe_due(3, 0.1)  # never yet
    assert not watched.probe_due(3, 0.0)  # not asked
    feed(watched, {})
    assert [step for step in range(1, 31) if watched.probe_due(step, 0.1)] == [10, 20, 30]
    assert not health("grpo").probe_due(10, 0.0)
    assert not health("sft").probe_due(10, 0.0)
    assert health("trrd").probe_due(1, 0.0)  # its teacher is in the ratio, whatever beta is
    assert not health(teacher_every=0).probe_due(10, 0.1)
    masked = health(kd_mask="group", teacher_every=10)
    feed(masked, {"reward/all_wrong_frac": 0.0})  # measured, and nothing to be learnt from that
    assert not masked.probe_due(2, 0.1)


def test_only_policy_gradients_need_a_signal():
    for objective, alarm in (("grpo", True), ("kd_rkl", False), ("sft", False)):
        found = feed(health(objective), *[ILL["no_signal"]] * 12)
        assert ("no_signal" in tripped(found)[-1]) == alarm
