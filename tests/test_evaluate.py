"""The evaluation command: asking, resumption, results, and refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import Call, assert_drawn, recorded

from kdrl_jax import evaluate as entry
from kdrl_jax.config import ROOT, load_config, to_json
from kdrl_jax.data import SentencePieceTokenizer
from kdrl_jax.evaluation.benchmarks import (
    BENCHMARKS,
    load_benchmark,
    name_data,
)
from kdrl_jax.evaluation.model import find_policy, load_policy
from kdrl_jax.evaluation.planning import Question, prompt_buckets
from kdrl_jax.evaluation.runner import ask
from kdrl_jax.models import Decoder, ModelConfig, save_hf
from kdrl_jax.rewards import Grader, grade
from kdrl_jax.rewards.format import final_answer
from kdrl_jax.rollout import RolloutEngine, request_keys
from kdrl_jax.sharding import make_mesh
from kdrl_jax.training.display import Display
from kdrl_jax.training.evaluation import eval_settings, eval_slots, grade_all
from kdrl_jax.training.evaluation import evaluate as evaluate_held_out
from kdrl_jax.training.roles import write_model_files
from kdrl_jax.training.run_weights import save_params
from kdrl_jax.types import FINISH_EOS, FINISH_LENGTH, Problem, Rollouts, UserError

DATA = ROOT.parent / "shared" / "data"
SMOLLM2 = os.environ.get("KDRL_SMOLLM2")
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the evaluation sets are not at {DATA}")


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train("\\boxed{}0123456789+= ?abcdefghi\n")


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1, timeout_s=20.0, require_format=False) as shared:
        yield shared


# --- Asking ------------------------------------------------------------------------------------


class ScriptedEngine:
    """A sampler whose responses are functions of the request keys alone, as a policy's are."""

    max_new_tokens = 40
    prompt_buckets = (8, 16)

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, []

    def generate(self, params, prompts, keys, sampling, progress) -> Rollouts:
        self.calls.append(prompts.tokens.shape)
        draws = np.asarray(jax.vmap(jax.vmap(lambda k: jax.random.randint(k, (), 0, 12)))(keys))
        tokens = np.zeros((*draws.shape, self.max_new_tokens), np.int32)
        lengths, finish = np.zeros_like(draws), np.zeros_like(draws)
        for at, draw in np.ndenumerate(draws):
            ended = draw < 10
            said = self.tokenizer.encode(rf"\boxed{{{draw}}}" if ended else "ab" * 100)
            said = [*said, self.tokenizer.eos_id] if ended else said[: self.max_new_tokens]
            tokens[at][: len(said)] = said
            lengths[at], finish[at] = len(said), FINISH_EOS if ended else FINISH_LENGTH
        return Rollouts(
            *(prompts.tokens, prompts.lengths, tokens, np.zeros(tokens.shape, np.float32)),
            *(lengths, finish),
        )


def questions(tokenizer, count: int = 7) -> list[Question]:
    texts = ["?" * (1 + 3 * i % 11) for i in range(count)]
    return [
        Question(i + 5, Problem(f"p{i}", text, str(i)), tokenizer.encode(text))
        for i, text in enumerate(texts)
    ]


def answers(tokenizer, grader, path, batch=3, asked=None, engine=None):
    engine = engine or ScriptedEngine(tokenizer)
    rows = ask(
        asked or questions(tokenizer),
        *(engine, None, tokenizer, grader, path, Display(quiet=True)),
        samples=4,
        batch=batch,
        temperature=0.6,
        seed=1,
    )
    return rows, engine


