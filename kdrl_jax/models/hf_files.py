"""The files of a Hugging Face checkpoint folder: found, opened and checked, no weight read yet."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kdrl_jax.models.checksums import escapes, verify_files
from kdrl_jax.models.config import ModelConfig
from kdrl_jax.models.hf_table import DTYPES, IGNORED, HFArray, Row, table_rows
from kdrl_jax.models.qwen import Decoder
from kdrl_jax.types import UserError, merged

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_LISTED = 20


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The model that `folder`'s config.json describes.

    Raises:
      UserError: there is no such file, or it asks for something that this decoder does not do.
    """
    file = Path(folder) / "config.json"
    return ModelConfig.from_hf(read_json(file), source=str(file))


def load_eos_ids(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """Token ids that end a response: of generation_config.json, else of config.json; or ()."""
    for name in ("generation_config.json", "config.json"):
        file = Path(folder) / name
        ids = read_json(file).get("eos_token_id") if file.exists() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


@contextlib.contextmanager
def open_hf(folder: str | os.PathLike[str]) -> Iterator[tuple[ModelConfig, dict[str, HFArray]]]:
    """The model of a checkpoint folder and its weights by path, to be read piece by piece.

    The files stay open as long as the context; only their headers are read, but for the first time
    that a process opens a folder with SHA256SUMS: then they are compared with it.

    Raises:
      UserError: files are missing, unreadable or not those of SHA256SUMS, or tensors are missing,
        surplus or misshapen; all such tensors by name, at once.
    """
    folder = Path(folder)
    config = load_config(folder)
    rows = table_rows(config, Decoder(config).shapes())
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _check_tensors(folder, config, rows, tensors)
        count = config.num_layers
        yield (
            config,
            {p: HFArray(row, [tensors[t] for t in row.tensors(count)]) for p, row in rows.items()},
        )


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Lazy slices of all tensors in `folder` by name; the files close with `stack`."""
    listed: dict[str, str] = {}
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map") or {}
        if not isinstance(listed, dict):
            raise UserError(f"{folder / INDEX}: weight_map is no object; download it again")
        if wrong := [x for x in listed.values() if not isinstance(x, str)]:
            raise UserError(f"{folder / INDEX}: {wrong[0]!r} is no file's name; download it again")
        files = sorted(set(listed.values()))
    elif (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    else:
        raise UserError(
            f"{folder}: neither {WEIGHTS} nor {INDEX} found; save the checkpoint as safetensors"
        )
    problems = []
    for file in files:
        # Checked by the name, not by what it links to: download caches link to blobs elsewhere.
        if escapes(file):
            problems.append(f"{folder / INDEX}: file {file!r} lies outside the folder; refused")
        elif not file.endswith(".safetensors"):
            problems.append(f"{folder / INDEX}: file {file!r} is no .safetensors; save it as such")
        elif not (folder / file).is_file():
            problems.append(f"{folder / file}: missing, but listed in {INDEX}; download it again")
    if problems:
        raise UserError(*problems)
    verify_files(folder, [*files, *([INDEX] if listed else [])])

    tensors: dict[str, Any] = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(folder / file, framework="np"))
        except (SafetensorError, OSError) as error:
            problems.append(f"{folder / file}: unreadable ({error}); download it again")
            continue
        for name in handle.keys():  # noqa: SIM118  (not a dict)
            if name in tensors:
                problems.append(f"{folder / file}: {name} is in another file as well; keep one")
            tensors[name] = handle.get_slice(name)
    absent = [n for n in listed if n not in tensors] if not problems else []
    problems += limit_lines([f"{folder / INDEX}: {n} is listed but in no file" for n in absent])
    if problems:
        raise UserError(*problems)
    return tensors


def _check_tensors(
    folder: Path, config: ModelConfig, rows: dict[str, Row], tensors: dict[str, Any]
) -> None:
    """Raises UserError unless `tensors` are exactly those of `rows`, in shape and kind."""
    expected = {t: row.hf_shape for row in rows.values() for t in row.tensors(config.num_layers)}
    missing = [
        f"{folder}: {name} is missing; expected shape {list(shape)} by config.json"
        for name, shape in expected.items()
        if name not in tensors
    ]
    surplus = []
    for name in tensors:
        if name in expected or IGNORED.fullmatch(name):
            continue
        if name != HEAD or not config.tie_embeddings:
            surplus.append(f"{folder}: {name} is surplus; config.json describes no such tensor")
        elif EMBEDDING in tensors and not _same(tensors[HEAD], tensors[EMBEDDING]):
            surplus.append(
                f"{folder}: {HEAD} differs from {EMBEDDING}, but config.json ties them; "
                "set tie_word_embeddings to false"
            )
    misshapen = []
    for name, shape in expected.items():
        if name not in tensors:
            continue
        found = tuple(tensors[name].get_shape())
        if found != shape:
            misshapen.append(
                f"{folder}: {name} has shape {list(found)}; config.json asks for {list(shape)}"
            )
        kind = tensors[name].get_dtype()
        if kind not in DTYPES:
            misshapen.append(f"{folder}: {name} is {kind}; supported: {', '.join(DTYPES)}")
    problems = limit_lines(missing) + limit_lines(surplus) + limit_lines(misshapen)
    if problems:
        raise UserError(*problems)


def _same(a: Any, b: Any, rows: int = 4096) -> bool:
    """Whether two [V, D] slices hold the same bits, without reading either whole."""
    if a.get_shape() != b.get_shape() or a.get_dtype() != b.get_dtype():
        return False
    size = a.get_shape()[0]
    parts = [slice(start, min(start + rows, size)) for start in range(0, size, rows)]
    return all(a[part].tobytes() == b[part].tobytes() for part in parts)


def limit_lines(problems: list[str]) -> list[str]:
    """The first MAX_LISTED lines, those that are alike made one, and how many more there are."""
    problems = merged(problems)
    more = len(problems) - MAX_LISTED
    return problems if more <= 0 else [*problems[:MAX_LISTED], f"... and {more} more like these"]


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object at the top")
        return content
    except OSError:
        raise UserError(
            f"{file}: not found; give a folder with config.json and safetensors"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); download it again") from None


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
