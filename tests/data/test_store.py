# SPDX-License-Identifier: Apache-2.0
"""The token store: what goes in comes out, across every border; damage is an error."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from stores import read_documents, write_store

from lm_scale.data.arrays import CHUNK_TOKENS, reading
from lm_scale.data.parts import PartWriter
from lm_scale.data.store import Manifest, TokenStore, read_manifest
from lm_scale.errors import InputError

TINY = {"chunk_tokens": 8, "shard_tokens": 64}
PART = "s/parts/00000-00000"  # the only one of most of these
FACTS = {"tokenizer_hash": "abc", "separator": None, "source": {"part": "train"}}


def random_documents(count, *, seed=0, vocabulary=300):
    """Documents of 0 to 39 tokens."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 40, count)
    return [rng.integers(0, vocabulary, size) for size in sizes]


def write(path, *parts, vocab_size=300, **sizes) -> Manifest:
    return write_store(path, *parts, vocab_size=vocab_size, **(sizes or TINY), **FACTS)


def test_round_trip_across_chunks_and_shards(tmp_path):
    documents = random_documents(101)
    flat = np.concatenate(documents)
    assert flat.size > 20 * 64  # many shards, the last of them partial
    assert flat.size % 8
    manifest = write(tmp_path / "s", documents)
    store = TokenStore.open(tmp_path / "s")
    assert store.manifest == manifest
    assert (store.num_tokens, store.num_documents) == (flat.size, 101)
    np.testing.assert_array_equal(store.read(0, flat.size), flat)
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(read_documents(store, [i])[0], document)


@pytest.mark.parametrize("length", [1, 5, 8, 13, 64, 100])
def test_blocks_start_anywhere(tmp_path, length):
    documents = random_documents(50)
    flat = np.concatenate(documents)
    write(tmp_path / "s", documents)
    store = TokenStore.open(tmp_path / "s")
    last = flat.size - length
    starts = np.array([last, 0, 3, 3, 7, 8, 60, 64, 127, last - 1])
    blocks = store.read_blocks(starts, length)
    assert blocks.dtype == np.int32
    expected = np.stack([flat[start : start + length] for start in starts])
    np.testing.assert_array_equal(blocks, expected)


@pytest.mark.parametrize("size", [1, 8, 63, 64, 65, 128])
def test_one_document_of_exactly_a_border(tmp_path, size):
    write(tmp_path / "s", [np.arange(size)])
    np.testing.assert_array_equal(
        read_documents(TokenStore.open(tmp_path / "s"), [0])[0], np.arange(size)
    )


def test_default_sizes(tmp_path):
    documents = [np.arange(70_000) % 50_257, [1, 2, 3], []]
    write(tmp_path / "s", documents, vocab_size=50_257, chunk_tokens=CHUNK_TOKENS)
    store = TokenStore.open(tmp_path / "s")
    assert [read_documents(store, [i])[0].size for i in range(3)] == [70_000, 3, 0]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")],
)
def test_the_smallest_integers_that_hold_the_vocabulary(tmp_path, vocab_size, dtype):
    top = [0, vocab_size - 1]
    assert write(tmp_path / "s", [top], vocab_size=vocab_size).dtype == dtype
    metadata = json.loads((tmp_path / PART / "tokens/zarr.json").read_text())
    assert metadata["data_type"] == dtype
    assert TokenStore.open(tmp_path / "s").read(0, 2).tolist() == top


def test_reads_outside_are_errors(tmp_path):
    write(tmp_path / "s", [[1, 2, 3]])
    store = TokenStore.open(tmp_path / "s")
    for start, length in ((-1, 2), (2, 2), (0, 4)):
        with pytest.raises(IndexError, match="store of 3 tokens"):
            store.read(start, length)
    for index in (-1, 1):
        with pytest.raises(IndexError):
            read_documents(store, [index])[0]


def test_no_blocks_is_an_empty_array(tmp_path):
    write(tmp_path / "s", [[1, 2, 3]])
    empty = TokenStore.open(tmp_path / "s").read_blocks(np.array([], np.int64), 2)
    assert empty.shape == (0, 2)


def test_pickles_by_path_for_workers(tmp_path):
    write(tmp_path / "s", [[1, 2, 3]])
    store = pickle.loads(pickle.dumps(TokenStore.open(tmp_path / "s")))
    assert store.read(1, 2).tolist() == [2, 3]


def test_a_path_and_its_url_are_one_place(tmp_path, monkeypatch):
    folder = tmp_path / "a b%20ü"
    write(folder.as_uri() + "/s/", [[1, 2]])
    assert TokenStore.open(folder / "s").read(0, 2).tolist() == [1, 2]
    monkeypatch.chdir(folder)
    assert TokenStore.open("../a b%20ü/s").read(0, 2).tolist() == [1, 2]


