"""Checksums of arrays see any bit, whatever the sharding; a sealed meta is what was saved."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdrl_jax.training import integrity
from kdrl_jax.training.integrity import Damaged, checksums, compare, read_meta, seal

TYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"]


def by_hand(x: np.ndarray) -> str:
    """The sum in Python's own integers, one element after the other."""
    words = x.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
    total = 0
    for place, word in enumerate(words.tolist()):
        place ^= place >> 16
        place = place * 0x7FEB352D % 2**32
        place ^= place >> 15
        place = place * 0x846CA68B % 2**32
        place ^= place >> 16
        total += word * (2 * place + 1)
    return f"{total % 2**32:08x}"


@pytest.mark.parametrize("dtype", TYPES)
def test_the_number_is_the_sum_written_out(dtype, rng):
    with np.errstate(invalid="ignore"):  # negative numbers as unsigned ones
        x = jnp.asarray((rng.normal(size=(3, 5, 7)) * 50).astype(jnp.dtype(dtype)))
    assert checksums({"a": {"b": x}}) == {"a/b": [[3, 5, 7], dtype, by_hand(np.asarray(x))]}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_the_numbers_of_blocks_add_up(dtype, rng):
    x = np.asarray(jnp.asarray(100 * rng.normal(size=(5, 6, 7))).astype(dtype))
    total = sum(
        integrity.number_of_block(x[a:b, c:d], (a, c, 0), x.shape)
        for a, b in ((0, 2), (2, 5))
        for c, d in ((0, 1), (1, 6))
    )
    assert total % 2**32 == integrity._number_of(jnp.asarray(x))


def test_every_single_bit_counts(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    whole = checksums({"x": jnp.asarray(x)})
    for place in range(x.size):
        for bit in range(32):
            flipped = x.copy()
            flipped.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
            assert checksums({"x": jnp.asarray(flipped)}) != whole


def test_what_moves_is_seen(rng):
    x = rng.normal(size=(4, 6)).astype(np.float32)
    moved = [x[::-1], np.roll(x, 1, axis=1), x.reshape(6, 4).T.reshape(4, 6), np.zeros_like(x)]
    found = {checksums([jnp.asarray(y)])["0"][2] for y in (x, *moved)}
    assert len(found) == 5


def test_the_split_over_devices_does_not_matter(rng):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    x = rng.normal(size=(8, 4, 6)).astype(np.float32)
    tree = {"x": x, "step": np.int32(7), "key": np.asarray(jax.random.key_data(jax.random.key(3)))}
    alone = checksums(jax.tree.map(jnp.asarray, tree))
    for spec in (P(), P("a"), P(None, "b"), P(("a", "b")), P("b", "a")):
        split = {
            "x": jax.device_put(x, NamedSharding(mesh, spec)),
            **{k: jax.device_put(tree[k], NamedSharding(mesh, P())) for k in ("step", "key")},
        }
        assert checksums(split) == alone
        compare(alone, split)


def test_random_keys_and_host_memory(rng):
    key = jax.random.key(3)
    assert checksums([key])["0"][2] == checksums([jax.random.key_data(key)])["0"][2]
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    there = jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
    assert checksums({"x": there, "y": x}) == checksums({"x": x, "y": x})
    with pytest.raises(Damaged, match="the checksum of x "):
        compare(checksums({"x": x + 1, "y": x}), {"x": there, "y": x})


def test_memory_beside_the_arrays():
    """The compiler's own account: on CPUs the products of one array, and nothing more."""
    shape = jax.ShapeDtypeStruct((1 << 20, 4), jnp.float32)  # 16 MiB
    found = integrity._program(None).lower(shape).compile().memory_analysis()
    assert found.temp_size_in_bytes < 18 << 20


def test_a_meta_is_what_was_sealed_or_refused(tmp_path):
    meta = {
        "step": 4,
        "data_position": 12,
        "trend": [0.1, None],
        "checksums": {"x": [[2], "a", "b"]},
    }
    file = tmp_path / "meta" / "metadata"
    file.parent.mkdir()
    text = json.dumps(seal(meta)).encode()
    file.write_bytes(text)
    assert read_meta(tmp_path) == meta
    for place in range(len(text)):
        for bit in range(8):
            changed = bytearray(text)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            try:
                found = read_meta(tmp_path)
            except Damaged:
                continue
            assert found == meta, changed
    for end in range(len(text)):
        file.write_bytes(text[:end])
        with pytest.raises(Damaged):
            read_meta(tmp_path)
    file.unlink()
    with pytest.raises(Damaged, match="missing"):
        read_meta(tmp_path)
    file.parent.rmdir()
    assert read_meta(tmp_path) is None


def test_a_meta_from_before_seals(tmp_path):
    old = {"step": 4, "seed": 0, "data_position": 12, "data": "x", "trend": [0.1, 0.2]}
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "metadata").write_text(json.dumps(old))
    assert read_meta(tmp_path) == old
