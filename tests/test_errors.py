"""Errors as they are printed: alike lines are one, with a count and names."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from kdrl_jax.cli import EXIT_USER_ERROR, run_entry
from kdrl_jax.types import FEW_ALIKE, MOST_NAMED, UserError, merged


def lines(count: int) -> list[str]:
    return [f"rows.jsonl:{i}: 'answer' is empty; fill it in" for i in range(1, count + 1)]


def test_ten_alike_are_one() -> None:
    (line,) = merged(lines(10))
    assert line.startswith("rows.jsonl:1: 'answer' is empty; fill it in (and 9 more like it: rows.")
    assert line.count("rows.jsonl:") == 1 + MOST_NAMED
    assert line.endswith(", …)")
    (line,) = merged(lines(4))
    assert line.endswith("(and 3 more like it: rows.jsonl:2, rows.jsonl:3, rows.jsonl:4)")


def test_few_stay_as_they_are() -> None:
    assert merged(lines(FEW_ALIKE - 1)) == lines(FEW_ALIKE - 1)
    assert merged([]) == []
    assert merged(["a", "a"]) == ["a"]


def test_a_difference_within_a_line() -> None:
    told = [f"model: layers.{i}.q is missing; expected shape [4, 4] by config.json" for i in "0123"]
    (line,) = merged(told)
    assert line == f"{told[0]} (and 3 more like it: layers.1.q, layers.2.q, layers.3.q)"


def test_other_remedies_are_never_hidden() -> None:
    told = [f"mesh.data: {i} does not divide 12; the nearest is {i + 1}" for i in (5, 7, 9, 10)]
    assert merged(told) == told
    told = [f"mesh.data: 5 does not divide 12; the nearest is {i}" for i in (4, 6, 3, 2)]
    assert merged(told) == told
    told = [f"key.{i}: {i} must be positive" for i in range(5)]  # two words differ
    assert merged(told) == told


def test_order_is_kept() -> None:
    a, b = lines(5), ["steps: 0 must be at least 1", "seed: -1 must not be negative"]
    first, *rest = merged([a[0], b[0], *a[1:4], b[1], a[4]])
    assert first.startswith(a[0])
    assert rest == b


def test_a_user_error_reads_merged_and_keeps_all(monkeypatch, capsys) -> None:
    error = UserError(*lines(40))
    assert error.problems == lines(40)
    assert str(error).startswith(lines(1)[0] + " (and 39 more like it: rows.jsonl:2, ")

    def main() -> None:
        raise UserError(*lines(40), "steps: 0 must be at least 1")

    for option, count in ((), 2), (("--log=json",), 2):
        monkeypatch.setattr(sys, "argv", ["x.py", *option])
        with pytest.raises(SystemExit) as end:
            run_entry(main)
        assert end.value.code == EXIT_USER_ERROR
        said = capsys.readouterr()
        assert said.err.count("error: ") == count
        if option:  # a program gets every line
            events = [json.loads(line) for line in said.out.splitlines()]
            assert len(events[0]["problems"]) == 41


def test_weights_that_are_missing_are_a_line_for_each_kind(model_folder_without_layers) -> None:
    from kdrl_jax.models.hf_files import open_hf

    with pytest.raises(UserError) as error, open_hf(model_folder_without_layers):
        pass
    text = str(error.value)
    assert "(and 3 more like it: model.layers.1." in text
    assert "more like these" not in text
    assert len(text.splitlines()) < 15


@pytest.fixture
def model_folder_without_layers(tmp_path):
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.embed_tokens.weight": np.zeros((32, 8), np.float32),
        "model.norm.weight": np.zeros(8, np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path
