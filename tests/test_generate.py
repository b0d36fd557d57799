"""Asking a model: the tokens of other implementations, text as it comes, files, conversations."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import model_cases as cases
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from commands import HANG_S, xla_flags
from draws import ROUNDING, Call, assert_drawn, assert_same_requests, recorded
from local_server import NumpyDecoder, log_softmax
from rich.console import Console
from tokenizer_cases import write_hf

from kdrl_jax import generate
from kdrl_jax.cli import run_entry
from kdrl_jax.data import SentencePieceTokenizer, encode_prompt, load_tokenizer
from kdrl_jax.evaluation.model import find_policy, load_policy
from kdrl_jax.generation.asking import Said, ask, read_prompts
from kdrl_jax.generation.conversation import converse
from kdrl_jax.generation.sampler import LIVE_CHUNK, Sampler, Settings, buckets
from kdrl_jax.generation.screen import Screen
from kdrl_jax.generation.show import Columns, CompileNotice
from kdrl_jax.generation.text_stream import CONTEXT, PARTIAL, TextStream
from kdrl_jax.rollout import request_keys
from kdrl_jax.sharding import make_mesh
from kdrl_jax.training.roles import write_model_files
from kdrl_jax.training.run_weights import save_params
from kdrl_jax.types import FINISH_LENGTH, Problem

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "What is 12+3?"
MODEL = {
    **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"},
    **{"vocab_size": 448, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6},
    **{"max_position_embeddings": 192, "rope_theta": 1e4, "tie_word_embeddings": True},
}
LENGTH = 20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two Hugging Face folders of one tokenizer, and the first as a run's."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        cases.write_folder(folder / name, MODEL, cases.random_tensors(MODEL, seed))
        write_hf(folder / name)
    model, params, tokenizer = load_policy(folder / "student", one_device(), "float32")
    write_model_files(folder / "run", model.config, tokenizer, folder / "student")
    save_params(folder / "run", params)
    saved = {
        **{"cache_dir": str(folder / "cache"), "data": {"prompt_style": "kdrl"}},
        "rollout": {"temperature": 0.0, "max_new_tokens": LENGTH},
    }
    (folder / "run" / "config.json").write_text(json.dumps(saved))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The cache of compiled programs goes where it does no harm."""
    monkeypatch.chdir(tmp_path)


