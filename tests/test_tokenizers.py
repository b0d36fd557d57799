"""Tokenizers, pairs of them, and the prompts they make."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from tokenizer_cases import KDRL, PROBLEM, ZERO_RL, write_hf

from kdrl_jax.data import (
    PROMPT_STYLES,
    HFTokenizer,
    SentencePieceTokenizer,
    check_tokenizer_pair,
    encode_prompt,
    encode_prompts,
    load_tokenizer,
    shown_prompt,
)
from kdrl_jax.types import Problem, UserError

ALPHABET = "0123456789+-=, "


# --- Hugging Face tokenizers -------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """(folder, the `tokenizers` object that made it)."""
    folder = tmp_path_factory.mktemp("hf")
    return folder, write_hf(folder)


TEXTS = [
    KDRL,
    "  two  spaces\n\n and 1234567 digits ",
    "naïve — ∑ x² ≤ 5 \u2028 日本語 🙂",
    "<think>2+3=5</think>\\boxed{5}",
    "it 's , a . test",  # what "cleaning up spaces" would change
]


@pytest.mark.parametrize("text", TEXTS)
def test_hf_encodes_as_the_rust_library(hf, text):
    folder, rust = hf
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text)
    assert ids == rust.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(np.array(ids, np.int32)) == text


def test_hf_chat_is_that_of_transformers(hf):
    from transformers import AutoTokenizer

    messages = [
        {"role": "user", "content": "What is 2+3?"},
        {"role": "assistant", "content": "<think>2+3=5</think>5"},
        {"role": "user", "content": KDRL},
    ]
    theirs = AutoTokenizer.from_pretrained(hf[0])
    expected = theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    ids = load_tokenizer(hf[0]).chat(messages)
    assert ids == expected
    assert theirs.decode(ids).endswith("\\boxed{}.<|im_end|>\n<|im_start|>assistant\n")


def test_hf_ids(hf):
    folder, rust = hf
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.vocab() == rust.get_vocab(with_added_tokens=True)
    assert tokenizer.size == rust.get_vocab_size() == rust.token_to_id("<think>") + 1
    assert (tokenizer.eos_id, tokenizer.pad_id) == (0, 2)
    # The chat template's end of turn stops a completion although it is not the end token.
    assert tokenizer.stop_ids == (0, 2)
    assert tokenizer.start_ids == ()
    assert tokenizer.decode([0, *tokenizer.encode("5"), 2, 1]) == "5"


def test_a_prompt_is_shown_with_its_special_tokens(hf):
    """As transformers writes it, template and all; the line for a person keeps every line end."""
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(hf[0])
    ids = encode_prompt(PROBLEM, tokenizer, "kdrl")
    text = AutoTokenizer.from_pretrained(hf[0]).apply_chat_template(
        [{"role": "user", "content": KDRL}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.spell(ids) == text
    assert "<|im_start|>user\n" in text
    head, *lines = shown_prompt(PROBLEM, ids, tokenizer).split("\n")
    assert head == f"the first prompt ({PROBLEM.id}), {len(ids)} tokens, as the model gets it:"
    assert all(line.startswith("  | ") for line in lines)
    assert "\n".join(line[4:] for line in lines) == text


def test_a_sentencepiece_text_is_shown_with_its_end():
    tokenizer = SentencePieceTokenizer.train(ALPHABET)
    ids = [tokenizer.pad_id, *tokenizer.encode("<think>1+2=3"), tokenizer.eos_id]
    assert tokenizer.spell(ids) == "<pad><think>1+2=3</s>"
    assert tokenizer.spell([]) == ""


def test_stop_ids_of_generation_config_come_in_too(tmp_path):
    write_hf(tmp_path / "one", eos=1, template=None)
    assert load_tokenizer(tmp_path / "one").stop_ids == (0, 1)
    write_hf(tmp_path / "many", eos=[2, 7])
    assert load_tokenizer(tmp_path / "many").stop_ids == (0, 2, 7)
    write_hf(tmp_path / "only", eos=[2, 7], settings={"eos_token": None, "pad_token": None})
    only = load_tokenizer(tmp_path / "only")
    assert (only.eos_id, only.pad_id, only.stop_ids) == (2, 2, (2, 7))


def test_end_of_turn_is_taken_from_the_template_only_if_it_is_a_special_token(tmp_path):
    turn = "{% for m in messages %}<|im_start|>{{ m['content'] }}User:{% endfor %}"
    write_hf(tmp_path / "text", template=turn)
    assert load_tokenizer(tmp_path / "text").stop_ids == (0,)
    write_hf(tmp_path / "hidden", template="<|im_start|>{{ messages[0]['content'] }}")
    assert load_tokenizer(tmp_path / "hidden").stop_ids == (0,)
    write_hf(tmp_path / "broken", template="{{ raise_exception('no') }}")
    assert load_tokenizer(tmp_path / "broken").stop_ids == (0,)
    with pytest.raises(UserError, match="broken: the chat template fails: no; mend it"):
        load_tokenizer(tmp_path / "broken").chat([{"role": "user", "content": "a"}])


def test_start_token_goes_before_plain_text_only(tmp_path):
    rust = write_hf(tmp_path, start=True)
    tokenizer = load_tokenizer(tmp_path)
    bare = rust.encode(PROBLEM.problem, add_special_tokens=False).ids
    assert rust.encode(PROBLEM.problem).ids == [1, *bare, 0]
    assert tokenizer.start_ids == (1,)
    assert tokenizer.encode(PROBLEM.problem) == bare
    assert encode_prompts([PROBLEM], tokenizer, "plain", 99)[0] == [(PROBLEM, [1, *bare])]
    chat = tokenizer.chat([{"role": "user", "content": "a"}])
    assert chat[0] == 1
    assert chat[1] != 1


def test_tokenizer_json_outweighs_the_class_that_is_named_beside_it(tmp_path):
    """AutoTokenizer would rebuild it after Qwen2Tokenizer, which composes accents first."""
    rust = write_hf(tmp_path, settings={"tokenizer_class": "Qwen2Tokenizer"})
    tokenizer, text = load_tokenizer(tmp_path), "cafe\N{COMBINING ACUTE ACCENT}"
    assert tokenizer.encode(text) == rust.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_stored_truncation_cuts_nothing(tmp_path):
    rust = write_hf(tmp_path, settings={"model_max_length": 5})
    whole = rust.encode(KDRL).ids
    rust.enable_truncation(5)
    rust.enable_padding(length=9)
    rust.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(KDRL) == whole


def test_hf_survives_saving(tmp_path):
    rust = write_hf(tmp_path / "a", eos=[0, 5])
    first = load_tokenizer(tmp_path / "a")
    first.save(tmp_path / "b" / "model")
    first.save(tmp_path / "a")  # onto itself
    shutil.rmtree(tmp_path / "a")
    second = load_tokenizer(tmp_path / "b" / "model")
    second.save(tmp_path / "b" / "model")
    assert second.encode(KDRL) == rust.encode(KDRL).ids
    assert second.chat([{"role": "user", "content": "a"}])
    assert second.stop_ids == first.stop_ids == (0, 5, 2)
    check_tokenizer_pair(first, second)


def test_loading_is_lazy_and_quiet_without_torch(hf):
    """`transformers` is imported when it is needed; it need not tell us that torch is missing."""
    script = f"""
