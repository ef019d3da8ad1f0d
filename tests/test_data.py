"""Shards, tokenizer and byte counts: damaged files against one clear DataError each, bytes of tokens against the
UTF-8 length of the text they decode to, held-out training text against the training rows.
"""

import math
import struct
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt as t

SAMPLE = ROOT / "data" / "sample"
MODEL = SAMPLE / "corpus_1024_bpe.model"
VOCAB, BOS = 1024, 1


def shard_bytes(tokens, magic=20240520, version=1, count=None):
    """A shard file's bytes; `count` is what its header promises."""
    tokens = np.asarray(tokens, "<u2")
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.tobytes()


def write_split(folder, split, *parts):
    """One shard for each list of tokens."""
    folder.mkdir(exist_ok=True)
    for i, tokens in enumerate(parts):
        (folder / f"fineweb_{split}_{i:06d}.bin").write_bytes(shard_bytes(tokens))
    return folder


@pytest.fixture(scope="module")
def sp():
    """The sample's tokenizer: 1024 BPE pieces, byte fallback, no dummy prefix, collapsed whitespace."""
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


@pytest.fixture(scope="module")
def table(sp):
    """The byte table of the sample's tokenizer, with 76 ids more than the tokenizer has."""
    return t.byte_table(sp, VOCAB + 76)


# ---- shards --------------------------------------------------------------------------------------

GOOD = shard_bytes(range(100))