def one_device():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def settings(**changes) -> Settings:
    values = {"max_new_tokens": LENGTH, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return Settings(**(values | {"samples": 1, "seed": 0} | changes))


def sampler(folder: Path, live: bool = True, **changes) -> Sampler:
    loaded = load_policy(find_policy(folder), one_device(), "float32")
    return Sampler(folder.name, *loaded, one_device(), settings(**changes), live=live)


@pytest.fixture(scope="module")
def student(models):
    return sampler(models / "student")


def command(model: Path, *more: str, **options) -> None:
    flags = {"max_new_tokens": LENGTH, "prompt_style": "chat"} | options
    generate.main([f"--model={model}", *more, *(f"--{k}={v}" for k, v in flags.items())])


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def drawn_as_asked(folder: Path, *calls: Call) -> None:
    """What was `recorded` of one prompt or more, and of a model, against its full forward pass."""
    model, params, tokenizer = load_policy(folder, one_device(), "float32")
    for call in calls:
        assert_drawn(model, call._replace(params=params), tokenizer.size)


def text_of(folder: Path, tokens: list[int]) -> str:
    tokenizer = load_tokenizer(folder)
    return tokenizer.decode([t for t in tokens if t not in tokenizer.stop_ids])


# --- against other implementations ---------------------------------------------------------------


def asked_greedily(model: Path, capsys, **options) -> list[dict]:
    command(model, "--json", "--logprobs", prompt=QUESTION, temperature=0, **options)
    (row,) = rows(capsys.readouterr().out)
    assert row["tokens"] == len(row["log_probs"])
    return row["log_probs"]


def assert_likeliest(found: list[dict], next_logits, tokenizer, most: int = LENGTH) -> None:
    """Each token has the largest logit but for rounding, and its log-prob; an end token ends."""
    ids = encode_prompt(Problem("", QUESTION, ""), tokenizer, "chat")
    for token in found:
        logits = next_logits(ids)[: tokenizer.size]
        assert logits[token["id"]] >= logits.max() - ROUNDING
        assert token["log_prob"] == pytest.approx(log_softmax(logits)[token["id"]], abs=1e-4)
        ids.append(token["id"])
    ends = [token["id"] in tokenizer.stop_ids for token in found]
    assert not any(ends[:-1])
    assert ends[-1] or len(found) == most


def test_greedy_answers_are_those_of_numpy(models, capsys):
    folder = models / "student"
    found = asked_greedily(folder, capsys)
    assert_likeliest(found, NumpyDecoder(folder).logits, load_tokenizer(folder))


@pytest.mark.parity
def test_greedy_answers_are_those_of_transformers(models, capsys):
    """Live, in torch: a small model, or the real one that KDRL_SMOLLM2 names."""
    torch = pytest.importorskip("torch", reason="torch is not installed (the `parity` extra)")
    import transformers

    folder = Path(os.environ.get("KDRL_SMOLLM2") or models / "student")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(ids):
        with torch.no_grad():
            return theirs(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()

    assert_likeliest(asked_greedily(folder, capsys), logits, load_tokenizer(folder))


# --- text as it comes ----------------------------------------------------------------------------

TEXTS = [
    "plain words, 123 and more",
    "naïve — ∑ x² ≤ 5 \u2028 日本語 🙂🙃 👩‍👩‍👧 ü",
    "  leading spaces\n\nand  lines ",
    "🙂" * 90 + " long enough to forget its beginning " * 20 + "日本",
]


def byte_fallback() -> SentencePieceTokenizer:
    """Few characters of its own: all others are spelled in bytes, one token each."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["plain words and more lines, long enough"] * 20),
        **{"model_writer": model, "model_type": "bpe", "vocab_size": 300, "byte_fallback": True},
        **{"minloglevel": 2, "hard_vocab_limit": False},
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_hold_no_half_characters(models, kind, text):
    tokenizer = load_tokenizer(models / "student") if kind == "byte-level" else byte_fallback()
    ids = tokenizer.encode(text)
    for seed, most in ((0, 1), (1, 3), (2, 9)):
        rng, stream, pieces, start = np.random.default_rng(seed), TextStream(tokenizer), [], 0
        while start < len(ids):
            end = start + int(rng.integers(1, most + 1))
            pieces.append(stream.add(ids[start:end]))
            assert PARTIAL not in pieces[-1]
            start = end
        pieces.append(stream.flush())
        assert "".join(pieces) == tokenizer.decode(ids)
        # Nothing is held back for longer than a character takes.
        assert sum(map(len, pieces[-9:])) >= 1
    if len(ids) > 3 * CONTEXT:
        assert len(stream._ids) < len(ids)


def test_bytes_of_no_character_are_shown_in_the_end(models):
    tokenizer = load_tokenizer(models / "student")
    half = tokenizer.encode("🙂")[:1]
    stream = TextStream(tokenizer)
    assert stream.add([*tokenizer.encode("so "), *half]) == "so "
    assert stream.flush() == PARTIAL


@pytest.mark.parametrize("live", [True, False])
def test_what_is_streamed_is_what_is_drawn(models, live):
    """Few tokens at a time or all at once: drawn by the same keys; the text is of what is drawn."""
    samples = 3
    one = sampler(models / "student", live=live, samples=samples)
    prompts = [encode_prompt(Problem("", t, ""), one.tokenizer, "chat") for t in ("a", QUESTION)]
    texts: dict[int, list[str]] = {}

    def hear(request: int, text: str) -> None:
        texts.setdefault(request, []).append(text)

    with recorded() as calls:
        answers, out = one.answer(prompts, [4, 7], turn=2, on_text=hear if live else None)
    drawn_as_asked(models / "student", *calls)
    (call,) = calls
    keys = jax.random.key_data(request_keys(0, 2, [4, 7], samples)).reshape(-1, 2)
    np.testing.assert_array_equal([r.key for r in call.requests], keys)
    assert [r.prompt for r in call.requests] == [p for p in prompts for _ in range(samples)]
    for i, (answer, request) in enumerate(zip(answers, call.requests, strict=True)):
        assert (answer.tokens, answer.log_probs) == (request.tokens, request.log_probs)
        assert answer.text == text_of(models / "student", answer.tokens)
        assert (answer.number, answer.sample) == divmod(i, samples)
        if live:
            assert "".join(texts[i]) == answer.text
    if live:
        assert max(map(len, texts.values())) >= max(out.lengths.ravel()) // LIVE_CHUNK


def test_the_window_limits_an_answer(models):
    """A prompt that leaves room for 5 tokens gets 5; one that leaves none is refused."""
    one = sampler(models / "student", max_new_tokens=40)
    ids = np.random.default_rng(0).integers(3, 300, 187).tolist()
    (answer,), out = one.answer([ids], [0])
    assert len(answer.tokens) <= 5
    if answer.finish_reason == "length":
        assert out.finish_reason[0, 0] == FINISH_LENGTH
        assert len(answer.tokens) == 5
    assert one.fault(ids + ids[:5]).startswith("has 192 tokens, ")
    assert one.fault(ids) == ""
    assert buckets(192) == (64, 128, 256)


# --- the command ---------------------------------------------------------------------------------


def test_one_answer(models, capsys):
    with recorded() as calls:
        command(models / "student", prompt=QUESTION)
        streamed = capsys.readouterr()
        command(models / "student", "--json", prompt=QUESTION)
        (row,) = rows(capsys.readouterr().out)
    live, whole = calls
    assert_same_requests(live.requests, whole.requests)
    drawn_as_asked(models / "student", *calls)
    assert streamed.out == text_of(models / "student", live.requests[0].tokens) + "\n"
    assert row["text"] == text_of(models / "student", whole.requests[0].tokens)
    assert "compiling…" in streamed.err
    assert "/student: float32, 1 x cpu" in streamed.err
    assert row["finish_reason"] in ("stop", "length")
    assert row["model"] == "student"
    cut = f"(student: cut by the limit after {LENGTH} tokens)" in streamed.err
    stops = load_tokenizer(models / "student").stop_ids
    assert cut == (live.requests[0].tokens[-1] not in stops)
    assert row["tokens"] == len(whole.requests[0].tokens)


def test_a_runs_folder_with_the_runs_settings(models, capsys):
    """Newest checkpoint, prompt style, temperature and length are the run's."""
    generate.main([f"--model={models / 'run'}", "--json", f"--prompt={QUESTION}"])
    command(models / "student", "--json", prompt=QUESTION, temperature=0, prompt_style="kdrl")
    run, folder = rows(capsys.readouterr().out)
    assert run["model"] == "run"
    assert run | {"model": ""} == folder | {"model": ""}


def test_a_file_of_prompts(models, tmp_path, capsys):
    """In order, each with its samples; by the same keys whatever is drawn at once."""
    lines = [{"id": f"q{i}", "problem": f"What is {i}+1?", "answer": "x"} for i in range(7)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "in.txt").write_text("\n\n".join(line["problem"] for line in lines) + "\n")
    options = {"samples": 2, "seed": 3}
    with recorded() as calls:
        command(models / "student", file="in.jsonl", batch=2, **options)
    said = capsys.readouterr()
    found = rows(said.out)
    order = [(f"q{i}", g) for i in range(7) for g in (0, 1)]
    assert [(r["id"], r["sample"]) for r in found] == order
    assert "4 of 7 prompts" in said.err
    with recorded() as others:
        command(models / "student", file="in.txt", output="sub/out.jsonl", **options)
    assert capsys.readouterr().out == ""
    again = rows((tmp_path / "sub" / "out.jsonl").read_text())
    drawn_as_asked(models / "student", *calls, *others)
    few, many = ([r for call in some for r in call.requests][:14] for some in (calls, others))
    assert (len(calls), len(others)) == (2, 1)
    assert_same_requests(few, many)
    for answers, drawn in ((found, few), (again, many)):
        texts = [text_of(models / "student", r.tokens) for r in drawn]
        assert [r["text"] for r in answers] == texts
    assert [r["id"] for r in again[::2]] == [f"in/{i}" for i in range(1, 15, 2)]
    assert {*found[0]} == {
        *("id", "sample", "model", "prompt", "text", "tokens", "finish_reason"),
    }
    assert len({r["text"] for r in found}) > 7, "samples differ"


def test_beside_another_model_with_log_probs(models, capsys, monkeypatch):
    """Each model's tokens are scored by the other as that one would have scored its own."""
    where = {"prompt": QUESTION, "beside": models / "teacher", "temperature": 0.7}
    command(models / "student", "--json", "--logprobs", **where)
    by_student, by_teacher = rows(capsys.readouterr().out)
    assert [by_student["model"], by_teacher["model"]] == ["student", "teacher"]
    for row, name in ((by_student, "beside_log_prob"), (by_teacher, "log_prob")):
        other = NumpyDecoder(models / ("teacher" if row is by_student else "student"))
        tokenizer = load_tokenizer(models / "student")
        ids = encode_prompt(Problem("", QUESTION, ""), tokenizer, "chat")
        for token in row["log_probs"]:
            scores = log_softmax(other.logits(ids)[: tokenizer.size] / 0.7)
            assert token[name] == pytest.approx(scores[token["id"]], abs=1e-4)
            ratio = token["log_prob"] - token["beside_log_prob"]
            assert token["log_ratio"] == pytest.approx(ratio)
            ids.append(token["id"])
    answered: list[Said] = []

    def spy(*args, **options):
        answered.extend(ask(*args, **options))
        return answered

    monkeypatch.setattr("kdrl_jax.generation.screen.ask", spy)
    with recorded() as calls:
        command(models / "student", "--logprobs", **where)
    shown = capsys.readouterr().out
    for name, call in zip(("student", "teacher"), calls, strict=True):
        drawn_as_asked(models / name, call)
    texts = [text_of(models / "student", call.requests[0].tokens) for call in calls]
    assert shown.startswith(f"--- student\n{texts[0]}\n--- teacher\n{texts[1]}")
    assert "½ℓ²" in shown
    one = answered[0].tokens[0]
    assert f"{one['log_prob']:.3f}" in shown
    assert f"{one['log_ratio']:+.3f}" in shown


def test_the_same_model_beside_itself_differs_by_rounding(models, capsys):
    shutil.copytree(models / "student", "twin", dirs_exist_ok=True)
    command(models / "student", "--json", "--logprobs", prompt=QUESTION, beside="twin")
    for row in rows(capsys.readouterr().out):
        assert max(abs(t["log_ratio"]) for t in row["log_probs"]) < 1e-4


def test_devices_may_share_the_layers(models, capsys):
    with recorded() as calls:
        for tensor in (1, 2):
            command(models / "student", "--json", prompt=QUESTION, temperature=0, tensor=tensor)
    said = capsys.readouterr()
    assert "/student: float32, 2 x cpu" in said.err
    for row, call in zip(rows(said.out), calls, strict=True):
        drawn_as_asked(models / "student", call)
        assert row["text"] == text_of(models / "student", call.requests[0].tokens)


def test_everything_wrong_is_said_at_once(models, tmp_path, capsys):
    (tmp_path / "there.jsonl").write_text("")
    (tmp_path / "in.jsonl").write_text('{"problem": [5]}\n{"x": 1}\n{"problem": "fine"}')
    wrong = [f"--model={models / 'student'}", "--file=in.jsonl", "--output=there.jsonl"]
    wrong += ["--temperature=-1", "--top_p=0", "--samples=0", "--tensor=3", "--batch=0"]
    with pytest.raises(SystemExit):
        run_entry(lambda: generate.main(wrong))
    lines = capsys.readouterr().err.splitlines()
    for start in (
        "--temperature: -1.0 must not be negative",
        "--top_p: 0.0 must be above 0",
        "--samples: 0 must be at least 1",
        "--batch: 0 must be at least 1",
        "--tensor: 3 does not divide",
        "in.jsonl:1: 'problem' is an array, not text or a number; fill it in, or name another",
        "in.jsonl:2: has no text in 'problem' or 'prompt'; name its column with --config.data.",
        "--output: there.jsonl exists; give a new file",
    ):
        assert any(line.startswith(f"error: {start}") for line in lines), (start, lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "--model: no folder nowhere"),
        ({"beside": "nowhere"}, "--beside: no folder nowhere"),
        (
            {"prompt": "word " * 500},
            "prompt: the prompt has .* tokens, the model a window",
        ),
        ({"prompt": "  "}, "--prompt: is empty"),
        ({"prompt_style": "kdlr"}, "'kdlr' is unknown; .*the nearest is 'kdrl'"),
        ({"output": "x.jsonl"}, "--output: is for the rows of --file or --json"),
        ({"file": "x.txt"}, "--prompt and --file: give one of them"),
        ({"config.steps": 3}, r"--config\.steps=3: of a config this command takes data\.fields"),
        ({"config.data.fields.probelm": "x"}, r"no such key; the nearest is data\.fields\.problem"),
    ],
)
def test_what_cannot_be_asked(models, changes, message):
    options = {"model": str(models / "student"), "prompt": QUESTION} | changes
    with pytest.raises(Exception, match=message) as caught:
        generate.main([f"--{k}={v}" for k, v in options.items()])
    assert type(caught.value).__name__ == "UserError"


