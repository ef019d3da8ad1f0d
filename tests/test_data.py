"""Shards, tokenizer, byte counts, sidecar, held-out text and the Loader, against damaged files.

Bytes of tokens are compared with the UTF-8 length of the text that SentencePiece decodes them to.
"""

import os
import resource
import struct

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import (SAMPLE, TOKENIZER, TextShard, shard_bytes, tiny_config, trained_tokenizer,
                      write_split)
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as t

VOCAB = 1024
BOS = 1


def config(folder, tokenizer=TOKENIZER, pieces=VOCAB, **changes):
    """A tiny Config with a tokenizer, by default the sample's, and the shards in `folder`."""
    return tiny_config(data_path=str(folder), tokenizer_path=str(tokenizer), vocab_size=pieces,
                       **changes)


SP = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))  # with byte fallback
TABLE = t.byte_table(SP, VOCAB + 76)  # more ids than the tokenizer has
GOOD = shard_bytes(range(100))


@pytest.mark.parametrize("raw, fault", [
    (b"", r"0 bytes and begins with \[\]"), (GOOD[:8], "begins with"),
    (GOOD[:1024], r"1024 bytes.* 100\]"), (GOOD[:-2], r"1222 bytes.* 100\]"),
    (GOOD + b"\0", r"1225 bytes.* 100\]"), (b"It was the best of times. " * 100, "begins with"),
    (struct.pack("<i", 20240521) + GOOD[4:], r"\[20240521.*expected \[20240520"),
    (struct.pack("<2i", 20240520, 2) + GOOD[8:], r"20240520, 2.*expected \[20240520, 1\]"),
    (shard_bytes([]), r"1024 bytes.* 0\]"), (shard_bytes(range(100), count=-100), r"-100\]"),
    (shard_bytes(range(100), count=2**31 - 1), r"2147483647\]"),
    (struct.pack(">3i", 20240520, 1, 100) + GOOD[12:], "begins with")],
    ids="empty part headless short long text magic version none negative huge endian".split())
def test_damaged_shard_is_named_with_its_fault(tmp_path, raw, fault):
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(raw)
    with pytest.raises(t.GolfError, match=f"{path}: .*{fault}"):
        t.open_shards(tmp_path, "val")


def test_shards_read_as_their_tokens_in_the_order_of_their_names(tmp_path):
    write_split(tmp_path, "val", [0, 1, 65535, 256, 7], [2], [3])
    write_split(tmp_path, "train", [4])
    shards = t.open_shards(tmp_path, "val")
    assert [shard[:].tolist() for shard in shards] == [[0, 1, 65535, 256, 7], [2], [3]]
    assert (len(shards[0]), shards[0][1:3].tolist()) == (5, [1, 65535])


