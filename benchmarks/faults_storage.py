"""What storage does to checkpoints, to a run: the second table of `faults.py`."""

import collections
import itertools
import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import jax
import numpy as np

from kdrl_jax.models import Decoder, load_config
from kdrl_jax.sharding import make_mesh
from kdrl_jax.training.checkpoints import ASIDE, CheckpointStore, stored_steps
from kdrl_jax.training.state import abstract_state, make_optimizer, make_schedule

Damage = Callable[[Path, random.Random], None]


def flip(file: Path, draw: random.Random) -> None:
    """One bit."""
    data = bytearray(file.read_bytes())
    bit = draw.randrange(len(data) * 8)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def cut(file: Path, draw: random.Random) -> None:
    """The end is missing."""
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data))])


def blank(file: Path, draw: random.Random) -> None:
    """A stretch of zeros, as where a block never reached the disk."""
    data = bytearray(file.read_bytes())
    begin = draw.randrange(len(data))
    end = min(len(data), begin + draw.randrange(1, 513))
    data[begin:end] = bytes(end - begin)
    file.write_bytes(data)


def remove(file: Path, draw: random.Random) -> None:
    """The file is missing."""
    file.unlink()


KINDS: dict[str, Damage] = {
    "bit flipped": flip,
    "truncated": cut,
    "zeros": blank,
    "missing": remove,
}


def table(output: Path, damages: int, seed: int) -> int:
    """Damage checkpoints and fill disks; how often something was lost."""
    place = faults.Place(output / "reference", output / "models", output / "programs")
    if not (place.work / "summary.json").exists():
        faults.strike(place, None, output / "log.txt")
    losses = 0
    damaged = _damaged(place.work, output / "copy", damages, seed)
    rows = itertools.chain(damaged, _full(place, seed, max(1, damages // 40)))
    with (output / "storage.jsonl").open("w") as results:
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        for row in rows:
            results.write(json.dumps(row) + "\n")
            results.flush()
            counts[row["what"], row["outcome"]] += 1
            losses += row["outcome"].startswith("LOST")
    print("\n| what | outcome | times |\n|---|---|---|")
    for (what, outcome), count in sorted(counts.items()):
        print(f"| {what} | {outcome} | {count} |")
    print(f"\nlosses = {losses}")
    return losses


def _like(work: Path) -> Any:
    """The state of the tiny run, abstract."""
    schedule = make_schedule(1e-3, 1, "constant", 1)
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.9, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return abstract_state(Decoder(load_config(work / "model")), optimizer, mesh)


def _bits(state: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def _damaged(work: Path, copy: Path, damages: int, seed: int) -> Iterator[dict[str, str]]:
    """The newest checkpoint's files changed one at a time, and restored with what is before it."""
    draw, like = random.Random(seed), _like(work)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(work / "checkpoints", copy / "checkpoints")
    newest, older = sorted(stored_steps(copy / "checkpoints"))[::-1][:2]
    whole = {newest: _bits(CheckpointStore(copy).restore(like)[0])}
    there = copy / "checkpoints" / str(newest)
    shutil.move(there, copy / "apart")
    whole[older] = _bits(CheckpointStore(copy).restore(like)[0])
    files = [p.relative_to(copy / "apart") for p in sorted((copy / "apart").rglob("*"))]
    files = [name for name in files if (copy / "apart" / name).is_file()]
    plan = [(kind, files[i % len(files)]) for kind in KINDS for i in range(damages)]
    plan = [x for i, x in enumerate(plan) if x[0] != "missing" or x not in plan[:i]]
    plan += [("half of the files", None)] * max(1, damages // 20)
    for kind, name in plan:
        shutil.copytree(copy / "apart", there)
        if name is None:
            for other in draw.sample(files, len(files) // 2):
                (there / other).unlink()
        elif (there / name).stat().st_size:
            KINDS[kind](there / name, draw)
        yield {"what": kind, "file": str(name), "outcome": _restored(copy, like, whole, newest)}
        for folder in (copy / "checkpoints").iterdir():
            if folder.name == str(newest) or folder.name.startswith(ASIDE):
                shutil.rmtree(folder)
    shutil.rmtree(copy)


def _restored(copy: Path, like: Any, whole: dict[int, list[bytes]], newest: int) -> str:
    said: list[str] = []
    store = CheckpointStore(copy)
    try:
        state, meta = store.restore(like, said.append)
    except Exception as error:
        return f"LOST: {type(error).__name__}: {str(error)[:100]}"
    finally:
        store.close()
    if _bits(state) != whole[meta["step"]]:
        return "LOST: other numbers than were saved"
    if meta["step"] == newest:
        return "harmless: same bits"
    return "seen, older one restored" if len(said) == 2 else "LOST: nothing said"


def _full(place: faults.Place, seed: int, times: int) -> Iterator[dict[str, str]]:
    """Disks of random sizes that fill up; with more room the run must end as if nothing were."""
    draw, reference = random.Random(seed), faults.outcome(place.work)
    used = sum(p.stat().st_blocks * 512 for p in place.work.rglob("*"))
    for i in range(times):
        size = draw.randint(used // 8, used) // 1024
        work = place.work.with_name(f"disk{i}")
        work.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k,mode=755", "none", str(work)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            yield {"what": "disk full", "file": "", "outcome": "not tried: may not mount here"}
            return
        try:
            small = faults.Place(work, place.models, place.programs)
            log = place.work.with_name(f"disk{i}.txt")
            first = faults.strike(small, None, log)
            told = "No space left" in log.read_text()
            remount = ["mount", "-o", "remount,size=100m", str(work)]
            subprocess.run(remount, check=True)
            again = faults.strike(small, None, log)
            wrong = faults.lost(work, reference)
            if wrong or again["exit"] != 0:
                outcome = f"LOST: {wrong or again}"
            elif first["exit"] == 2 and told:
                outcome = "told, exit 2; goes on with more room"
            else:
                outcome = "had room enough" if first["exit"] == 0 else f"LOST: {first}"
            yield {"what": "disk full", "file": f"{size} KiB", "outcome": outcome}
            subprocess.run(["mount", "-o", "remount,ro", str(work)], check=True)
            last = faults.strike(small, None, log)
            refused = last["exit"] == 2 and not faults.lost(work, reference)
            outcome = "refused, exit 2" if refused else f"LOST: {last}"
            yield {"what": "read-only", "file": "", "outcome": outcome}
        finally:
            subprocess.run(["umount", "-l", str(work)], check=False)