import importlib.util, os, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torch" else real(name, *a)
from kdrl_jax.data import load_tokenizer
assert "transformers" not in sys.modules
before = dict(os.environ)
assert load_tokenizer({str(hf[0])!r}).encode("a")
assert "transformers" in sys.modules and "torch" not in sys.modules
assert dict(os.environ) == before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- SentencePiece -----------------------------------------------------------------------------


def test_trained_sentencepiece_knows_its_alphabet_and_the_reasoning_pieces(capfd):
    tokenizer = SentencePieceTokenizer.train(ALPHABET)
    assert capfd.readouterr() == ("", "")
    vocab = tokenizer.vocab()
    assert tokenizer.size == len(vocab) == 3 + 4 + len(ALPHABET)
    assert sorted(vocab.values()) == list(range(tokenizer.size))
    pieces = ["<think>", "</think>", "\\boxed{", "}", *ALPHABET]
    for piece in pieces:
        assert tokenizer.encode(piece) == [vocab[piece.replace(" ", "▁")]]
    for first in pieces:
        for second in pieces:
            ids = tokenizer.encode(first + second)
            assert len(ids) == 2
            assert tokenizer.decode(ids) == first + second


def test_sentencepiece_changes_no_text(rng):
    tokenizer = SentencePieceTokenizer.train(ALPHABET + "ﬁⅣé\u00a0\tA.")
    for text in ("", " ", "  1 +  1 ", "ﬁ Ⅳ\u00a0\té", "<think>1+1=2</think>\\boxed{2}", "\t "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for _ in range(50):
        text = "".join(rng.choice(list(ALPHABET), 30))
        ids = tokenizer.encode(text)
        assert len(ids) == 30
        assert tokenizer.decode(np.array(ids)) == text


def test_sentencepiece_is_a_function_of_the_characters(tmp_path):
    tokenizer = SentencePieceTokenizer.train(ALPHABET)
    again = SentencePieceTokenizer.train(ALPHABET[::-1] + "00}")
    assert again.vocab() == tokenizer.vocab()
    for name, one in (("a", tokenizer), ("b", again)):
        one.save(tmp_path / name / "deep")
    files = [tmp_path / name / "deep" / "tokenizer.model" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    # Recorded: a run is continued, and a cached model used, under other versions as well.
    assert list(tokenizer.vocab()) == [
        *("<pad>", "</s>", "<unk>", "<think>", "</think>", "\\boxed{", "}"),
        *"+,-0123456789=▁",
    ]
    loaded = load_tokenizer(tmp_path / "a" / "deep")
    assert isinstance(loaded, SentencePieceTokenizer)
    assert loaded.vocab() == tokenizer.vocab()
    # An outside reader finds the same model in the file.
    reader = sentencepiece.SentencePieceProcessor(model_file=str(files[0]))
    assert reader.encode("1 + 2") == tokenizer.encode("1 + 2")


def test_sentencepiece_special_ids_leave_no_trace():
    tokenizer = SentencePieceTokenizer.train(ALPHABET)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 1, (1,))
    assert tokenizer.start_ids == ()
    five = tokenizer.encode("5")
    assert tokenizer.decode([0, *five, 1]) == "5"
    assert tokenizer.decode([*five, 2]) == "5\N{REPLACEMENT CHARACTER}"


def test_sentencepiece_model_of_another_make(tmp_path):
    """Llama's and Mistral's: a start token, no padding."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three"]),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="char",
        vocab_size=12,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.start_ids) == (2, 2, (1,))
    ids = encode_prompts([Problem("1", "one", "1")], tokenizer, "plain", 9)[0][0][1]
    assert ids == [1, *tokenizer.encode("one")]


def test_sentencepiece_refuses_what_it_cannot_write():
    tokenizer = SentencePieceTokenizer.train(ALPHABET)
    with pytest.raises(UserError) as caught:
        tokenizer.encode("1+x=y+x")
    assert str(caught.value) == (
        "built-in tokenizer: has no token for 'x', 'y' in '1+x=y+x'; "
        "use a tokenizer that covers the data"
    )
    for alphabet in ("", "}", "1▁"):
        with pytest.raises(ValueError, match="alphabet"):
            SentencePieceTokenizer.train(alphabet)


# --- Which tokenizer, which pair ---------------------------------------------------------------


def test_folders_without_a_tokenizer(tmp_path):
    for name, text in (
        ("absent", "no such folder; give a local folder with the model's files"),
        ("empty", "holds no tokenizer; put tokenizer.json or tokenizer.model there"),
    ):
        if name == "empty":
            (tmp_path / name).mkdir()
        with pytest.raises(UserError) as caught:
            load_tokenizer(tmp_path / name)
        assert caught.value.problems == [f"{tmp_path / name}: {text}"]


def test_broken_tokenizer_files(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match=f"{tmp_path}: unreadable tokenizer"):
        load_tokenizer(tmp_path)
    write_hf(tmp_path, settings={"eos_token": None}, template=None)
    with pytest.raises(UserError, match="has no end token; set eos_token in tokenizer_config"):
        load_tokenizer(tmp_path)


def test_pairs_that_agree(hf, tmp_path):
    student = load_tokenizer(hf[0])
    write_hf(
        tmp_path,
        eos=2,
        extra=["<tool>"],
        settings={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    )
    teacher = load_tokenizer(tmp_path)
    assert (teacher.eos_id, student.eos_id) == (2, 0)
    assert teacher.size == student.size + 1
    check_tokenizer_pair(student, teacher)  # it knows more, and ends texts otherwise
    with pytest.raises(UserError) as caught:
        check_tokenizer_pair(teacher, student)
    assert str(caught.value) == (
        f"teacher.path: token id {student.size} is '<tool>' to the student's tokenizer and "
        f"unknown to the teacher's (1 of {teacher.size} differ); "
        "use a teacher with the student's vocabulary"
    )


def test_pairs_that_differ_name_the_first_id():
    """A sorted alphabet: '5' is missing, so ids from there on have moved by one."""
    student = SentencePieceTokenizer.train("0123456789")
    teacher = SentencePieceTokenizer.train("01234678")
    first = student.encode("5")[0]
    with pytest.raises(UserError) as caught:
        check_tokenizer_pair(student, teacher)
    assert str(caught.value).startswith(
        f"teacher.path: token id {first} is '5' to the student's tokenizer and '6' to the "
        f"teacher's (5 of {student.size} differ)"
    )


# --- Prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "text"), [("kdrl", KDRL), ("zero_rl", ZERO_RL), ("chat", PROBLEM.problem)]
)
def test_chat_prompts(hf, style, text):
    folder, rust = hf
    kept, _ = encode_prompts([PROBLEM], load_tokenizer(folder), style, 999)
    whole = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert kept == [(PROBLEM, rust.encode(whole).ids)]
    assert rust.decode(kept[0][1], skip_special_tokens=False) == whole


def test_plain_prompts():
    tokenizer = SentencePieceTokenizer.train(ALPHABET)
    problem = Problem("1", "1+2=", "3")
    assert encode_prompts([problem], tokenizer, "plain", 9)[0] == [
        (problem, tokenizer.encode("1+2="))
    ]


def test_too_long_prompts_are_left_out_and_counted():
    tokenizer = SentencePieceTokenizer.train(ALPHABET)
    problems = [Problem(str(n), "1" * n, "1") for n in (3, 5, 4, 9, 1)]
    kept, report = encode_prompts(problems, tokenizer, "plain", 4)
    assert [(p.id, len(ids)) for p, ids in kept] == [("3", 3), ("4", 4), ("1", 1)]
    assert (report.kept, report.total, report.max_tokens) == (3, 5, 4)
    assert str(report) == "3 of 5 kept, 2 longer than 4 tokens"
    assert str(encode_prompts(problems, tokenizer, "plain", 9)[1]) == "all 5 kept"
    assert str(encode_prompts([], tokenizer, "plain", 9)[1]) == "all 0 kept"


def test_styles_that_cannot_be(tmp_path):
    write_hf(tmp_path, template=None)
    for style in sorted(set(PROMPT_STYLES) - {"plain"}):
        with pytest.raises(UserError) as caught:
            encode_prompts([PROBLEM], load_tokenizer(tmp_path), style, 99)
        assert str(caught.value) == (
            f"data.prompt_style: needs a chat template, which {tmp_path} lacks; "
            "use 'plain', or add chat_template.jinja"
        )
        with pytest.raises(UserError, match="which built-in tokenizer lacks; use 'plain'"):
            encode_prompts([PROBLEM], SentencePieceTokenizer.train("1"), style, 99)
    with pytest.raises(UserError) as caught:
        encode_prompts([PROBLEM], SentencePieceTokenizer.train("1"), "r1", 99)
    assert str(caught.value) == (
        "data.prompt_style: 'r1' is unknown; use one of kdrl, zero_rl, chat, plain"
    )