def test_more_shards_than_open_files(tmp_path):
    write_split(tmp_path, "train", *100 * [range(66)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        loader = t.Loader(t.open_shards(tmp_path, "train"), tiny_config(vocab_size=66), t.Run())
        assert len(next(loader)) == len(next(loader)) == 8
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_validation_token_outside_the_vocabulary_is_refused(tmp_path):
    write_split(tmp_path, "train", [1, 2, 3])
    write_split(tmp_path, "val", [1, 2, 1024])
    with pytest.raises(t.GolfError, match="fineweb_val.*token 1024 is outside VOCAB_SIZE=1024"):
        t.open_data(config(tmp_path))


@pytest.mark.parametrize("name, content, fault", [
    ("x.model", b"", "not a SentencePiece model"), ("x.model", b"text", "not a SentencePiece"),
    ("y.model", b"", "No such file"), ("x.model", TOKENIZER.read_bytes(), "1024 pieces.*SIZE=2048"),
    ("x.model", TOKENIZER.read_bytes().replace("\u2581the".encode(), b"\xe2\x96\x81t\xa8e", 1),
     "not a SentencePiece model")], ids=["empty", "text", "missing", "size", "no UTF-8"])
def test_tokenizer_that_does_not_fit_is_named(tmp_path, name, content, fault):
    (tmp_path / "x.model").write_bytes(content)
    cfg = tiny_config(tokenizer_path=str(tmp_path / name), vocab_size=2048)
    with pytest.raises(t.GolfError, match=f"TOKENIZER_PATH=.*{name}: .*{fault}"):
        t.open_tokenizer(cfg)


def test_validation_text_among_the_training_shards_is_refused(tmp_path):
    one, two, three = [[BOS, *SP.encode(text)] for text in ("One text.", "Two texts.", "Three.")]
    write_split(tmp_path, "train", one, two)
    write_split(tmp_path, "val", three, two)
    with pytest.raises(t.GolfError, match="fineweb_train_000001.bin: is validation text"):
        t.open_data(config(tmp_path))


def test_sidecar_without_case_marks_must_count_what_the_pieces_have(tmp_path):
    tokens = [BOS, *SP.encode("It was the best of times")]
    counts = [0, *t.target_bytes(TABLE, np.array(tokens)).tolist()]
    write_split(tmp_path, "train", SP.encode("It was the worst of times"))
    write_split(tmp_path, "val", tokens)
    write_split(tmp_path, "val_bytes", counts)
    assert t.open_data(config(tmp_path)).table.sidecar.tolist() == counts
    write_split(tmp_path, "val_bytes", [*counts[:-1], counts[-1] + 1])
    with pytest.raises(t.GolfError, match="counts 25 bytes of .* validation tokens have 24"):
        t.open_data(config(tmp_path))


def test_holdout_is_the_end_of_the_training_text_and_left_out_of_it(tmp_path):
    text = t.open_shards(SAMPLE, "train")[0][:600].tolist()
    write_split(tmp_path, "train", text[:300], text[300:])
    data = t.open_data(config(tmp_path, holdout_tokens=100))
    assert data.val.tolist() == text[500:]
    assert np.concatenate([shard[:] for shard in data.train]).tolist() == text[:500]
    with pytest.raises(t.GolfError, match="HOLDOUT_TOKENS=250: .*has only 300 tokens"):
        t.open_data(config(tmp_path, holdout_tokens=250))
    write_split(tmp_path, "val", [BOS])
    with pytest.raises(t.GolfError, match="fineweb_val.*one token, nothing to score"):
        t.open_data(config(tmp_path))


def test_every_piece_has_the_bytes_of_the_challenges_rule():
    for i in range(VOCAB + 76):
        expected = (0, False, True)
        if i < VOCAB and not SP.is_control(i) and not SP.is_unknown(i):
            spaced = SP.id_to_piece(i)[0] == "\u2581"
            length = len(SP.id_to_piece(i)[spaced:].encode())
            expected = (1 if SP.is_byte(i) else length, spaced, False)
        assert tuple(column[i].item() for column in TABLE[:3]) == expected
    the = SP.piece_to_id("\u2581the")  # its space counts after text only
    text = [SP.piece_to_id("a"), SP.piece_to_id("<0x41>"), the]
    prev = torch.tensor([text, [BOS, SP.unk_id(), VOCAB + 1]])
    assert t.count_bytes(TABLE, prev, torch.full_like(prev, the)).tolist() == [3 * [4], 3 * [3]]


# Letters, spaces, line ends, marks, CJK, emoji with joiners, the space mark itself, controls.
TEXTS = st.text(st.one_of(
    st.sampled_from("aethe ing  .,\n\t\u2581\u3000\u00a0é\u0301漢字かな😀👩🏽\u200d🚀\x00\x7f"),
    st.characters(blacklist_categories=("Cs",))), max_size=60)


@given(st.lists(TEXTS, min_size=1, max_size=4), st.sampled_from([BOS, 2, VOCAB + 3]))
def test_bytes_of_a_stream_are_those_of_its_documents(texts, end):
    documents = [SP.encode(text) for text in texts]
    stream = torch.tensor([BOS] + [i for ids in documents for i in (*ids, end)])
    counted = int(t.count_bytes(TABLE, stream[:-1], stream[1:]).sum())
    assert counted == sum(len(SP.decode(ids).encode()) for ids in documents)


@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(0, 9), st.integers(0, 9))
def test_both_counts_of_a_text_cut_anywhere_agree(texts, first, last):
    """A character of several byte pieces that is cut may not look like a fault of the table."""
    documents = [SP.encode(f"日本語 the end {text} 日本語") for text in texts]
    stream = np.array([i for ids in documents for i in (BOS, *ids)], np.uint16)
    by_table, by_text = t.decoded_bytes(SP, TABLE, stream[first:len(stream) - last])
    assert by_table == by_text
    assert t.decoded_bytes(SP, TABLE, np.array(SP.encode("日本語")[1:], np.uint16)) == (0, 0)


@pytest.fixture(scope="module")
def caseops(tmp_path_factory):
    """A folder of a tokenizer with the four marks, two equal validation shards and sidecars.

    The original text "Ab AB" is stored as mark-1 "ab" mark-2 " ab".
    """
    folder = tmp_path_factory.mktemp("caseops")
    sp = trained_tokenizer(folder / "m.model", [f"ab the {i} ab" for i in range(200)],
                           vocab_size=290, user_defined_symbols=list(t.CASE_MARKS))
    ids = [sp.bos_id(), *sp.encode("\ue001ab\ue002 ab")]
    counts = t.target_bytes(t.byte_table(sp, 290), np.array(ids)).tolist()
    write_split(folder, "train", 20 * ids)
    write_split(folder, "val", ids, ids)
    write_split(folder, "val_bytes", [0, *counts], [0, *counts])
    return folder


def test_sidecar_counts_the_bytes_of_the_original_text(caseops):
    cfg = config(caseops, caseops / "m.model", 290)
    data = t.open_data(cfg)
    assert int(t.target_bytes(data.table, data.val).sum()) == 2 * len("Ab AB")
    table = data.table._replace(sidecar=None)
    both = t.decoded_bytes(t.open_tokenizer(cfg), table, data.val)
    assert both == (2 * len("Ab AB"), 2 * len("Ab AB"))


@pytest.mark.parametrize("files, change, fault", [
    ("*_bytes_*", None, "is missing, but the tokenizer has CaseOps marks"),
    ("*_bytes_000001.bin", None, r"of \d+ tokens, .* \d+ validation tokens"),
    ("*_bytes_000001.bin", lambda raw: shard_bytes([0, 5]), r"10 bytes of \d+ tokens"),
    ("*_bytes_000000.bin", lambda raw: raw[:-2], "no shard of this challenge"),
    ("*_bytes_*", lambda raw: raw[:1024] + (2 * np.frombuffer(raw[1024:], "<u2")).tobytes(),
     "counts 20 bytes of .* validation tokens have 10"),
], ids=["all missing", "one missing", "short", "damaged", "doubled"])
def test_sidecar_that_does_not_fit_is_refused(caseops, tmp_path, files, change, fault):
    for path in caseops.iterdir():
        raw = path.read_bytes()
        if not path.match(files):
            (tmp_path / path.name).write_bytes(raw)
        elif change:
            (tmp_path / path.name).write_bytes(change(raw))
    with pytest.raises(t.GolfError, match=fault):
        t.open_data(config(tmp_path, tmp_path / "m.model", 290))


COUNTING = [TextShard(path=SAMPLE, text=np.arange(first, first + size, dtype=np.uint16))
            for first, size in ((0, 3000), (3000, 1200), (4200, 50))]


def batches(count, run=None, place=(0, 0)):
    """The first tokens of the rows of `count` batches, and the place behind each."""
    loader = t.Loader(COUNTING, tiny_config(vocab_size=8192), run or t.Run(), place)
    return [(next(loader)[:, 0].tolist(), loader.place) for _ in range(count)]


def test_epoch_has_every_row_of_the_text_once_and_the_next_another_order():
    rows = [row for part, _ in batches(16) for row in part]
    first, second = rows[:64], rows[64:]
    assert len(set(first)) == len(set(second)) == 64  # 46 + 18 rows
    assert first != second
    batch = next(t.Loader(COUNTING, tiny_config(vocab_size=8192), t.Run()))
    assert (batch.shape, batch.dtype) == ((8, 65), torch.int32)
    assert bool((batch.diff(dim=1) == 1).all())


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_together_read_the_rows_of_one(world_size):
    ranks = [batches(20, t.Run(rank, world_size)) for rank in range(world_size)]
    together = [sum((rows for rows, _ in parts), []) for parts in zip(*ranks)]
    assert together == [rows for rows, _ in batches(20)]


def test_loader_begun_at_a_place_goes_on_from_there():
    whole = batches(20)
    for done in (1, 7, 8, 15):
        assert batches(20 - done, place=whole[done - 1][1]) == whole[done:]


def test_training_text_that_cannot_be_read_is_named():
    loader = t.Loader(COUNTING, tiny_config(vocab_size=64), t.Run())
    with pytest.raises(t.GolfError, match="token .* is outside VOCAB_SIZE=64"):
        next(loader)
    with pytest.raises(t.GolfError, match="50 tokens, fewer than one row of TRAIN_SEQ_LEN=64"):
        t.Loader(COUNTING[2:], tiny_config(), t.Run())


def test_begin_of_document_must_be_the_tokenizers(tmp_path):
    write_split(tmp_path, "train", [*SP.encode("the end of all"), 2])
    write_split(tmp_path, "val", [*SP.encode("the end of it"), 2])  # EOS ends a document, no BOS
    for bos_id in (1, 3, SP.encode("end")[0], 10**6):
        with pytest.raises(t.GolfError, match=f"BOS_ID={bos_id}: separates no .*val.* to 1 or 2,"):
            t.open_data(config(tmp_path, bos_id=bos_id))
    assert t.open_data(config(tmp_path, bos_id=2)).val[-1] == 2


@pytest.fixture(scope="module")
def documents():
    [shard] = t.open_shards(SAMPLE, "val")
    return [SP.decode(part.tolist())[:4000] for part in np.split(shard[:], np.flatnonzero(
        shard[:] == BOS))[1:30]]


@pytest.mark.parametrize("other", [dict(model_type="unigram"), dict(character_coverage=0.98)],
                         ids=["unigram", "coverage"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_of_another_tokenizer_of_this_size_are_refused(tmp_path, documents, other, split):
    """Texts that the wrong tokenizer decodes do not encode to their tokens."""
    mine = trained_tokenizer(tmp_path / "mine.model", documents)
    theirs = trained_tokenizer(tmp_path / "theirs.model", documents, **other)
    cfg = config(tmp_path, tmp_path / "mine.model", 400)
    for name, sp in dict(train=mine, val=mine, other=theirs).items():
        part = split if name == "other" else name
        texts = documents[::2] if part == "val" else documents[1::2]
        write_split(tmp_path, part, [i for text in texts for i in [BOS, *sp.encode(text)]])
        if name == "val":
            t.open_data(cfg)
    with pytest.raises(t.GolfError, match=f"fineweb_{split}_000000.bin: .*mine.model, encode to"):
        t.open_data(cfg)


@pytest.mark.parametrize("fault", ["space", "words"])
def test_tokenizer_whose_bytes_cannot_be_counted_is_refused(tmp_path, documents, fault):
    """A space that is spelled in three byte pieces is one byte; a piece of two words is not."""
    sp = trained_tokenizer(tmp_path / "t.model", documents, **(
        dict(user_defined_symbols=["of\u2581the"]) if fault == "words" else {}))
    if fault == "space":
        blob = (tmp_path / "t.model").read_bytes()
        lone = b"\n\x03\xe2\x96\x81"  # the piece of the space mark alone
        assert lone in blob
        (tmp_path / "t.model").write_bytes(blob.replace(lone, b"\n\x03\xee\x80\x80", 1))
        sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
        documents = [" ".join(text).replace(" ", "  7 ") for text in documents]
    ids = [i for text in documents for i in [BOS, *sp.encode(text)]]
    write_split(tmp_path, "train", ids)
    write_split(tmp_path, "val", ids)
    with pytest.raises(t.GolfError, match="TOKENIZER_PATH=.*t.model: counts [0-9]+ bytes for"):
        t.open_data(config(tmp_path, tmp_path / "t.model", 400))
