"""Everything that the shipped configs read from the hub, tiny, under the very names and commits."""

import io
import json
from pathlib import Path

import pyarrow
from hub_content import tiny_model
from local_hub import LocalHub
from pyarrow import parquet

from configs import sources
from kdrl_jax.evaluation.benchmarks import BENCHMARKS

R1 = "DeepSeek-R1-Distill-Qwen-"
QWEN3 = (sources.QWEN3_0_6B, sources.QWEN3_8B)


def model_names() -> list[str]:
    """The models that configs/sources.py names."""
    texts = [x for name, x in vars(sources).items() if name.isupper() and isinstance(x, str)]
    return [text for text in texts if "://" not in text]


def publish(hub: LocalHub, folder: Path) -> None:
    """Serve all models, training problems and held-out problems."""
    for i, text in enumerate(model_names()):
        name, _, commit = text.partition("@")
        kind = "qwen3" if text in QWEN3 else "llama" if "SmolLM" in text else "qwen2"
        made = tiny_model(folder / str(i), kind=kind, sharded=i % 2 == 1, seed=i)
        extra = {"pytorch_model.bin": b"not to be read" * 9, "modeling_own.py": b"raise SystemExit"}
        hub.add_model(name, made, commit=commit or None, extra=extra)
    rows = [_skywork(i) for i in range(8)]
    _add(hub, sources.SKYWORK, {"data/math-00000-of-00001.parquet": _parquet(rows)})
    easy = [
        {"problem": f"What is {i}+{i}?", "answer": str(2 * i), "solution": ""} for i in range(8)
    ]
    _add(hub, sources.DEEPSCALER, {"deepscaler.json": json.dumps(easy).encode()})
    for name, path in (
        ("aime24", "data/train-00000-of-00001.parquet"),
        ("math500", "data/test-00000-of-00001.parquet"),
    ):
        benchmark = BENCHMARKS[name]
        content = {path: _parquet([{"id": i, **row} for i, row in enumerate(easy)])}
        hub.add("dataset", benchmark.hub, content, commit=benchmark.revision)


def _add(hub: LocalHub, source: str, files: dict[str, bytes]) -> None:
    """Serve a data set under the name and the commit of an hf:// address."""
    name = source.removeprefix("hf://").partition("?")[0]
    hub.add_dataset(name, files, commit=source.rpartition("revision=")[2])


def _skywork(i: int) -> dict:
    return {
        "data_source": "train-math-deepscaler",
        "prompt": [{"content": f"What is {i} + 1?", "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": json.dumps([str(i + 1)]), "style": "rule"},
        "extra_info": {
            "index": i,
            "model_difficulty": {R1 + "1.5B": 4, R1 + "7B": 2, R1 + "32B": 0},
        },
    }


def _parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()
