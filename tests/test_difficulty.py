"""The command that measures pass rates: what it writes, how it continues, what it refuses."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from draws import assert_drawn, recorded

from kdrl_jax import difficulty as entry
from kdrl_jax.config import ROOT, load_config
from kdrl_jax.data import SentencePieceTokenizer, apply_filters, load_problems
from kdrl_jax.models import Decoder, ModelConfig, save_hf
from kdrl_jax.rewards import last_boxed
from kdrl_jax.rollout import request_keys
from kdrl_jax.sharding import make_mesh
from kdrl_jax.training.roles import write_model_files
from kdrl_jax.types import UserError

SAMPLES, PROBLEMS = 12, 7
TINY = {
    **{"vocab_size": 64, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1},
    **{"head_dim": 8, "mlp_size": 32, "rope_theta": 1e4, "rope_scaling": None, "norm_eps": 1e-6},
    **{"qkv_bias": False, "qk_norm": True, "tie_embeddings": True, "max_positions": 64},
    **{"model_type": "qwen3"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random policy over digits and boxes, which hits a one-digit answer now and then."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = SentencePieceTokenizer.train("01?")
    model = Decoder(ModelConfig(**TINY))
    params = jax.jit(model.init)(jax.random.key(0))
    write_model_files(folder / "run", model.config, tokenizer)
    save_hf(folder / "toy", model, params, tokenizer_folder=folder / "run" / "model")
    rows = [
        {
            "uid": f"q/{i}",
            "question": "?" * (i + 2),
            "answer": i % 2,
            "solution": "é",
            "pass_rate": {"other": 0.5},
        }
        for i in range(PROBLEMS)
    ]
    rows.insert(2, {"question": "??", "answer": None})
    rows.append({"question": "?" * 20, "answer": 1})
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "data.jsonl").write_text(text)
    return folder


def command(tiny, output, *more):
    keys = {
        **{"student.dtype": "float32", "data.prompt_style": "plain", "data.prompt_buckets": "(9,)"},
        **{"data.max_prompt_tokens": 9, "data.on_bad": "drop", "rollout.max_new_tokens": 10},
        **{"data.fields.id": "uid", "data.fields.problem": "question", "eval.batch": 36},
        **{"reward.require_format": False, "reward.workers": 1, "rollout.temperature": 1.0},
        **{"mesh.fsdp": 1, "mesh.data": -1, "cache_dir": tiny / "cache", "seed": 3},
    }
    return [
        f"--config={ROOT / 'configs' / 'base.py'}",
        f"--data={tiny / 'data.jsonl'}",
        f"--model={tiny / 'toy'}",
        f"--samples={SAMPLES}",
        f"--output={output}",
        *(f"--config.{key}={value}" for key, value in keys.items()),
        *more,
    ]


def test_the_first_prompt_is_shown_before_anything_is_loaded(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(entry, "load_policy", lambda *_: pytest.fail("loaded"))
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        entry.main(command(tiny, tmp_path / "rated.jsonl"))
    said = capsys.readouterr().out
    assert "the first prompt (q/0), 2 tokens, as the model gets it:\n  | ??\n" in said


@pytest.fixture(scope="module")
def drawn():
    """What `measured` drew."""
    return []


@pytest.fixture(scope="module")
def measured(tiny, drawn, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "rated.jsonl"
    with recorded() as calls:
        entry.main(command(tiny, output))
    drawn.extend(calls)
    return output


def test_rows_are_those_of_the_data_with_labels(measured):
    rows = [json.loads(line) for line in measured.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"q/{i}" for i in range(PROBLEMS)]
    for i, row in enumerate(rows):
        counts = row["pass_counts"]["toy"]
        assert (row["problem"], row["answer"], row["solution"]) == ("?" * (i + 2), str(i % 2), "é")
        assert row["pass_rate"] == {"other": 0.5, "toy": counts["passed"] / SAMPLES}
        assert counts["samples"] == SAMPLES
    assert sorted(p.name for p in measured.parent.iterdir()) == [
        "rated.jsonl",
        "rated.settings.json",
    ]


def test_counts_are_those_of_each_problems_own_draws(tiny, measured, drawn):
    """Attempts are those that seed, place and sample name; graded by comparing strings."""
    config = load_config(ROOT / "configs" / "base.py")
    assert config.rollout.top_p == 1.0
    policy = entry.find_policy(tiny / "toy")
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model, params, tokenizer = entry.load_policy(policy, mesh, "float32")
    for call in drawn:
        assert_drawn(model, call._replace(params=params), tokenizer.size)
        assert (call.temperature, set(call.limits)) == (1.0, {10})
        assert call.stops == set(tokenizer.stop_ids)
    by_key = {tuple(r.key): r for call in drawn for r in call.requests}
    problems, expected = load_problems(measured), []
    for i, problem in enumerate(problems):
        keys = jax.random.key_data(request_keys(3, 0, [i], SAMPLES))[0]
        own = [by_key[tuple(key)] for key in np.asarray(keys)]
        ids = [*tokenizer.start_ids, *tokenizer.encode(problem.problem)]
        assert all(r.prompt == ids for r in own)
        whole = [r.tokens[-1] in tokenizer.stop_ids for r in own]
        texts = [
            tokenizer.decode(r.tokens[:-1] if ends else r.tokens)
            for r, ends in zip(own, whole, strict=True)
        ]
        expected.append(
            {
                "passed": sum((last_boxed(t) or "").strip(" .") == problem.answer for t in texts),
                "samples": SAMPLES,
                "cut": whole.count(False),
            }
        )
    assert [p.meta["pass_counts"]["toy"] for p in problems] == expected
    assert 0 < sum(e["passed"] for e in expected) < PROBLEMS * SAMPLES
    assert 0 < sum(e["cut"] for e in expected) < PROBLEMS * SAMPLES


def test_the_filters_read_what_was_written(measured):
    problems = load_problems(measured)
    rates = np.array([p.meta["pass_rate"]["toy"] for p in problems])
    middle = np.median(rates)
    kept, _ = apply_filters(problems, [f"pass_rate:model=toy,min={middle}"])
    assert [p.id for p in kept] == [f"q/{i}" for i in np.flatnonzero(rates >= middle)]


def test_an_interrupted_measurement_continues(tiny, measured, tmp_path, monkeypatch, capsys):
    output = tmp_path / "rated.jsonl"
    calls = []
    respond = entry.respond

    def interrupted(*args, **kwargs):
        calls.append(args[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return respond(*args, **kwargs)

    monkeypatch.setattr(entry, "respond", interrupted)
    with pytest.raises(KeyboardInterrupt):
        entry.main(command(tiny, output))
    entry.unlock_folder(tmp_path / "rated.jsonl.part")
    assert not output.exists()
    part = tmp_path / "rated.jsonl.part" / "rows.jsonl"
    whole = part.read_text().splitlines()
    assert len(whole) == 3  # one batch
    torn = "\n".join([*whole, whole[0], whole[1][:20]])  # a batch that was not all written
    part.write_text(torn)
    entry.main(command(tiny, output))
    assert [list(numbers) for numbers in calls[2:]] == [[3, 4, 5], [6]]
    assert output.read_bytes() == measured.read_bytes()
    capsys.readouterr()
    entry.main(command(tiny, output))  # nothing is asked again
    assert len(calls) == 4
    assert f"{PROBLEMS} problems: " in capsys.readouterr().out


def test_other_settings_and_other_files_are_refused(tiny, measured, tmp_path):
    with pytest.raises(UserError) as caught:
        entry.main(command(tiny, measured, "--config.seed=4", "--limit=3"))
    assert [line.split(" was made with ")[1][:8] for line in caught.value.problems] == [
        "problems",
        "seed=3, ",
    ]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("precious")
    with pytest.raises(UserError, match=r"mine\.jsonl exists and is not this command's"):
        entry.main(command(tiny, mine))
    assert mine.read_text() == "precious"


def test_everything_wrong_is_said_at_once(tiny, tmp_path):
    with pytest.raises(UserError) as caught:
        entry.main(
            command(
                tiny,
                tmp_path / "out.json",
                *("--samples=0", "--limit=-1", "--model=nowhere", "--config.rollout.top_q=1"),
                *("--config.rollout.top_p=1.5", "--config.objective=none"),
            )
        )
    text = str(caught.value)
    for expected in (
        "--samples: 0 must be at least 1",
        "--limit: -1 must be at least 1",
        "out.json must end in .jsonl",
        "--model: no folder nowhere",
        "--config.rollout.top_q: no such key; the nearest is rollout.top_",
        "rollout.top_p: 1.5 must be at most 1",
    ):
        assert expected in text
    assert "objective" not in text  # of no concern here
    long = command(tiny, tmp_path / "a.jsonl", "--config.rollout.max_new_tokens=60")
    with pytest.raises(UserError, match="69 exceeds the model's window of 64"):
        entry.main(long)
    none = command(tiny, tmp_path / "a.jsonl", "--config.data.max_prompt_tokens=1")
    with pytest.raises(UserError, match="no prompt is short enough"):
        entry.main(none)
    assert not list(tmp_path.iterdir())


def test_histogram():
    counts = [{"passed": p, "samples": 4, "cut": c} for p, c in ((0, 2), (0, 0), (1, 1), (4, 0))]
    assert entry.histogram(counts, 4).splitlines() == [
        "solved  problems",
        "   0/4       2 " + "#" * 40,
        "   1/4       1 " + "#" * 20,
        "   2/4       0 ",
        "   3/4       0 ",
        "   4/4       1 " + "#" * 20,
        "4 problems: 2 never solved, 1 always; mean pass rate 0.312; "
        "18.8% of the attempts were cut by the limit",
    ]
