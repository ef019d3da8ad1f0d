"""A few random bad inputs to every reader, and unusual tokenizers; tests/fuzz.py runs thousands."""

import fuzz
import numpy as np
import pytest
from conftest import SAMPLE, TextShard, tiny_config, trained_tokenizer

import train_gpt as t


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_random_bad_input_is_refused_in_one_line_or_read(name):
    faults = []
    row = fuzz.fuzz(name, 60, seed=10**6, report=faults.append)
    assert not faults, faults[0]
    assert row["refused"] > 20


def test_fuzz_sees_a_fault(monkeypatch):
    monkeypatch.setitem(fuzz.TARGETS, "broken", lambda rng, folder: 1 / 0)
    assert fuzz.fuzz("broken", 3, 0, report=lambda fault: None)["faults"] == 3


@pytest.mark.parametrize("options", [
    dict(model_type="unigram"), dict(model_type="char", vocab_size=330), dict(byte_fallback=False),
    dict(add_dummy_prefix=True), dict(treat_whitespace_as_suffix=True),
    dict(normalization_rule_name="identity", remove_extra_whitespaces=False),
], ids=lambda options: "-".join(options))
def test_bytes_of_an_unusual_tokenizer_are_right_or_the_check_says_so(tmp_path, options):
    with t.lzma.open(SAMPLE / "sample_val.txt.xz", "rt", encoding="utf-8") as f:
        text = f.read(60_000).replace("\x1e", "")
    lines = [line for line in text.splitlines() if line.strip()]
    sp = trained_tokenizer(tmp_path / "m.model", lines, **dict(character_coverage=0.99) | options)
    ids = [i for line in lines[:200] for i in [sp.bos_id(), *sp.encode(line)]]
    table = t.byte_table(sp, sp.vocab_size())
    by_table, by_text = t.decoded_bytes(sp, table, np.array(ids, np.uint16))
    assert (by_table == by_text) == ("treat_whitespace_as_suffix" not in options)
    cfg = tiny_config(vocab_size=sp.vocab_size())
    shard = TextShard(path="own text", text=np.array(ids, np.uint16))
    t.check_encoding(sp, table, shard, cfg)
