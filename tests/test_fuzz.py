"""A few hundred random bad inputs to every reader, the seeds that once found a fault, and unusual tokenizers.

tests/fuzz.py runs as many cases as one likes and prints a table.
"""

import random

import fuzz
import pytest
import torch
from conftest import SAMPLE, tiny_config

import train_gpt as t

# (target, seed) that once ended in a traceback or a message of several lines.
FOUND = [("tokenizer", 1820), ("checkpoint", 37), ("checkpoint", 40), ("checkpoint", 58), ("settings", 2003185),
         ("settings", 2003604), ("settings", 2004330), ("settings", 2010784), ("artifact", 2000321)]


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_random_bad_input_is_refused_in_one_line_or_read(name):
    faults = []
    row = fuzz.fuzz(name, 150, seed=10**6, report=faults.append)
    assert not faults, faults[0]
    assert row["refused"] > 20 and row["refused"] + row["read"] == 150


@pytest.mark.parametrize("name, seed", FOUND)
def test_seed_that_found_a_fault_stays_mended(name, seed):
    faults = []
    fuzz.fuzz(name, 1, seed, report=faults.append)
    assert not faults, faults[0]


def test_fuzz_sees_a_fault(monkeypatch):
    def broken(rng, folder):
        raise KeyError("traceback")
    monkeypatch.setitem(fuzz.TARGETS, "broken", broken)
    faults = []
    assert fuzz.fuzz("broken", 3, 0, report=faults.append)["faults"] == len(faults) == 3


@pytest.mark.parametrize("options", [
    dict(model_type="unigram"), dict(model_type="char", vocab_size=330), dict(byte_fallback=False),
    dict(add_dummy_prefix=True), dict(treat_whitespace_as_suffix=True), dict(split_by_whitespace=False),
    dict(normalization_rule_name="identity", remove_extra_whitespaces=False),
], ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_bytes_of_an_unusual_tokenizer_are_those_of_the_text_or_the_check_says_so(tmp_path, options):
    """Of any tokenizer that SentencePiece can train: the table's bytes equal the decoded text's, or it is refused."""
    import sentencepiece
    text = t.lzma.open(SAMPLE / "sample_val.txt.xz", "rt", encoding="utf-8").read()[:60_000].replace("\x1e", "")
    (tmp_path / "text").write_text(text, encoding="utf-8")
    settings = dict(model_type="bpe", vocab_size=400, byte_fallback=True, add_dummy_prefix=False, pad_id=0, bos_id=1,
                    eos_id=2, unk_id=3, character_coverage=0.99, minloglevel=2, num_threads=1)
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"),
                                             **(settings | options))
    size = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model")).vocab_size()
    sp = t.open_tokenizer(tiny_config(vocab_size=size, tokenizer_path=str(tmp_path / "m.model")))
    lines = [line for line in text.splitlines() if line.strip()][:200]
    random.Random(0).shuffle(lines)
    ids = [i for line in lines for i in [sp.bos_id(), *sp.encode(line)]]
    by_table, by_text = t.decoded_bytes(sp, torch.tensor(ids).numpy().astype("uint16"), sp.bos_id(), 10**6)
    assert (by_table == by_text) == ("treat_whitespace_as_suffix" not in options)