def test_models_of_other_tokenizers_answer_but_are_not_compared(models, tmp_path, capsys):
    shutil.copytree(models / "teacher", tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace("<think>", "<thonk>"))
    where = {"prompt": QUESTION, "beside": tmp_path / "other"}
    with pytest.raises(Exception, match=r"--logprobs --beside: token id .* differ"):
        command(models / "student", "--logprobs", **where)
    command(models / "student", **where)
    assert "--- other\n" in capsys.readouterr().out


def test_prompts_stand_in_whatever_column(tmp_path):
    """As the data of a run: the same kinds of files, nested names, numbers, and verl's rows."""
    rows = [{"q": {"text": f"What is {i}?"}, "uid": i, "gold": i, "n": i} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "in.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    for name in ("in.jsonl", "in.json", "in.parquet", "in.p*"):
        found = read_prompts(str(tmp_path / name), ["q.text"], "uid")
        assert [(p.id, p.problem) for p in found] == [(str(i), f"What is {i}?") for i in range(3)]
        assert [p.meta["gold"] for p in found] == [0, 1, 2]
    assert [p.problem for p in read_prompts(str(tmp_path / "in.jsonl"), ["n"])] == ["0", "1", "2"]
    both = read_prompts(str(tmp_path / "in.jsonl"), ["question", "n"])
    assert [p.id for p in both] == ["in/1", "in/2", "in/3"]
    verl = {"prompt": [{"role": "user", "content": "Why?"}], "reward_model": {"ground_truth": "1"}}
    (tmp_path / "verl.jsonl").write_text(json.dumps(verl))
    assert [p.problem for p in read_prompts(str(tmp_path / "verl.jsonl"))] == ["Why?"]
    with pytest.raises(Exception, match="has no text in 'x'; name its column with --config"):
        read_prompts(str(tmp_path / "in.jsonl"), ["x"])


def test_columns_are_those_given_or_the_runs(models, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"question": "What is 1+1?", "prompt": "Why?"}')
    option = "--config.data.fields.problem=question"
    command(models / "student", option, file="in.jsonl")
    command(models / "student", file="in.jsonl")
    shutil.copytree(models / "run", tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    saved["data"]["fields"] = {"problem": "question", "answer": "gold", "id": "id"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    generate.main([f"--model={tmp_path / 'run'}", "--file=in.jsonl"])
    (tmp_path / "in.txt").write_text("What is 2+2?")
    (tmp_path / "other.jsonl").write_text('{"problem": "How?"}')
    generate.main([f"--model={tmp_path / 'run'}", "--file=other.jsonl"])
    found = [row["prompt"] for row in rows(capsys.readouterr().out)]
    assert found == ["What is 1+1?", "Why?", "What is 1+1?", "How?"]


# --- from a pipe ---------------------------------------------------------------------------------


def piped(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_a_pipe_is_one_prompt_or_with_chat_a_turn_a_line(models, monkeypatch, capsys):
    asked: list[list[int]] = []
    answer = Sampler.answer

    def spy(self, prompts, numbers, **options):
        asked.append(prompts[0])
        return answer(self, prompts, numbers, **options)

    monkeypatch.setattr(Sampler, "answer", spy)
    chat = load_tokenizer(models / "student").chat
    piped(monkeypatch, "Hi\n\nAnd 2+2?\n")
    command(models / "student")
    assert asked == [chat([{"role": "user", "content": "Hi\n\nAnd 2+2?"}])]
    capsys.readouterr()
    asked.clear()
    piped(monkeypatch, "Hi\n\nAnd 2+2?\n/reset\nHi\n/quit\nno\n")
    command(models / "student", "--chat")
    assert len(asked) == 3
    said = capsys.readouterr()
    hi = [{"role": "user", "content": "Hi"}]
    assert asked[0] == asked[2] == chat(hi)
    assert asked[1][: len(asked[0])] == asked[0], "the first turn goes before the second"
    assert len(asked[1]) > len(chat([*hi, {"role": "user", "content": "And 2+2?"}]))
    assert "forgotten" in said.err
    assert "> " not in said.out
    assert "/help" not in said.out + said.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt=x"], "--chat and --prompt: give one of them"),
        (["--file=x.txt"], "--chat and --file: give one of them"),
        (["--json"], "--json: not in a conversation"),
        (["--samples=2"], "--samples=2: not in a conversation"),
    ],
)
def test_what_does_not_go_with_chat(models, monkeypatch, more, message):
    piped(monkeypatch, "Hi\n")
    Path("x.txt").write_text("x")
    with pytest.raises(Exception, match=message) as caught:
        command(models / "student", "--chat", *more)
    assert type(caught.value).__name__ == "UserError"


def test_a_real_pipe_is_answered_turn_by_turn(models, tmp_path):
    """The program itself: the first answer comes while the pipe is open, before the next turn."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags()}
    argv = [sys.executable, "-m", "kdrl_jax.generate", f"--model={models / 'student'}", "--chat"]
    argv += ["--max_new_tokens=4", "--prompt_style=chat", "--temperature=0"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(argv, cwd=tmp_path, env=env, **pipes)
    try:
        process.stdin.write(b"Hi\n")
        process.stdin.flush()
        first = process.stdout.readline()
        assert first.endswith(b"\n")
        assert process.poll() is None
        rest, errors = process.communicate(b"/reset\nHi\n", timeout=HANG_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    answers = (first + rest).decode()
    half = len(answers) // 2
    assert answers[:half] == answers[half:], "the likeliest answer, twice"
    assert answers.endswith("\n")
    assert b"Traceback" not in errors


# --- at a terminal -------------------------------------------------------------------------------


def test_two_answers_stand_beside_each_other_on_a_wide_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=12)
    with Columns(console, ["one", "two"]) as columns:
        columns.add(0, "left [bold]answer[/bold] " * 40)
        columns.add(1, "right answer ")
    final = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).split("one")[-1]
    line = next(x for x in final.splitlines() if "right answer" in x)
    assert line.index("left [bold]") < 50 < line.index("right answer")
    assert final.count("left") == 40, "the whole answer stays on the screen"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_compiling_is_visible(stream):
    out = stream()
    with CompileNotice(out) as notice:
        jax.block_until_ready(jax.jit(lambda x: x * 3 + 41)(np.arange(7)))
        assert "compiling…" in out.getvalue()
        notice.clear()
        said = out.getvalue()
        assert said.endswith("\x1b8\x1b[J" if out.isatty() else " s\n")
        notice.clear()
        assert out.getvalue() == said
    jax.block_until_ready(jax.jit(lambda x: x * 5 + 43)(np.arange(7)))
    assert out.getvalue() == said


class Lines:
    """What somebody types."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, type):
            raise line
        return line


def talk(samplers, *lines, style="chat", log=None, answering=None):
    said: list[str] = []
    names = [s.name for s in samplers]
    screen = Screen(samplers, names, False, CompileNotice(io.StringIO()))
    converse(samplers, style, answering or screen.answer, said.append, Lines(*lines))
    return "\n".join(said)


def test_a_conversation_remembers_until_it_is_reset(student, monkeypatch, capsys):
    asked: list[list[int]] = []
    texts: list[str] = []
    answer = Sampler.answer

    def spy(self, prompts, numbers, **options):
        asked.append(prompts[0])
        found = answer(self, prompts, numbers, **options)
        texts.append(found[0][0].text)
        return found

    monkeypatch.setattr(Sampler, "answer", spy)
    typed = ("Hi", "And 2+2?", "", "/reset", "/x", KeyboardInterrupt, "Hi", "/quit", "no")
    said = talk([student], *typed)
    assert "no command /x" in said
    assert "forgotten" in said
    chat = student.tokenizer.chat
    first = [{"role": "user", "content": "Hi"}]
    second = [*first, {"role": "assistant", "content": texts[0]}]
    second.append({"role": "user", "content": "And 2+2?"})
    assert asked == [chat(first), chat(second), chat(first)]
    assert texts[2] != texts[0], "another turn draws anew"
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in texts)


def test_a_conversation_that_outgrows_the_window_goes_on(student):
    said = talk([student], "word " * 200, "Hi", "word " * 150, "/reset")
    assert re.search(r"error: the prompt has \d+ tokens, student a window of 192; shorten it", said)
    assert "/reset forgets what was said" in said
    assert said.endswith("forgotten")


def test_texts_without_a_template_have_no_past(student, capsys):
    asked = []

    def answering(prompts, turn, check):
        asked.append(prompts[0][0])
        return []

    talk([student], "one", "two", style="plain", answering=answering)
    assert asked == [student.tokenizer.encode(x) for x in ("one", "two")]


def test_ctrl_c_stops_the_answer_and_not_the_program(student, monkeypatch, capsys):
    """After the first text; what was said stays, and the next answer is a whole one."""
    answer, found = Sampler.answer, []

    def interrupted(self, prompts, numbers, *, on_text, **options):
        def tell(request, text):
            if len(found) == 0:
                os.kill(os.getpid(), signal.SIGINT)
            on_text(request, text)

        got = answer(self, prompts, numbers, on_text=tell, **options)
        found.append(got[0][0])
        return got

    monkeypatch.setattr(Sampler, "answer", interrupted)
    before = signal.getsignal(signal.SIGINT)
    said = talk([student], "Hi", "/reset", "Hi")
    assert signal.getsignal(signal.SIGINT) is before
    assert found[0].finish_reason == "interrupted"
    assert len(found[0].tokens) == LIVE_CHUNK
    assert found[1].finish_reason in ("stop", "length")
    assert "forgotten" in said
    error = capsys.readouterr().err
    assert f"(student: stopped after {LIVE_CHUNK} tokens)" in error
    # The first tokens are those that an answer left alone begins with.
    monkeypatch.undo()
    chat = student.tokenizer.chat([{"role": "user", "content": "Hi"}])
    (whole,), _ = student.answer([chat], [0], turn=0)
    assert whole.tokens[:LIVE_CHUNK] == found[0].tokens
    np.testing.assert_allclose(whole.log_probs[:LIVE_CHUNK], found[0].log_probs, atol=1e-5)


def test_a_real_terminal(models, tmp_path):
    """The program itself, at a pseudo-terminal: a question, Ctrl-C, an answer, and leaving."""
    master, slave = pty.openpty()
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm",
        "COLUMNS": "80",
        "XLA_FLAGS": xla_flags(),
    }
    argv = [sys.executable, "-m", "kdrl_jax.generate", f"--model={models / 'student'}"]
    argv += ["--max_new_tokens=12", "--prompt_style=chat"]
    files = {"stdin": slave, "stdout": slave, "stderr": slave}
    process = subprocess.Popen(argv, cwd=tmp_path, env=env, start_new_session=True, **files)
    os.close(slave)
    seen = ""

    def until(text: str, times: int, signals: int = 0) -> None:
        """Read on; a signal is sent again, for one just before the wait is not heard in it."""
        nonlocal seen
        end = time.monotonic() + HANG_S
        while seen.count(text) < times:
            assert time.monotonic() < end, f"waited for {text!r}; seen so far: {seen}"
            if signals:
                process.send_signal(signals)
            if select.select([master], [], [], 5.0)[0]:
                seen += os.read(master, 4096).decode(errors="replace")

    try:
        until("> ", 1)
        os.write(master, b"Hi\n")
        until("> ", 2)
        assert "compiling…" in seen
        until("/quit or Ctrl-D leaves", 1, signal.SIGINT)  # while it waits for a line
        os.write(master, b"/quit\n")
        assert process.wait(timeout=HANG_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert "Traceback" not in seen
