# SPDX-License-Identifier: Apache-2.0
"""Streams: every token once an epoch, and the same from any place that was saved."""

import dataclasses
import itertools
import json
import threading
from collections import Counter

import jax
import numpy as np
import pytest
from datasets.iterable_dataset import ArrowExamplesIterable

from lm_scale.data import corpus, stream, units
from lm_scale.data import shards as shards_module
from lm_scale.data.ahead import Ahead
from lm_scale.data.corpus import CorpusConfig, documents
from lm_scale.data.encoding import Tokens
from lm_scale.data.shards import Shards
from lm_scale.data.stream import Lane
from lm_scale.data.streamed import StreamedBatches, merged
from lm_scale.errors import InputError, SourceLost
from lm_scale.objectives import IGNORE, CausalLM, MaskedLM, Vocabulary
from lm_scale.sharding import MeshShape, Rules, make_mesh

VOCABULARY = Vocabulary(size=100_000, special_ids=(0, 1, 2), mask_id=2)
ROWS = (11, 7, 9, 5)  # of each shard
LENGTH = 8


def numbered(texts):
    """Document 17 -> 17_00, 17_01 ...: one to seven tokens, each told from all."""
    return [[100 * int(t) + i for i in range(int(t) % 7 + 1)] for t in texts]


def encode(given):
    rows = numbered(given.texts)
    return Tokens(np.concatenate(rows), np.array([len(row) for row in rows]))


class Numbers:
    """Shards whose documents are 1, 2, 3 ...; some rows hold none."""

    source = "numbers"

    def __init__(self, rows=ROWS):
        ends = np.cumsum((1, *rows))
        self.shards = [
            [None if n % 6 == 0 else str(n) for n in range(a, b)]
            for a, b in itertools.pairwise(ends)
        ]
        self.count = len(rows)

    def texts(self, shard, row, stopped):
        for at, text in enumerate(self.shards[shard][row:], row):
            if text is not None:
                yield at, text

    def tokens(self):
        texts = [t for shard in self.shards for t in shard if t is not None]
        return list(itertools.chain(*numbered(texts)))


TOKENS = len(Numbers().tokens())


@pytest.fixture
def lane():
    """Makes lanes, and closes them at the end."""
    made = []

    def make(shards=None, *, number=0, of=1, seed=0, buffer=6, length=LENGTH, **more):
        made.append(
            Lane(
                shards or Numbers(), encode, number=number, of=of, seed=seed,
                buffer=buffer, length=length, **more,
            )
        )  # fmt: skip
        return made[-1]

    yield make
    for one in made:
        one.close()


# --- Lanes ----------------------------------------------------------------------------


def test_each_epoch_has_every_token_once_in_another_order(lane):
    one = lane(length=1)
    epochs = [one.take(TOKENS)[:, 0].tolist() for _ in range(3)]
    for tokens in epochs:
        assert sorted(tokens) == sorted(Numbers().tokens())
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] == lane(length=1).take(TOKENS)[:, 0].tolist()
    assert epochs[0] != lane(length=1, seed=1).take(TOKENS)[:, 0].tolist()