def test_every_response_is_kept(tokenizer, grader, tmp_path):
    rows, engine = answers(tokenizer, grader, tmp_path / "b.jsonl")
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").open()] == rows
    assert sorted((r["id"], r["sample"]) for r in rows) == [
        (f"p{i}", k) for i in range(7) for k in range(4)
    ]
    assert len({shape[0] for shape in engine.calls}) == 1  # one batch shape
    assert len({shape[1] for shape in engine.calls}) <= 2
    lengths = [len(row["problem"]) for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    for row in rows:
        number = int(row["id"][1:]) + 5
        key = request_keys(1, 0, [number], 4)[0, row["sample"]]
        draw = int(jax.random.randint(key, (), 0, 12))
        if draw < 10:
            assert row["response"] == rf"\boxed{{{draw}}}"
            assert row["extracted"] == str(draw)
            assert row["outcome"] == ("correct" if str(draw) == row["answer"] else "wrong")
            assert (row["finish_reason"], row["repeats"]) == ("stop", False)
            assert row["length"] == len(tokenizer.encode(row["response"])) + 1
        else:
            assert row["response"] == "ab" * (len(row["response"]) // 2)
            assert (row["extracted"], row["outcome"]) == (None, "unparsable")
            assert (row["finish_reason"], row["repeats"]) == ("length", True)
            assert row["length"] == engine.max_new_tokens
        assert row["reward"] == (row["outcome"] == "correct")
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}


def test_an_interrupted_evaluation_ends_like_an_uninterrupted_one(tokenizer, grader, tmp_path):
    whole, engine = answers(tokenizer, grader, tmp_path / "whole.jsonl")
    content = (tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "torn.jsonl"
    for end in (0, 10, len(content) // 3, content.index(b"\n") + 1, len(content) - 5):
        path.write_bytes(content[:end])
        rows, again = answers(tokenizer, grader, path)
        assert path.read_bytes() == content
        assert rows == whole
    assert len(again.calls) == 1  # two of three batches were whole
    _, again = answers(tokenizer, grader, path)
    assert again.calls == []
    assert path.read_bytes() == content
    # The rest may be asked in batches of another size.
    path.write_bytes(content[: len(content) // 2])
    answers(tokenizer, grader, path, batch=2)
    assert path.read_bytes() == content
    assert len(engine.calls) == 3


def test_responses_to_other_problems_are_refused(tokenizer, grader, tmp_path):
    path = tmp_path / "b.jsonl"
    answers(tokenizer, grader, path)
    with pytest.raises(UserError, match="other problems; give another --output"):
        answers(tokenizer, grader, path, asked=questions(tokenizer, 9))


def test_held_out_evaluation_counts_repetition(tokenizer, grader):
    asked = [(q.problem, q.prompt) for q in questions(tokenizer, 5)]
    settings = {"samples": 4, "temperature": 0.6}
    metrics, verdicts = evaluate_held_out(
        ScriptedEngine(tokenizer), None, asked, tokenizer, grader, batch=2, seed=1, **settings
    )
    keys = request_keys(1, 0, range(5), 4)
    draws = np.asarray(jax.vmap(jax.vmap(lambda k: jax.random.randint(k, (), 0, 12)))(keys))
    assert metrics["eval/accuracy"] == np.mean(draws == np.arange(5)[:, None])
    assert metrics["eval/truncated_frac"] == metrics["eval/repetition_frac"] == (draws > 9).mean()
    assert metrics["eval/overlong_repetition_frac"] == 1.0  # of those that were cut, all repeat
    right = draws == np.arange(5)[:, None]
    assert metrics["eval/pass_at_4"] == right.any(axis=1).mean()
    assert [v.reward for v in verdicts] == (draws == np.arange(5)[:, None]).reshape(-1).tolist()


def test_held_out_accuracy_by_a_column(tokenizer, grader):
    asked = [
        (dataclasses.replace(q.problem, meta={"names": ["x"] * (2 + i % 2)}), q.prompt)
        for i, q in enumerate(questions(tokenizer, 5))
    ]
    settings = {"samples": 4, "temperature": 0.6, "batch": 5, "seed": 1}
    metrics, verdicts = evaluate_held_out(
        ScriptedEngine(tokenizer), None, asked, tokenizer, grader, by="names", **settings
    )
    shares = np.reshape([v.reward for v in verdicts], (5, 4)).mean(axis=1)
    assert metrics["eval/accuracy/2"] == pytest.approx(shares[::2].mean())
    assert metrics["eval/accuracy/3"] == pytest.approx(shares[1::2].mean())
    assert metrics["eval/accuracy"] == pytest.approx(shares.mean())


def test_the_format_counts_only_where_it_is_asked_for():
    """Accuracy alone is the default of evaluations, whatever the reward of training is."""
    right, formed = r"It is \boxed{5}.", r"<think>2+3</think>\boxed{5}"
    with Grader(workers=1, require_format=True) as grader:
        problems = [Problem("a", "?", "5"), Problem("b", "?", "5")]
        for required, expected in ((None, [0, 1]), (True, [0, 1]), (False, [1, 1])):
            verdicts = grade_all(grader, [right, formed], problems, require_format=required)
            assert [v.reward for v in verdicts] == expected
        assert grader.answers([right], require_format=False) == ["5"]
        assert grader.answers([right]) == [None]
    base = load_config(ROOT / "configs" / "base.py")
    assert base.reward.require_format
    assert eval_settings(base)["require_format"] is False


def test_an_evaluation_has_a_budget_of_its_own():
    base = load_config(ROOT / "configs" / "base.py")
    assert eval_settings(base)["max_new_tokens"] == 20_480
    stage2 = load_config(ROOT / "configs" / "stage2.py")
    assert eval_settings(stage2)["max_new_tokens"] == 32_768
    assert eval_slots(1024, 1024, 20_480, 32_768, 1) == 1024 * 21_504 // 33_792 == 651
    assert eval_slots(1024, 1024, 20_480, 32_768, 16) == 640  # else each device holds all of them
    assert eval_slots(8, 1024, 8192, 8192, 4) == 8
    assert eval_slots(8, 1024, 8192, 512, 4) == 8  # no more memory than there is for rollouts
    assert eval_slots(1, 64, 64, 4096, 1) == 1
    assert eval_slots(8, 64, 64, 4096, 8) == 8


def test_buckets_grow_so_that_no_prompt_is_dropped():
    assert prompt_buckets((64, 128), 100) == [64, 128]
    assert prompt_buckets((64, 128), 300) == [64, 128, 256, 512]


# --- The command -------------------------------------------------------------------------------

TINY = {
    **{"vocab_size": 64, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1},
    **{"head_dim": 8, "mlp_size": 32, "qk_norm": True, "tie_embeddings": True},
    **{"max_positions": 64, "model_type": "qwen3"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer) -> Path:
    """A folder with the same tiny random policy as a Hugging Face folder and as a run, and data."""
    folder = tmp_path_factory.mktemp("tiny")
    model = Decoder(ModelConfig(**TINY))
    params = jax.jit(model.init)(jax.random.key(0))
    write_model_files(folder / "run", model.config, tokenizer)
    save_params(folder / "run", params)
    shutil.copytree(folder / "run" / "checkpoints" / "0", folder / "run" / "checkpoints" / "3")
    save_hf(folder / "hf", model, params, tokenizer_folder=folder / "run" / "model")
    config = load_config(ROOT / "configs" / "base.py", overrides())
    (folder / "run" / "config.json").write_text(to_json(config), encoding="utf-8")
    (folder / "data").mkdir()
    for name, count in (("aime24", 3), ("gsm8k_test", 5)):
        rows = [
            {"id": f"{name}/{i}", "problem": "?" * (i + 1), "answer": "5"} for i in range(count)
        ]
        if name == "gsm8k_test":
            rows += [
                {"id": "bad/1", "problem": "?", "answer": "}{"},
                {"id": "bad/2", "problem": ""},
            ]
        text = "\n".join(map(json.dumps, rows))
        (folder / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def overrides(**changes) -> list[str]:
    keys = {
        **{
            "student.dtype": "float32",
            "data.prompt_style": "plain",
            "data.prompt_buckets": "(8,)",
        },
        **{"data.max_prompt_tokens": 8, "rollout.max_new_tokens": 12, "eval.batch": 2},
        **{"reward.require_format": False, "reward.workers": 1, "mesh.fsdp": 1, "mesh.data": -1},
        **{"cache_dir": "runs/cache", **changes},
    }
    return [f"{key}={value}" for key, value in keys.items()]


def command(tiny: Path, output: Path, *more: str, **changes) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'base.py'}",
        f"--checkpoint={tiny / 'hf'}",
        "--benchmarks=gsm8k,aime24",
        f"--data_dir={tiny / 'data'}",
        f"--output={output}",
        *(f"--config.{item}" for item in overrides(cache_dir=output / "cache", **changes)),
        *more,
    ]


@pytest.fixture(scope="module")
def drawn() -> list[Call]:
    """What `evaluated` drew."""
    return []


@pytest.fixture(scope="module")
def evaluated(tiny, drawn, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("evaluated")
    with recorded() as calls:
        entry.main(command(tiny, output))
    drawn.extend(calls)
    return output


def test_the_command_writes_responses_results_and_table(evaluated):
    results = json.loads((evaluated / "results.json").read_text())
    gsm8k, aime24 = results["benchmarks"]["gsm8k"], results["benchmarks"]["aime24"]
    assert (gsm8k["problems"], gsm8k["samples"], gsm8k["kept_out"]) == (5, 1, 2)
    assert "bad/1: the gold answer" in " ".join(gsm8k["kept_out_rows"])
    assert (aime24["problems"], aime24["samples"], aime24["kept_out"]) == (3, 16, 0)
    assert results["average"] is None
    rows = [json.loads(line) for line in (evaluated / "aime24.jsonl").open(encoding="utf-8")]
    assert len(rows) == 48
    assert len({row["response"] for row in rows}) > 24  # the samples differ
    assert aime24["clip_ratio"] == np.mean([row["finish_reason"] == "length" for row in rows])
    table = (evaluated / "results.md").read_text(encoding="utf-8")
    assert "No table of KDRL or RLAD has such a model" in table
    assert "and 1 more" not in table


def test_a_run_gives_what_its_export_gives(tiny, evaluated, drawn, tmp_path):
    """From an Orbax checkpoint, with the run's own config, and one benchmark at a time.

    With fewer samples at once: every response is where its key has it, for both.
    """
    arguments = [f"--checkpoint={tiny / 'run'}", f"--data_dir={tiny / 'data'}"]
    changes = [f"--config.cache_dir={tmp_path}", "--benchmarks=aime24", "--limit=2", "--samples=3"]
    with recorded() as calls:
        entry.main([*arguments, *changes, f"--output={tmp_path}", f"--compare={evaluated}"])
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model, params, tokenizer = load_policy(tiny / "hf", mesh, "float32")
    for call in [*drawn, *calls]:
        assert_drawn(model, call._replace(params=params), tokenizer.size)
    ours = [json.loads(line) for line in (tmp_path / "aime24.jsonl").open(encoding="utf-8")]
    theirs = [json.loads(line) for line in (evaluated / "aime24.jsonl").open(encoding="utf-8")]
    assert len(ours) == 6
    for rows, some in ((ours, calls), (theirs, drawn[-3:])):  # a problem each
        by_key = {tuple(r.key): r for call in some for r in call.requests}
        for row in rows:
            number, sample = int(row["id"].split("/")[1]), row["sample"]
            (keys,) = jax.random.key_data(request_keys(0, 0, [number], 16))
            request = by_key[tuple(np.asarray(keys[sample]))]
            assert row["length"] == len(request.tokens)
            text = [t for t in request.tokens if t not in tokenizer.stop_ids]
            assert row["response"] == tokenizer.decode(text)
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "run (step 3)**" in table
    assert "hf**" in table


def test_running_again_continues_and_other_settings_are_refused(tiny, evaluated, monkeypatch):
    before = {p.name: p.read_bytes() for p in evaluated.glob("*.js*")}
    content = before["gsm8k.jsonl"]
    (evaluated / "gsm8k.jsonl").write_bytes(content[: len(content) * 2 // 3])
    entry.main(command(tiny, evaluated))
    assert {p.name: p.read_bytes() for p in evaluated.glob("*.js*")} == before
    with pytest.raises(UserError) as refusal:
        entry.main(command(tiny, evaluated, "--limit=2", **{"eval.temperature": 0.7}))
    text = str(refusal.value)
    assert "gsm8k.settings.json: was made with temperature=0.6, now 0.7" in text
    assert "aime24.settings.json: was made with number_of_problems=3, now 2" in text


@pytest.mark.parametrize(("form", "kept_out"), [("last_number", 2), ("text", 1)])
def test_answers_of_other_forms_are_graded_kept_and_compared(
    tiny, tmp_path, form, kept_out, capsys
):
    """Gold answers too: one that is no number is nobody's last number, but it is a text."""
    argv = [*command(tiny, tmp_path, **{"reward.answer": form}), "--benchmarks=gsm8k"]
    entry.main([*argv, "--samples=32"])
    said = capsys.readouterr().out
    assert "the first prompt (gsm8k_test/0), 1 tokens, as the model gets it:\n  | ?\n" in said
    rows = [json.loads(line) for line in (tmp_path / "gsm8k.jsonl").open(encoding="utf-8")]
    for row in rows:
        found = final_answer(row["response"], require_format=False, form=form)
        assert row["extracted"] == found
        verdict = grade(row["response"], "5", require_format=False, form=form)
        assert (row["outcome"], row["reward"]) == (verdict.outcome, verdict.reward)
    assert any(row["extracted"] for row in rows)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["benchmarks"]["gsm8k"]["kept_out"] == kept_out
    assert results["settings"]["answer"] == form
    with pytest.raises(UserError, match=f"was made with answer='{form}', now 'boxed'"):
        entry.main([*command(tiny, tmp_path), "--benchmarks=gsm8k", "--samples=32"])


@pytest.fixture(scope="module")
def own_data(tmp_path_factory) -> Path:
    """Rows with other column names, called like a benchmark in one of two files."""
    folder = tmp_path_factory.mktemp("own_data")
    rows = [{"question": "?" * (i + 1), "gold": {"value": i}} for i in range(4)]
    for name, count in (("mine", 4), ("aime24", 2)):
        text = "\n".join(map(json.dumps, rows[:count]))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "torn.jsonl").write_text('{"question": "?", "gold": {"value": 1}}\n{"question": ""}')
    return folder


def on_own_data(tiny: Path, output: Path, *more: str, **changes) -> list[str]:
    argv = [a for a in command(tiny, output, **changes) if "--benchmarks" not in a]
    fields = ("--config.data.fields.problem=question", "--config.data.fields.answer=gold.value")
    return [*argv, *fields, *more]


def test_data_of_ones_own(tiny, own_data, tmp_path):
    """Rows of their own in the table, and none of the paper's, even where a name is the same."""
    paths = [f"--data={own_data / name}" for name in ("mine.jsonl", "aime24.jsonl")]
    entry.main(on_own_data(tiny, tmp_path, *paths, "--samples=3"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["benchmarks"]) == ["mine", "own_aime24"]
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").open(encoding="utf-8")]
    assert sorted((r["id"], r["problem"], r["answer"], r["sample"]) for r in rows) == [
        (f"mine/{i + 1}", "?" * (i + 1), str(i), g) for i in range(4) for g in range(3)
    ]
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "KDRL" not in table
    assert re.search(r"^\| +\| +mine \| +own_aime24 \|$", table, re.MULTILINE)
    assert re.search(r"^\| own_aime24 \| +2 \| +3 \|", table, re.MULTILINE)


def test_data_of_ones_own_beside_a_benchmark(tiny, own_data, tmp_path):
    """A benchmark keeps its own columns and number of samples, whatever the fields are."""
    more = [f"--data={own_data / 'mine.jsonl'}", "--benchmarks=aime24", "--limit=2"]
    entry.main(on_own_data(tiny, tmp_path, *more, **{"eval.samples": 2}))
    results = json.loads((tmp_path / "results.json").read_text())["benchmarks"]
    assert {name: (f["problems"], f["samples"]) for name, f in results.items()} == {
        "aime24": (2, 16),
        "mine": (2, 2),
    }
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "No table of KDRL or RLAD" in table


def test_a_runs_own_fields_serve(tiny, own_data, tmp_path):
    shutil.copytree(tiny / "run", tmp_path / "run")
    fields = {"data.fields.problem": "question", "data.fields.answer": "gold.value"}
    config = load_config(ROOT / "configs" / "base.py", overrides(**fields))
    (tmp_path / "run" / "config.json").write_text(to_json(config), encoding="utf-8")
    argv = [f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
    entry.main([*argv, f"--data={own_data / 'mine.jsonl'}", f"--config.cache_dir={tmp_path}"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["benchmarks"]["mine"]["problems"] == 4


def test_data_of_ones_own_that_cannot_be(tiny, own_data, tmp_path, monkeypatch):
    monkeypatch.setattr(entry, "load_policy", lambda *_: pytest.fail("loaded"))
    shutil.copytree(own_data, tmp_path / "other")
    for paths, message in (
        (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
        ([own_data / "torn.jsonl"], r"torn\.jsonl:2: 'question' is empty"),
        ([own_data / "mine.jsonl", tmp_path / "other" / "mine.jsonl"], "both be called 'mine'"),
    ):
        data = [f"--data={path}" for path in paths]
        with pytest.raises(UserError, match=message):
            entry.main(on_own_data(tiny, tmp_path / "out", *data))
    with pytest.raises(UserError, match=r"mine\.jsonl:1: has no problem: no 'problem' among"):
        entry.main([*command(tiny, tmp_path / "out"), f"--data={own_data / 'mine.jsonl'}"])
    with pytest.raises(UserError, match="--benchmarks: names none, and there is no --data"):
        entry.main(on_own_data(tiny, tmp_path / "out", "--benchmarks="))
    assert not (tmp_path / "out").exists()


def test_self_check_of_ones_own_data(own_data, capsys):
    argv = ["--self_check", f"--data={own_data / 'torn.jsonl'}", "--config.data.on_bad=drop"]
    argv += ["--config.data.fields.problem=question", "--config.data.fields.answer=gold.value"]
    with pytest.raises(SystemExit) as status:
        entry.main(argv)
    assert status.value.code == 1
    said = capsys.readouterr().out
    assert "torn: 1 of 2 gold answers are correct" in said
    assert "torn.jsonl:2: 'question' is empty" in said


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/my test.jsonl", "my_test"),
        ("hf://openai/gsm8k?split=test&config=main", "own_gsm8k"),
        ("hf://me/things?file=data/*.parquet", "things"),
        ("folder/", "folder"),
        ("data/math-*.parquet", "math-"),
        ("*.jsonl", "data"),
    ],
)
def test_names_of_data(path, name):
    assert name_data([path]) == {name: path}


def test_policies_are_found_in_every_form_of_folder(tiny):
    run = tiny / "run"
    assert find_policy(tiny / "hf").step is None
    assert find_policy(run).step == find_policy(run / "checkpoints").step == 3
    assert find_policy(run / "checkpoints" / "0").step == 0
    assert find_policy(run).digest() != find_policy(tiny / "hf").digest()
    mesh = make_mesh()
    model, ours, _ = load_policy(run, mesh, "float32")
    _, theirs, _ = load_policy(tiny / "hf", mesh, "float32")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    _, half, _ = load_policy(run, mesh, jnp.bfloat16)
    assert half["embed"]["embedding"].dtype == jnp.bfloat16
    assert half["final_norm"]["scale"].dtype == jnp.float32
    assert model.config == ModelConfig(**TINY)


def test_everything_wrong_is_said_at_once(tiny, tmp_path):
    arguments = [
        *(
            f"--config={ROOT / 'configs' / 'base.py'}",
            "--checkpoint=nowhere",
            "--benchmarks=gsm9k,math500",
        ),
        *(f"--data_dir={tiny / 'data'}", "--samples=0", "--config.evil.batch=3"),
        *("--config.eval.temperature=-1", "--config.objective=none"),
    ]
    with pytest.raises(UserError) as refusal:
        entry.main(arguments)
    text = str(refusal.value)
    for expected in (
        "--samples: 0 must be at least 1",
        "'gsm9k' is none of",
        "--output: missing",
        "--checkpoint: no folder nowhere",
        "--config.evil.batch: no such key; the nearest is eval.batch",
        "eval.temperature: -1.0 must not be negative",
    ):
        assert expected in text
    assert "objective" not in text  # of no concern to an evaluation


def test_missing_files_and_short_windows_are_refused_before_loading(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(entry, "load_policy", lambda *_: pytest.fail("loaded"))
    changed = [a for a in command(tiny, tmp_path) if "--benchmarks" not in a]
    with pytest.raises(UserError) as refusal:
        entry.main([*changed, "--benchmarks=math500,gsm8k,amc23"])
    assert [p.split(": ")[0] for p in refusal.value.problems] == [
        str(tiny / "data" / f"{name}.jsonl") for name in ("math500", "amc23")
    ]
    with pytest.raises(UserError) as refusal:
        entry.main(command(tiny, tmp_path, **{"rollout.max_new_tokens": 62}))
    assert len(refusal.value.problems) == 2
    assert "exceed the model's window of 64" in refusal.value.problems[0]
    assert "(gsm8k)" in refusal.value.problems[0]
    assert not list(tmp_path.glob("*.jsonl"))


def test_what_cannot_be_evaluated_is_refused(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no config\.json of a model"):
        find_policy(tmp_path / "empty")
    shutil.copytree(tiny / "run" / "model", tmp_path / "young" / "model")
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        find_policy(tmp_path / "young")
    more = [f"--checkpoint={tiny / 'hf'}", f"--output={tmp_path}", f"--data_dir={tiny / 'data'}"]
    with pytest.raises(UserError, match="--config: missing"):
        entry.main([*more, "--benchmarks=gsm8k"])
    with pytest.raises(UserError, match="has a revision, but --data_dir is local"):
        entry.main([*command(tiny, tmp_path), "--benchmarks=gsm8k@main"])
    with pytest.raises(UserError, match=r"no file .*results\.json"):
        entry.main([*command(tiny, tmp_path), f"--compare={tmp_path}"])


def test_self_check_in_another_form(tiny, capsys):
    argv = ["--self_check", f"--data_dir={tiny / 'data'}", "--benchmarks=gsm8k"]
    for form, right in (("text", 6), ("last_number", 5)):
        with pytest.raises(SystemExit):
            entry.main([*argv, f"--config.reward.answer={form}"])
        assert f"gsm8k: {right} of 7 gold answers are correct" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"reward\.answer: 'task' needs data\.task"):
        entry.main([*argv, "--config.reward.answer=task"])


def test_self_check_names_bad_gold_answers(tiny, capsys):
    with pytest.raises(SystemExit) as status:
        entry.main(["--self_check", f"--data_dir={tiny / 'data'}", "--benchmarks=gsm8k,aime24"])
    assert status.value.code == 1
    said = capsys.readouterr().out
    assert "gsm8k: 5 of 7 gold answers are correct" in said
    assert "bad/1: the gold answer '}{' grades as" in said
    assert "aime24: 3 of 3 gold answers are correct" in said


@pytest.mark.skipif(not SMOLLM2, reason="KDRL_SMOLLM2 names no folder")
@real_data
def test_a_real_model_answers_gsm8k(tmp_path):
    policy = find_policy(SMOLLM2)
    mesh = make_mesh(devices=jax.devices()[:1])
    model, params, tokenizer = load_policy(policy, mesh, "float32")
    problems = load_benchmark(BENCHMARKS["gsm8k"], DATA).problems[:2]
    encoded = [tokenizer.chat([{"role": "user", "content": p.problem}]) for p in problems]
    engine = RolloutEngine(
        model, valid_vocab=tokenizer.size, prompt_buckets=(256,), max_new_tokens=8, mesh=mesh
    )
    with Grader(workers=1, require_format=False) as grader:
        rows = ask(
            [Question(i, *pair) for i, pair in enumerate(zip(problems, encoded, strict=True))],
            *(engine, params, tokenizer, grader, tmp_path / "g.jsonl", Display(quiet=True)),
            **{"samples": 1, "batch": 2, "temperature": 0.0, "seed": 0},
        )
    assert all(len(row["response"].split()) > 2 for row in rows)