DAMAGED = {  # the file's bytes, and what the message must say
    "empty file": (b"", "0 bytes.*1024"),
    "part of a header": (GOOD[:1023], "1023 bytes.*1024"),
    "header alone": (GOOD[:1024], "1024 bytes.*100 tokens.*1224"),
    "tail missing": (GOOD[:-2], "1222 bytes.*100 tokens.*1224"),
    "half a token missing": (GOOD[:-1], "1223 bytes.*100 tokens.*1224"),
    "a byte too many": (GOOD + b"\0", "1225 bytes.*100 tokens.*1224"),
    "foreign magic": (shard_bytes(range(100), magic=20240521), "magic 20240521"),
    "a text file": (b"It was the best of times. " * 100, "magic"),
    "newer version": (shard_bytes(range(100), version=2), "version 2"),
    "no tokens": (shard_bytes([]), "0 tokens"),
    "negative count": (shard_bytes(range(100), count=-100), "-100 tokens"),
    "count too large": (shard_bytes(range(100), count=2**31 - 1), "2147483647 tokens"),
    "big-endian header": (struct.pack(">3i", 20240520, 1, 100) + GOOD[12:], "magic"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged_shard_is_named_with_its_fault(tmp_path, fault):
    raw, expected = DAMAGED[fault]
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(raw)
    with pytest.raises(t.DataError, match=expected) as caught:
        t.open_shards(tmp_path, "val")
    assert str(path) in str(caught.value)


def test_good_shard_is_its_tokens(tmp_path):
    tokens = [0, 1, 65535, 256, 7]
    write_split(tmp_path, "val", tokens)
    [(path, opened)] = t.open_shards(tmp_path, "val")
    assert (path.name, len(opened), opened[:].dtype) == ("fineweb_val_000000.bin", 5, np.uint16)
    assert (opened[:].tolist(), opened[1:3].tolist(), opened[-2:].tolist()) == (tokens, tokens[1:3], tokens[-2:])


def test_shards_come_in_the_order_of_their_names_and_by_split(tmp_path):
    write_split(tmp_path, "val", [1], [2], [3])
    write_split(tmp_path, "train", [4])
    assert [shard[:].tolist() for _, shard in t.open_shards(tmp_path, "val")] == [[1], [2], [3]]
    assert [shard[:].tolist() for _, shard in t.open_shards(tmp_path, "train")] == [[4]]


def test_missing_folder_is_named_with_the_way_out(tmp_path):
    with pytest.raises(t.DataError, match=r"DATA_PATH=.*nowhere: no such folder.*data/download\.py.*PRESET=sample"):
        t.open_shards(tmp_path / "nowhere", "train")


def test_folder_without_the_split_is_named_with_the_way_out(tmp_path):
    write_split(tmp_path, "train", [1, 2])
    with pytest.raises(t.DataError, match=r"DATA_PATH=.*: holds no fineweb_val_\*\.bin.*PRESET=sample"):
        t.open_shards(tmp_path, "val")


def test_folder_in_place_of_a_shard_is_a_data_error(tmp_path):
    (tmp_path / "fineweb_val_000000.bin").mkdir()
    with pytest.raises(t.DataError, match="fineweb_val_000000.bin"):
        t.open_shards(tmp_path, "val")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keep=st.integers(0, 16), body=st.binary(max_size=1200), resize=st.booleans())
def test_random_bytes_are_a_data_error_or_an_array(tmp_path, keep, body, resize):
    """Files that begin with 0 to 16 right bytes and go on at random; some promise just the tokens that they hold."""
    raw = bytearray((GOOD[:keep] + body).ljust(1024, b"\0") if resize else GOOD[:keep] + body)
    if resize:
        raw[8:12] = struct.pack("<i", (len(raw) - 1024) // 2)
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(raw)
    try:
        tokens = t.open_shard(path)[:]
    except t.DataError as error:
        assert str(path) in str(error)
    else:
        assert (tokens.dtype, 2 * len(tokens)) == (np.uint16, len(raw) - 1024)


# ---- what fits together --------------------------------------------------------------------------


def sample_config(**changes):
    return tiny_config(data_path=str(SAMPLE), tokenizer_path=str(MODEL), vocab_size=VOCAB, **changes)


def test_sample_opens():
    data = t.open_data(sample_config())
    assert len(data.val) == sum(len(tokens) for _, tokens in t.open_shards(SAMPLE, "val"))
    assert len(data.train) == 1 and data.table.base.shape == (VOCAB,)


def test_text_of_control_tokens_alone_is_refused(tmp_path):
    write_split(tmp_path, "train", [1, 2, 40] * 100)
    write_split(tmp_path, "val", [40, 1, 1, 1])  # the first token is never a target
    with pytest.raises(t.DataError, match="0 bytes"):
        t.open_data(replace(sample_config(), data_path=str(tmp_path)))
    assert math.isnan(t.Ledger(0, 3, 1.0, 0).bpb)


@pytest.mark.parametrize("split", ["val", "train"])
def test_token_outside_the_vocabulary_names_shard_and_token(tmp_path, split):
    write_split(tmp_path, "train", [1, 2, 3] * 100)
    write_split(tmp_path, "val", [1, 2, 40])
    write_split(tmp_path, split, [1, 2, 40] * 100 + [1024])
    cfg = replace(sample_config(), data_path=str(tmp_path))
    with pytest.raises(t.DataError, match=rf"fineweb_{split}_000000.bin: token 1024 is outside VOCAB_SIZE=1024"):
        data = t.open_data(cfg)
        loader = t.Loader(data.train, cfg, t.Run())  # training shards are checked as they are read
        try:
            for _ in range(3):
                next(loader)
        finally:
            loader.close()


def test_second_validation_shard_is_checked_too(tmp_path):
    write_split(tmp_path, "train", [1, 2, 3])
    write_split(tmp_path, "val", [1, 2, 3], [4, 2000])
    with pytest.raises(t.DataError, match="fineweb_val_000001.bin: token 2000"):
        t.open_data(replace(sample_config(), data_path=str(tmp_path)))


def test_validation_of_one_token_is_refused(tmp_path):
    write_split(tmp_path, "train", [1, 2, 3])
    write_split(tmp_path, "val", [5])
    with pytest.raises(t.DataError, match="validation split has 1 token"):
        t.open_data(replace(sample_config(), data_path=str(tmp_path)))


def test_tokenizer_of_another_vocabulary_says_how_to_mend_it():
    with pytest.raises(t.DataError, match="has 1024 pieces, but VOCAB_SIZE=2048; set VOCAB_SIZE=1024"):
        t.open_tokenizer(replace(sample_config(), vocab_size=2048))


@pytest.mark.parametrize("content", [b"", b"not a model", GOOD], ids=["empty", "text", "shard"])
def test_foreign_tokenizer_file_is_named(tmp_path, content):
    path = tmp_path / "x.model"
    path.write_bytes(content)
    with pytest.raises(t.DataError, match=r"TOKENIZER_PATH=.*x\.model"):
        t.open_tokenizer(replace(sample_config(), tokenizer_path=str(path)))


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(t.DataError, match=r"TOKENIZER_PATH=.*x\.model: no such file"):
        t.open_tokenizer(replace(sample_config(), tokenizer_path=str(tmp_path / "x.model")))


# ---- held-out training text ----------------------------------------------------------------------


def test_holdout_is_the_end_of_training_and_left_out_of_it(tmp_path):
    write_split(tmp_path, "train", list(range(300)), list(range(300, 600)))
    data = t.open_data(replace(sample_config(holdout_tokens=100), data_path=str(tmp_path)))
    assert data.val.tolist() == list(range(500, 600))
    assert np.concatenate([shard[:] for _, shard in data.train]).tolist() == list(range(500))


def test_no_training_row_touches_the_holdout(tmp_path):
    write_split(tmp_path, "train", list(range(1000)))
    cfg = replace(sample_config(holdout_tokens=300), data_path=str(tmp_path))
    loader = t.Loader(t.open_data(cfg).train, cfg, t.Run())
    try:
        assert max(int(next(loader).max()) for _ in range(10)) <= 699
    finally:
        loader.close()


def test_holdout_needs_no_validation_split(tmp_path):
    write_split(tmp_path, "train", list(range(300)))
    cfg = replace(sample_config(holdout_tokens=100), data_path=str(tmp_path), eval_only=True, artifact="a")
    assert t.open_data(cfg).val.tolist() == list(range(200, 300))


def test_holdout_larger_than_the_last_shard_is_refused(tmp_path):
    write_split(tmp_path, "train", list(range(300)))
    with pytest.raises(ValueError, match=r"HOLDOUT_TOKENS=250: .*fineweb_train_000000.bin has only 300 tokens"):
        t.open_data(replace(sample_config(holdout_tokens=250), data_path=str(tmp_path)))


# ---- bytes ---------------------------------------------------------------------------------------


def counted(table, ids):
    """Bytes of the targets ids[1:], each after its predecessor."""
    ids = torch.tensor(ids)
    return int(t.count_bytes(table, ids[:-1], ids[1:]).sum())


def test_pieces_have_the_bytes_of_the_challenges_rule(sp, table):
    for i in range(VOCAB):
        piece = sp.id_to_piece(i)
        if sp.is_control(i) or sp.is_unknown(i):
            expected = (0, False, True)
        elif sp.is_byte(i):
            expected = (1, False, False)
        else:
            spaced = piece[0] == "\u2581"
            expected = (len(piece[spaced:].encode()), spaced, False)
        assert (int(table.base[i]), bool(table.spaced[i]), bool(table.boundary[i])) == expected, piece


def test_ids_above_the_tokenizer_stand_for_nothing_and_end_a_text(table):
    above = slice(VOCAB, None)
    assert table.base[above].sum() == 0 and not table.spaced[above].any() and table.boundary[above].all()


def test_table_shorter_than_the_tokenizer_is_its_beginning(sp, table):
    short = t.byte_table(sp, 300)
    assert all(torch.equal(a, b[:300]) for a, b in zip(short[:3], table[:3], strict=True))


def test_space_counts_only_after_text(sp, table):
    spaced = sp.piece_to_id("\u2581the")
    letter, byte = sp.piece_to_id("a"), sp.piece_to_id("<0x41>")
    control, unknown, above = BOS, sp.unk_id(), VOCAB + 1
    prev = torch.tensor([letter, byte, spaced, control, unknown, above])
    target = torch.full_like(prev, spaced)
    assert t.count_bytes(table, prev, target).tolist() == [4, 4, 4, 3, 3, 3]


def test_space_is_not_in_the_table_as_well(sp, table):
    """The double count: a table with the space baked in, and the space added again."""
    spaced = sp.piece_to_id("\u2581the")
    assert int(table.base[spaced]) == 3
    assert counted(table, [BOS, spaced, spaced]) == len("the the")


def test_counts_are_whole_numbers_in_the_targets_shape(table):
    ids = torch.randint(VOCAB, (3, 5), dtype=torch.int32)
    result = t.count_bytes(table, ids, ids)
    assert (result.dtype, result.shape) == (torch.int64, (3, 5))


# Letters, spaces, line ends, combining marks, CJK, emoji with joiners, the space mark itself, controls.
CHARACTERS = st.one_of(st.sampled_from("aethe ing  .,\n\t\u2581\u3000\u00a0é\u0301漢字かな😀👩🏽\u200d🚀\x00\x7f"),
                       st.characters(blacklist_categories=("Cs",)))
TEXTS = st.text(CHARACTERS, max_size=60)


@cache
def tokenizer_and_table():
    """What the fixtures `sp` and `table` hold, for tests that hypothesis calls."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    return sp, t.byte_table(sp, VOCAB + 76)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_bytes_of_a_document_are_those_of_its_text(text):
    sp, table = tokenizer_and_table()
    ids = sp.encode(text)
    assert counted(table, [BOS, *ids]) == len(sp.decode(ids).encode())


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.sampled_from([BOS, 2, VOCAB + 3]))
def test_bytes_of_a_stream_are_those_of_its_documents(texts, end):
    sp, table = tokenizer_and_table()
    documents = [sp.encode(text) for text in texts]
    stream = [BOS] + [i for ids in documents for i in (*ids, end)]
    assert counted(table, stream) == sum(len(sp.decode(ids).encode()) for ids in documents)


@pytest.mark.parametrize("text", [
    "hello world", "日本語 and 😀 emoji", "a" * 100, "naïve café", "tab\tand\nline", "👩🏽‍🚀", "1,000.00 €", "\u200b",
    "Ω≈ç√∫",
])
def test_plain_text_keeps_its_own_bytes(sp, table, text):
    """Texts that the tokenizer's normalisation leaves alone, up to whitespace."""
    ids = sp.encode(text)
    assert counted(table, [BOS, *ids]) == len(sp.normalize(text).replace("\u2581", " ").encode())


def test_byte_fallback_costs_the_character_its_utf8_length(sp, table):
    ids = sp.encode("x😀y")
    assert sum(sp.is_byte(i) for i in ids) == 4 and counted(table, [BOS, *ids]) == 6


# ---- the run's own check -------------------------------------------------------------------------


def test_sample_counts_by_table_and_by_text_agree(sp):
    [(_, tokens)] = [(path, shard[:]) for path, shard in t.open_shards(SAMPLE, "val")]
    by_table, by_text = t.decoded_bytes(sp, tokens, BOS, 1_000_000)
    assert by_table == by_text > 2 * len(tokens)


def test_run_check_finds_the_double_count(sp, monkeypatch):
    [(_, tokens)] = [(path, shard[:]) for path, shard in t.open_shards(SAMPLE, "val")]
    right = t.byte_table

    def doubled(*args):
        table = right(*args)
        return table._replace(base=table.base + table.spaced.long())
    monkeypatch.setattr(t, "byte_table", doubled)
    by_table, by_text = t.decoded_bytes(sp, tokens, BOS, 20_000)
    assert by_table > 1.1 * by_text


def test_run_check_finds_byte_pieces_counted_by_their_names(sp, monkeypatch):
    right = t.byte_table

    def named(sp, vocab_size):
        table = right(sp, vocab_size)
        is_byte = torch.tensor([i < VOCAB and sp.is_byte(i) for i in range(vocab_size)])
        return table._replace(base=torch.where(is_byte, 6, table.base))
    monkeypatch.setattr(t, "byte_table", named)
    stream = np.array([BOS, *sp.encode("x😀y"), BOS], np.uint16)
    assert t.decoded_bytes(sp, stream, BOS, 100) == (26, 6)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_run_check_holds_on_any_documents(texts):
    sp, _ = tokenizer_and_table()
    stream = np.array([BOS] + [i for text in texts for i in (*sp.encode(text), BOS)], np.uint16)
    by_table, by_text = t.decoded_bytes(sp, stream, BOS, 10_000)
    assert by_table == by_text == sum(len(sp.decode(sp.encode(text)).encode()) for text in texts)


def test_run_check_of_a_cut_document_agrees(sp):
    """One long document of byte pieces, cut anywhere: a cut character may not look like a fault of the table."""
    stream = np.array([BOS, *sp.encode("日本語" * 50)], np.uint16)
    counts = {limit: t.decoded_bytes(sp, stream, BOS, limit) for limit in range(60, 70)}
    assert {limit: pair for limit, pair in counts.items() if pair[0] != pair[1]} == {}
    stream = np.array(sp.encode("日本語 and more " * 9), np.uint16)  # as a holdout may begin
    counts = {begin: t.decoded_bytes(sp, stream[begin:], BOS, 1000) for begin in range(12)}
    assert {begin: pair for begin, pair in counts.items() if pair[0] != pair[1] or pair[0] < 100} == {}


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_run_check_holds_for_a_tokenizer_that_keeps_spaces(tmp_path, dummy_prefix):
    """Documents that begin with spaces, with and without the tokenizer's own space before the first word."""
    (tmp_path / "text").write_text("\n".join(f"the {i} and  an{i} in  the end" for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=300, model_type="bpe",
        minloglevel=5, byte_fallback=True, add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=False, num_threads=1,
        normalization_rule_name="identity")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    for text in ("the end", " the end", "  the  end "):
        stream = np.array([sp.bos_id(), *sp.encode(text), sp.bos_id()], np.uint16)
        by_table, by_text = t.decoded_bytes(sp, stream, sp.bos_id(), 100)
        assert by_table == by_text, text