def test_documents_stay_whole(lane):
    tokens = lane(length=TOKENS).take(1)[0]
    starts = np.flatnonzero(tokens % 100 == 0)
    for document in np.split(tokens, starts[1:]):
        assert document.tolist() == numbered([str(document[0] // 100)])[0]


def test_from_any_place_it_goes_on_the_same(lane):
    """Also in a document, in a window, and across two ends of an epoch."""
    examples = 2 * TOKENS // LENGTH + 3
    straight = lane()
    places, taken = [straight.position], []
    for _ in range(examples):
        taken.append(straight.take(1)[0])
        places.append(straight.position)
    taken.extend(straight.take(2))
    assert {place.epoch for place in places} == {0, 1, 2}
    assert {place.window for place in places} >= {0, 1, 2}
    assert len({place.token for place in places}) > 3
    for number, place in enumerate(places):
        resumed = lane(position=place)
        assert resumed.position == place
        np.testing.assert_array_equal(resumed.take(2), taken[number : number + 2])
        resumed.close()


def test_a_window_ends_early_where_documents_are_long(lane, monkeypatch):
    whole = lane(length=1, buffer=1000).take(TOKENS)[:, 0]
    monkeypatch.setattr("lm_scale.data.stream.WINDOW_CHARACTERS", 9)
    cut = lane(length=1, buffer=1000)
    assert sorted(whole) == sorted(cut.take(TOKENS)[:, 0])
    assert cut.position.window > 3


def test_a_long_document_is_encoded_in_pieces(monkeypatch):
    """It keeps its number, and its neighbours theirs, from whichever one it goes on."""
    monkeypatch.setattr("lm_scale.data.texts.PIECE", 3)
    monkeypatch.setattr("lm_scale.data.texts.BATCH_CHARACTERS", 3)
    given = []

    def characters(texts):
        given.append(texts)
        rows = [list(map(ord, text)) for text in texts.texts]
        ids = np.array(sum(rows, []), np.uint16)
        return Tokens(ids, np.array(list(map(len, rows))))

    texts = ["first", "a", "b", "12 45 789", "c"]
    for first in range(len(texts)):
        found = list(stream._tokens(texts, first, characters))
        wanted = list(enumerate(texts))[first:]
        assert [(i, "".join(map(chr, ids))) for i, ids in found] == wanted
        assert all(ids.dtype == np.int32 for _, ids in found)
    assert ["a", "b"] in [x.texts for x in given]
    assert [(x.begins, x.ends) for x in given if x.texts == ["12"]][0] == (True, False)


@pytest.mark.parametrize("of", [2, 3, 4])  # 3 does not divide the shards
def test_lanes_share_the_documents(lane, of):
    whole = Counter(Numbers().tokens())
    found = Counter()
    for number in range(of):
        one, tokens = lane(number=number, of=of, length=1), []
        while one.position.epoch == 0:
            tokens.append(int(one.take(1)[0, 0]))
        found.update(tokens[:-1])  # the last is of the next epoch
    assert found == whole


def test_too_little_text_is_told(lane):
    with pytest.raises(InputError, match="the stream of numbers holds no document"):
        lane(Numbers((0, 0))).take(1)
    few = Numbers((3,))
    with pytest.raises(InputError, match=r"has 9 tokens, fewer than one .* of 10"):
        lane(few, length=10).take(1)
    assert lane(few, length=9).take(2).shape == (2, 9)


# --- Batches --------------------------------------------------------------------------


def batches(*, lanes=2, objective=None, shards=None):
    return StreamedBatches(
        shards or Numbers(), encode, objective or CausalLM(), VOCABULARY,
        batch=4, seq_len=LENGTH, seed=3, lanes=lanes, buffer=6, tokens={},
    )  # fmt: skip


def host(steps, rows=range(4), place=None, *, start=0, left_out=(), **kind):
    made = batches(**kind).host_batches(
        rows, place, start=start, stop=start + steps, left_out=left_out
    )
    return list(made)


MLM = MaskedLM(probability=0.5)


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("parts", [([0, 1], [2, 3]), ([0], [1, 2], [3])])
def test_ranks_together_make_the_same_global_batch(lanes, parts):
    """Also after a resume with as many ranks, or one, from what all have saved."""
    kind = {"lanes": lanes, "objective": MLM}
    whole = host(9, **kind)
    ranks = [host(9, rows, **kind) for rows in parts]
    for step, (batch, place) in enumerate(whole):
        for rows, rank in zip(parts, ranks, strict=True):
            for name, value in rank[step][0].items():
                np.testing.assert_array_equal(value, batch[name][rows])
        assert merged([rank[step][1] for rank in ranks]) == place
    saved = json.loads(json.dumps(whole[4][1]))
    for rows in (*parts, range(4)):
        for (got, _), (batch, _) in zip(
            host(4, rows, saved, start=5, **kind), whole[5:], strict=True
        ):
            np.testing.assert_array_equal(got["tokens"], batch["tokens"][rows])
            np.testing.assert_array_equal(got["labels"], batch["labels"][rows])


def test_noise_changes_with_the_epoch():
    """One short document again and again: the numbers run on."""
    found = host(6, lanes=1, objective=MLM, shards=Numbers((4,)))
    masks = np.concatenate([batch["labels"] != IGNORE for batch, _ in found])
    assert len(np.unique(masks, axis=0)) > len(masks) // 2


def test_left_out_batches_are_passed_over():
    straight = host(9)
    for place, start in ((None, 0), (straight[0][1], 1)):
        got = host(7 - start, place=place, start=start, left_out=((2, 4),))
        wanted = [b for i, b in enumerate(straight) if i not in (2, 3)][start:]
        for (a, behind), (b, place) in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(a["tokens"], b["tokens"])
            assert behind == place


FIXED = MaskedLM(probability=0.3, fixed_count=True)


@pytest.mark.parametrize("objective", [CausalLM(), FIXED], ids=["causal", "fixed"])
def test_on_the_mesh_the_place_is_that_of_the_batch_taken_last(objective):
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    stream, expected = batches(objective=objective), host(5, objective=objective)
    assert ("masked_positions" in expected[0][0]) == (objective is FIXED)
    taken = stream.device_batches(mesh, Rules(), start=0, stop=5)
    for (batch, place), got in zip(expected, taken, strict=True):
        assert stream.reached == place and got["tokens"].shape == (4, LENGTH)
        for name, value in batch.items():
            np.testing.assert_array_equal(jax.device_get(got[name]), value)
    again = stream.device_batches(mesh, Rules(), start=5, stop=6)
    wanted = host(6, objective=objective)[5][0]["tokens"]
    np.testing.assert_array_equal(next(again)["tokens"], wanted)
    again.close()


def test_after_a_loss_enough_batches_come_to_end_in_order():
    class Losing(Numbers):
        def texts(self, shard, row, stopped):
            yield from itertools.islice(super().texts(shard, row, stopped), 8)
            raise SourceLost("gone")

    stream = batches(lanes=1, shards=Losing((30,)))
    stream.seq_len = stream.buffer = 1
    made = sum(map(len, numbered(map(str, (1, 2, 3, 4, 5, 7, 8, 9))))) // 4
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    number = 0
    with pytest.raises(SourceLost, match="gone"):
        for _ in stream.device_batches(mesh, Rules(), start=0, stop=99):
            number += 1
            assert number < made - 1 or stream.error is not None
    assert number == made > 4


# --- Made ahead -----------------------------------------------------------------------


def test_ahead_keeps_order_and_a_reserve():
    go, waited = threading.Event(), []

    def items():
        yield from range(5)
        go.wait(10)
        yield 5
        raise OSError("broken")

    def patience():
        waited.append(True)
        go.set()

    made = Ahead(items(), 4, reserve=2, patience=patience)
    assert [next(made) for _ in range(3)] == [0, 1, 2] and not waited
    assert next(made) == 3 and waited
    assert [next(made), next(made)] == [4, 5]
    assert isinstance(made.error, OSError)
    with pytest.raises(OSError, match="broken"):
        next(made)
    assert list(Ahead(iter("abc"), 1)) == ["a", "b", "c"]


def test_ahead_closes_what_it_iterates_over():
    closed = threading.Event()

    def items():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    made = Ahead(items(), 2)
    assert next(made) == 0
    made.close()
    assert closed.is_set() and list(made) == [] and made.error is None


# --- Shards of a corpus ---------------------------------------------------------------


def texts_of(shards, shard, row=0):
    return list(shards.texts(shard, row, threading.Event()))


@pytest.fixture(autouse=True)
def _each_file_a_shard(monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files, with blank and null rows, and the same text in a saved dataset."""
    import datasets

    path = tmp_path_factory.mktemp("shards")
    rows = [{"id": i, "text": f"document {i}"} for i in range(40)]
    rows[7]["text"], rows[20]["text"] = "  ", None
    (path / "files").mkdir()
    for k, part in enumerate((rows[:15], rows[15:20], rows[20:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (path / "files" / f"{k}.jsonl").write_text(lines)
    datasets.Dataset.from_list(rows).save_to_disk(path / "saved")
    return path


@pytest.mark.parametrize("name", ["files", "files/0.jsonl", "saved"])
def test_shards_hold_what_documents_gives(folder, name):
    config = CorpusConfig(source=str(folder / name), validation_fraction=0.3)
    shards = Shards(config)
    found = [texts_of(shards, i) for i in range(shards.count)]
    kept = [text for texts in found for _, text in texts]
    assert kept == list(documents(config, "train"))
    assert not set(kept) & set(documents(config, "validation"))
    for shard, whole in enumerate(found):
        for row in (1, whole[-1][0], whole[-1][0] + 1):
            assert texts_of(shards, shard, row) == [x for x in whole if x[0] >= row]


def test_who_reads_a_shard_at_the_same_time_does_not_matter(folder, monkeypatch):
    """Another reader begins, and comes to its end, just when this one begins."""
    shards = Shards(CorpusConfig(str(folder / "files")))
    whole = texts_of(shards, 0)
    others, real = [], ArrowExamplesIterable._init_state_dict

    def begin(self):
        state = real(self)
        if not others:
            others.append("reads")
            assert texts_of(shards, 0) == whole
            others.clear()
        return state

    monkeypatch.setattr(ArrowExamplesIterable, "_init_state_dict", begin)
    assert texts_of(shards, 0) == whole


def test_the_first_documents_only_are_one_shard(folder):
    config = CorpusConfig(str(folder / "files"), max_documents=17)
    shards = Shards(config)
    assert shards.count == 1
    whole = texts_of(shards, 0)
    assert [text for _, text in whole] == list(documents(config, "train"))
    assert texts_of(shards, 0, 5) == [x for x in whole if x[0] >= 5]


def test_unusable_sources_are_refused(tmp_path, folder):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="holds no text"):
        Shards(CorpusConfig(str(tmp_path / "empty.txt")))
    (tmp_path / "n.jsonl").write_text('{"text": "a", "n": 3}\n')
    with pytest.raises(InputError, match="column 'n' .* holds 3 where a string"):
        texts_of(Shards(CorpusConfig(str(tmp_path / "n.jsonl"), text_column="n")), 0)
    with pytest.raises(InputError, match="no column 'words'"):
        Shards(CorpusConfig(str(folder / "files"), text_column="words"))


def failing(monkeypatch, errors):
    """After each second row there is an error, as long as there are errors."""
    values, left = corpus.values, iter(errors)

    def fail(*place):
        for first, run in values(*place):
            for i in range(0, len(run), 2):
                yield first + i, run[i : i + 2]
                if (error := next(left, None)) is not None:
                    raise error

    monkeypatch.setattr(corpus, "values", fail)


def test_a_lost_connection_is_tried_again(folder, monkeypatch):
    monkeypatch.setattr(shards_module, "PAUSES", (0, 0))
    told = []

    class Timeout(Exception):
        """As of httpx: no OSError."""

    shards = Shards(CorpusConfig(str(folder / "files")), tell=told.append)
    whole = texts_of(shards, 0)
    failing(monkeypatch, [ConnectionError("reset"), Timeout("slow"), OSError("reset")])
    assert texts_of(shards, 0) == whole
    assert "shard 0 of 3, row 2 cannot be read: reset" in told[0] and len(told) == 3


def test_it_is_given_up_after_so_many_tries(folder, monkeypatch):
    monkeypatch.setattr(shards_module, "PAUSES", (0, 0))
    shards = Shards(CorpusConfig(str(folder / "files")))

    def down(*place):
        raise ConnectionError("network is down")
        yield

    monkeypatch.setattr(corpus, "values", down)
    with pytest.raises(
        SourceLost, match=r"shard 1 of 3, row 4 .* down \(tried 3 times"
    ):
        texts_of(shards, 1, 4)


@pytest.mark.parametrize("error", [ValueError("so bad"), FileNotFoundError("so bad")])
def test_what_is_wrong_with_the_text_is_not_tried_again(folder, monkeypatch, error):
    failing(monkeypatch, [error])
    with pytest.raises(InputError, match="cannot read .* so bad"):
        texts_of(Shards(CorpusConfig(str(folder / "files"))), 0)


@pytest.mark.parametrize("error", [TypeError("a bug"), KeyError("a bug")])
def test_a_bug_is_neither_tried_again_nor_bad_input(folder, monkeypatch, error):
    failing(monkeypatch, [error])
    with pytest.raises(type(error), match="a bug"):
        texts_of(Shards(CorpusConfig(str(folder / "files"))), 0)


def test_mixed_values_and_broken_bytes_are_read_as_for_a_store(tmp_path):
    """Of a column of several kinds Arrow makes JSON texts."""
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(InputError, match="column 'text' .* holds 3 where a string"):
        texts_of(Shards(CorpusConfig(str(mixed))), 0)
    (tmp_path / "broken.txt").write_bytes(b"good\nbad \xff\n")
    config = CorpusConfig(
        str(tmp_path / "broken.txt"), invalid_utf8="replace", keep_linebreaks=False,
        validation_fraction=0,
    )  # fmt: skip
    assert texts_of(Shards(config), 0) == [(0, "good"), (1, "bad \ufffd")]
    with pytest.raises(InputError, match="line 2 of .*broken.txt"):
        texts_of(Shards(dataclasses.replace(config, invalid_utf8="refuse")), 0)