def test_the_arrays_are_plain_zarr3(tmp_path):
    """Other readers of zarr find the sharding, and few files."""
    write(tmp_path / "s", random_documents(50))
    metadata = json.loads((tmp_path / PART / "tokens/zarr.json").read_text())
    assert metadata["zarr_format"] == 3
    (codec,) = metadata["codecs"]
    assert codec["name"] == "sharding_indexed"
    assert codec["configuration"]["chunk_shape"] == [8]
    tokens = metadata["shape"][0]
    shards = list(Path(tmp_path, PART, "tokens/c").iterdir())
    assert len(shards) == -(-tokens // 64)


def test_no_store_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        assert read_manifest(path) is None
        with pytest.raises(InputError, match="no complete token store"):
            TokenStore.open(path)


def test_an_incomplete_store_is_refused_and_can_be_written_again(tmp_path):
    path = tmp_path / "s"
    killed = PartWriter(path, 0, 0, np.dtype(np.uint8), **TINY)
    killed.append(np.full(200, 8), np.array([200]))
    assert (path / "parts/00000-00000/tokens/c/0").exists()
    with pytest.raises(InputError, match="cut short"):
        TokenStore.open(path)
    write(path, [[1, 2]])
    assert read_documents(TokenStore.open(path), [0])[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "has format 1; this version of lm_scale reads format 2"),
        ({"tokens": 5}, "is broken .its content does not fit its checksum"),
        ({"colour": "red"}, "is broken"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(tmp_path, change, message):
    write(tmp_path / "s", [[1, 2]])
    file = tmp_path / "s/manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        TokenStore.open(tmp_path / "s")


def test_arrays_of_another_size_are_damage(tmp_path):
    write(tmp_path / "s", [[1, 2]])
    write(tmp_path / "other", [[1, 2, 3], [4]])
    for name, said in (("tokens", "has 4 entries.*says 2"), ("offsets", "has 3 .*2")):
        (tmp_path / PART / name).rename(tmp_path / "away")
        (tmp_path / "other/parts/00000-00000" / name).rename(tmp_path / PART / name)
        with pytest.raises(InputError, match=f"is damaged: .*{name} {said}"):
            read_documents(TokenStore.open(tmp_path / "s"), np.array([0]))
        (tmp_path / "away").rename(tmp_path / "other/parts/00000-00000" / name)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_broken_manifests_are_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="is broken"):
        TokenStore.open(tmp_path)


def test_a_missing_array_is_damage(tmp_path):
    write(tmp_path / "s", [[1, 2]])
    (tmp_path / PART / "offsets/zarr.json").unlink()
    with pytest.raises(InputError, match="is damaged"):
        read_documents(TokenStore.open(tmp_path / "s"), np.array([0]))


def test_a_flipped_bit_is_an_error_not_a_token(tmp_path):
    write(tmp_path / "s", [np.arange(64)])
    shard = tmp_path / PART / "tokens/c/0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 4] ^= 1
    shard.write_bytes(content)
    store = TokenStore.open(tmp_path / "s")
    with pytest.raises(ValueError, match="shard|chunk|crc|CRC|Digest|digest"):
        store.read(0, 64)


def test_places_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read ftp://"):
        TokenStore.open("ftp://host/s")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        PartWriter(tmp_path / "file" / "s", 0, 0, np.dtype(np.uint8))


# --- Several parts --------------------------------------------------------------------


@pytest.mark.parametrize("place", ["path", "file://", "memory://"])
def test_parts_are_one_row_of_tokens(tmp_path, place):
    """Some parts hold no document, one document no token; blocks span several parts."""
    path = {
        "path": tmp_path / "s",
        "file://": (tmp_path / "s").as_uri(),
        "memory://": f"memory://{tmp_path.name}/s",
    }[place]
    documents = random_documents(60)
    parts = [[], documents[:7], [], [], documents[7:8], [[]], documents[8:], []]
    write(path, *parts)
    documents = [*documents[:8], np.empty(0, int), *documents[8:]]
    store = TokenStore.open(path)
    flat = np.concatenate(documents)
    assert (store.num_tokens, store.num_documents) == (flat.size, 61)
    for length in (1, 9, flat.size):
        starts = np.arange(flat.size - length + 1)[::-1]
        expected = np.stack([flat[start : start + length] for start in starts])
        np.testing.assert_array_equal(store.read_blocks(starts, length), expected)
    rng = np.random.default_rng(1)
    for which in (np.arange(61), rng.permutation(61), rng.integers(0, 61, 9), [60, 0]):
        for number, found in zip(which, read_documents(store, which), strict=True):
            np.testing.assert_array_equal(found, documents[number])
        sizes = [len(documents[number]) for number in which]
        assert store.lengths(which).tolist() == sizes


def test_far_apart_documents_of_a_part_are_read_one_by_one(tmp_path):
    documents = random_documents(500)
    write(tmp_path / "s", documents[:3], documents[3:])
    store = TokenStore.open(tmp_path / "s")
    far = np.array([499, 3, 0])
    for number, found in zip(far, read_documents(store, far), strict=True):
        np.testing.assert_array_equal(found, documents[number])


def test_parts_are_opened_when_they_are_read(tmp_path):
    write(tmp_path / "s", *[[[i]] * 10 for i in range(20)])
    for number in range(1, 20):
        shutil.rmtree(tmp_path / f"s/parts/{number:05d}-00000")
    store = TokenStore.open(tmp_path / "s")
    assert store.read(3, 7).tolist() == [0] * 7
    with pytest.raises(InputError, match="is damaged"):
        store.read(3, 8)


def test_the_hash_of_a_store_is_of_its_parts(tmp_path):
    first = write(tmp_path / "1", [[1, 2]], [[3]])
    assert first == write(tmp_path / "2", [[1, 2]], [[3]])
    for number, parts in enumerate(([[[1, 2]], [[4]]], [[[3]], [[1, 2]]], [[[1, 2]]])):
        assert write(tmp_path / f"o{number}", *parts).sha256 != first.sha256


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("gs://bucket/a", {"driver": "gcs", "bucket": "bucket", "path": "a/"}),
        ("s3://bucket/a/", {"driver": "s3", "bucket": "bucket", "path": "a/"}),
    ],
)
def test_the_spec_that_is_opened_in_a_cloud(url, expected):
    spec = ts.Spec(reading(url)).to_json()
    assert {name: spec["kvstore"][name] for name in expected} == expected
    assert spec["driver"] == "zarr3"
