"""data/prepare.py and data/download.py: formats, splits, bytes, CaseOps, refusals.

No network: a stand-in takes the place of huggingface_hub.snapshot_download.
"""

import gzip
import hashlib
import json
import lzma
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import caseops
import download
import numpy as np
import prepare
import pytest
import sentencepiece as spm
import zstandard
from conftest import ROOT, SAMPLE, shard_bytes, tiny_config, tiny_model
from conftest import TOKENIZER as MODEL
from hypothesis import given
from hypothesis import strategies as st

import train_gpt

DOCUMENTS = [f"Document {i}: a brown fox, {i * i} times.\nA second line.\n" for i in range(60)]


def read_shards(folder, split):
    """The tokens of all shards of a split, each checked against its header."""
    parts = [path.read_bytes() for path in sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))]
    tokens = [np.frombuffer(part[1024:], "<u2") for part in parts]
    assert parts == list(map(shard_bytes, tokens))
    return tokens


def write(path, documents, key="text"):
    lines = "".join(json.dumps({key: text}) + "\n" for text in documents)
    path.write_text(lines if path.suffix == ".jsonl" else "\n\x1e\n".join(documents) + "\n")
    return path


def run_prepare(out, *settings):
    """prepare.main with the sample's tokenizer if none is named; returns the parsed manifest."""
    default = [] if {"--tokenizer", "--train-tokenizer"} & {*settings} else ["--tokenizer", MODEL]
    prepare.main([str(each) for each in ("--out", out, *settings, *default)])
    return json.loads((out / "manifest.json").read_text())


def refusal(function, *args):
    """The one-line message of a command that must fail."""
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def files_below(folder):
    """{relative path: content} of the files below folder, hidden folders left out."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "/." not in str(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def corpus(tmp_path):
    train = write(tmp_path / "train.txt", DOCUMENTS[:50])
    return ["--train", train, "--val", write(tmp_path / "val.txt", DOCUMENTS[50:])]


@pytest.mark.slow
def test_sample_is_rebuilt_byte_for_byte(tmp_path):
    command = [sys.executable, ROOT / "data" / "prepare.py", "--sample", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("verdict:ok") == 2, done.stderr
    found = files_below(tmp_path)
    assert len(found) == 4 and found.items() <= files_below(SAMPLE).items()
    for each in json.loads(found["manifest.json"])["files"]:
        assert each["sha256"] == hashlib.sha256(found[each["name"]]).hexdigest()


def test_shards_hold_bos_and_every_document(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARS", 400)
    manifest = run_prepare(tmp_path, *corpus, "--shard-tokens", 128)
    sp = spm.SentencePieceProcessor(model_file=str(MODEL))
    for split, documents in (("train", DOCUMENTS[:50]), ("val", DOCUMENTS[50:])):
        shards = read_shards(tmp_path, split)
        assert {len(each) for each in shards[:-1]} == {128}
        tokens = np.concatenate(shards)
        starts = np.flatnonzero(tokens == sp.bos_id())
        texts = [sp.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]
        assert starts[0] == 0 and texts == [" ".join(d.split()) for d in documents]
        sums = manifest["splits"][split]
        assert (sums["documents"], sums["tokens"]) == (len(documents), len(tokens))
        assert sums["decoded_bytes"] == sums["counted_bytes"] == len("".join(texts).encode())


def test_dry_run_counts_and_writes_nothing(tmp_path, corpus, capsys):
    files = files_below(tmp_path)
    settings = "--out", tmp_path / "x", "--tokenizer", MODEL, *corpus, "--dry-run"
    prepare.main(list(map(str, settings)))
    out = capsys.readouterr().out
    assert files_below(tmp_path) == files
    assert "split:train documents:50 text_bytes:" in out and "split:val documents:10 " in out
    counts = [int(part.split()[0]) for part in out.split("text_bytes:")[1:]]
    assert sum(counts) == len("".join(DOCUMENTS).encode())


def label(path, **rule):
    args = dict(train=[], val=[], input=[path], text_key="text", val_first=None, val_fraction=None)
    return list(prepare.labelled_documents(SimpleNamespace(**args | rule)))


def test_documents_are_split_by_number_or_by_hash(tmp_path):
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    assert [split for split, _ in label(path, val_first=7)] == ["val"] * 7 + ["train"] * 53
    before = label(path, val_fraction=0.3)
    more = write(tmp_path / "b.jsonl", ["one more", *reversed(DOCUMENTS)])
    assert label(more, val_fraction=0.3)[1:] == before[::-1]
    assert 5 < sum(split == "val" for split, _ in before) < 35
    # Pinned: a change of the hash would move documents between training and validation.
    assert prepare.text_hash(" stable\n") == prepare.text_hash("stable") == 0x5BFC0C64EFC10306


def test_one_plain_text_is_split_into_documents(tmp_path):
    book = "\n".join(f"Line {i} of a book without any separator." for i in range(3000))
    path = write(tmp_path / "book.txt", [book])
    parts = [text for _, text in label(path, val_fraction=0.2)]
    assert "\n".join(parts) == book and max(map(len, parts)) <= prepare.PIECE_CHARS
    settings = ["--input", path, "--val-fraction", 0.2, "--train-tokenizer", 300]
    sums = run_prepare(tmp_path / "out", *settings)["splits"]
    assert sums["train"]["documents"] + sums["val"]["documents"] == len(parts)
    two = write(tmp_path / "two.txt", [book, "another"])
    assert [text for _, text in label(two, val_fraction=0.2)] == [book, "another"]


def test_parquet_that_cannot_be_read_is_one_clear_error(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 text")
    pytest.importorskip("pyarrow", reason=".parquet input needs pyarrow")
    with pytest.raises(ValueError, match="a.parquet: .*damaged or not Parquet"):
        list(prepare.read_documents([path], "text"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="a.parquet: .*pip install pyarrow"):
        list(prepare.read_documents([path], "text"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.parquet"])
def test_every_format_gives_the_same_documents(tmp_path, name):
    path = write(tmp_path / name, DOCUMENTS, key="body")
    if name == "a.csv":
        rows = "".join(f'{i},"{text}"\r\n' for i, text in enumerate(DOCUMENTS))
        path.write_text("id,body\r\n" + rows, newline="")
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow", reason=".parquet input needs pyarrow")
        table = pyarrow.table({"id": [*range(60)], "body": DOCUMENTS})
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    assert list(prepare.read_documents([path], "body")) == DOCUMENTS
    zstd = zstandard.compress  # in two frames: tools that compress in parallel write many
    compressors = {".gz": gzip.compress, ".xz": lzma.compress}
    compressors[".zst"] = lambda raw: zstd(raw[:999]) + zstd(raw[999:])
    for suffix, compress in compressors.items() if name != "a.parquet" else ():
        packed = tmp_path / (name + suffix)
        packed.write_bytes(compress(path.read_bytes()))
        assert list(prepare.read_documents([packed], "body")) == DOCUMENTS
        packed.write_bytes(packed.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"{name}{suffix}: damaged"):
            list(prepare.read_documents([packed], "body"))


def test_long_documents_are_cut_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_DOCUMENT_CHARS", 100)
    text = "word " * 50 + "x" * 250 + "\nline" * 40
    for path in write(tmp_path / "a.jsonl", [text]), write(tmp_path / "a.txt", [text]):
        labelled = (("val", each) for each in prepare.read_documents([path], "text"))
        parts = [part for _, batch in prepare.batches(labelled) for part in batch]
        assert max(map(len, parts)) <= 100
        assert "".join(parts).replace("\n", "") == text.replace("\n", "")


def test_blank_records_are_documents_and_lone_surrogates_are_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": ""}\n\n{"text": "\\ud83d\\ude00"}\n')
    assert list(prepare.read_documents([path], "text")) == ["a\ufffdb", "", "\U0001f600"]
    write(tmp_path / "a.txt", ["one", " ", "two"])
    assert list(prepare.read_documents([tmp_path / "a.txt"], "text")) == ["one", "two"]


def test_trained_tokenizer_has_the_challenge_settings(tmp_path, corpus):
    run_prepare(tmp_path / "out", *corpus, "--train-tokenizer", 300)
    sp = spm.SentencePieceProcessor(model_file=str(tmp_path / "out" / "fineweb_300_bpe.model"))
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert sp.vocab_size() == 300 and sum(sp.is_byte(i) for i in range(300)) == 256
    assert not sp.encode("fox", out_type=str)[0].startswith("\u2581")  # no dummy prefix
    assert len(sp.encode("11", out_type=str)) == 2  # digits split
    assert sp.decode(sp.encode("naïve \u2603")) == "naïve \u2603"  # byte fallback


def test_bytes_are_compared_with_the_source_text(tmp_path):
    words = ["".join(w) for w in np.random.default_rng(0).choice([*"abcdefgh"], (40, 3000))]
    path = write(tmp_path / "a.jsonl", [" ".join(words[i : i + 4]) for i in range(36)])
    settings = ["--input", path, "--val-first", 6]
    # Spaces are so rare that SentencePiece gives them no piece: each is then spelled in 3 bytes.
    options = dict(model_type="bpe", vocab_size=280, byte_fallback=True, max_sentence_length=10**6)
    model = tmp_path / "no_space"
    spm.SentencePieceTrainer.train(sentence_iterator=iter(words), model_prefix=model, **options)
    other = ["--tokenizer", f"{model}.model"]
    assert "bytes of the source text differ by" in refusal(run_prepare, tmp_path, *settings, *other)
    sums = run_prepare(tmp_path / "own", *settings, "--train-tokenizer", 280)["splits"]["train"]
    assert sums["text_bytes"] == sums["decoded_bytes"] == sums["counted_bytes"]


CASED = ["NASA's McDonald's iPhone, A to Z.\n", "CAFE\u0301 E\u0301 ﬁne", "x \ue001\ue004 Y"]
CODED = {"The A cat": "1the 1a cat", "NASA": "2nasa", "iPhone tHE": "i3phone t3h3e"}
CODED |= {"McDonald's ABc": "1mc3donald's 1a3bc", "ÉA é": "É1a é", "\ue001": "4\ue001"}


def test_case_ops_writes_the_public_format():
    symbols = str.maketrans("1234", "".join(caseops.MARKS))
    for text, coded in CODED.items():
        assert caseops.encode(text) == coded.translate(symbols)


@given(st.text(st.one_of(st.sampled_from("abYZ '\n1É" + "".join(caseops.MARKS)), st.characters())))
def test_case_ops_loses_nothing(text):
    coded = caseops.encode(text)
    assert caseops.decode(coded) == text and not re.search("[A-Z]", coded)


@pytest.fixture
def cased(tmp_path):
    train = write(tmp_path / "train.jsonl", DOCUMENTS[:50] + CASED)
    val = write(tmp_path / "val.jsonl", DOCUMENTS[50:] + CASED + [""])
    options = ["--shard-tokens", 100, "--train-tokenizer", 330, "--case-ops"]
    run_prepare(tmp_path / "out", "--train", train, "--val", val, *options)
    return tmp_path / "out"


def test_sidecar_and_score_are_of_the_original_bytes_of_every_document(cased):
    model = str(cased / "fineweb_330_bpe_caseops.model")
    sp = spm.SentencePieceProcessor(model_file=model)
    shards, sidecars = read_shards(cased, "val"), read_shards(cased, "val_bytes")
    assert len(shards) > 2 and list(map(len, shards)) == list(map(len, sidecars))
    starts = np.flatnonzero(np.concatenate(shards) == sp.bos_id())
    found = [int(part.sum()) for part in np.split(np.concatenate(sidecars), starts[1:])]
    documents = [sp.normalize(d).replace("\u2581", " ") for d in DOCUMENTS[50:] + CASED]
    assert found == [len(text.encode()) for text in documents] + [0]
    cfg = tiny_config(data_path=str(cased), tokenizer_path=model, vocab_size=330)
    data = train_gpt.open_data(cfg)
    ledger = train_gpt.evaluate(tiny_model(cfg), data.val, data.table, "roundtrip")
    manifest = json.loads((cased / "manifest.json").read_text())
    assert ledger.bytes == manifest["splits"]["val"]["counted_bytes"]
    assert manifest["tokenizer"]["text_transform"] == "lossless_caps_caseops_v1"


def test_existing_files_are_replaced_with_force_only(tmp_path, corpus):
    out = tmp_path / "out"
    run_prepare(out, *corpus, "--shard-tokens", 128)
    before = files_below(out)
    assert "--force" in refusal(run_prepare, out, *corpus) and files_below(out) == before
    run_prepare(out, *corpus, "--force")
    assert len(read_shards(out, "train")) == 1  # no shard of the first run stays
    (tmp_path / MODEL.name).write_bytes(b"another tokenizer")
    assert MODEL.name in refusal(run_prepare, tmp_path, *corpus)


def test_bad_input_is_named_and_leaves_nothing_behind(tmp_path, corpus):
    for name, content, expected in [
        ("blank.txt", b"\n\x1e\n \n", "train gets none"),
        ("binary.txt", b"fine\n\xff\xfe\n", "binary.txt: damaged or not UTF-8"),
        ("broken.jsonl", b'{"text": "fine"}\n{broken\n', "broken.jsonl: after record 1"),
        ("key.jsonl", b'{"body": "a"}\n', r"\['body'\]; name the key with --text-key"),
        ("book.pdf", b"a", "book.pdf: unknown format; readable: plain text .* JSON .* .parquet"),
        ("val.txt", b"a", "val.txt stands in both"),
    ]:
        (tmp_path / name).write_bytes(content)
        arguments = (tmp_path / "out", "--train", tmp_path / name, *corpus[2:])
        assert re.search(expected, refusal(run_prepare, *arguments))
    assert not files_below(tmp_path / "out")
    assert "absent.txt" in refusal(run_prepare, tmp_path, "--input", "absent.txt", "--val-first", 1)
    assert "--val-fraction" in refusal(run_prepare, tmp_path, "--input", corpus[1])
    short = write(tmp_path / "short.txt", ["One short text."])
    message = refusal(run_prepare, tmp_path, "--input", short, "--val-fraction", 0.5)
    assert "gets none of 1 documents" in message


@pytest.mark.parametrize("tool", ["prepare", "download"])
def test_tools_also_run_as_modules(tool):
    command = [sys.executable, "-m", f"data.{tool}", "--help"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def test_unusable_tokenizers_are_refused(tmp_path, monkeypatch, corpus, cased):
    (tmp_path / "fake.model").write_bytes(b"not a model")
    for expected, *options in [
        ("not a SentencePiece model", "--tokenizer", tmp_path / "fake.model"),
        ("--case-ops goes with", "--case-ops"),
        ("--case-ops goes with", "--tokenizer", cased / "fineweb_330_bpe_caseops.model"),
        (r"tokenizer 1024: \d+ bytes of text give only \d+ pieces", "--train-tokenizer", 1024),
    ]:
        assert re.search(expected, refusal(run_prepare, tmp_path / "new", *corpus, *options))
    monkeypatch.setattr(prepare, "MAX_VOCAB", 1023)  # as if the model had too many pieces
    assert "1024 pieces" in refusal(run_prepare, tmp_path / "new", *corpus)


FOLDER = "datasets/fineweb10B_sp1024"
TRAIN_0, TRAIN_1 = (f"{FOLDER}/fineweb_train_{index:06d}.bin" for index in range(2))
VAL = f"{FOLDER}/fineweb_val_000000.bin"
TOKENIZER = "tokenizers/fineweb_1024_bpe.model"


class Hub:
    """A repository in the challenge's layout; fetch() acts as snapshot_download does."""

    def __init__(self):
        self.is_offline = False
        self.fetched = []
        self.files = {VAL: shard_bytes([9] * 40), TOKENIZER: b"model", "docs_selected.jsonl": b"{}"}
        self.files |= {TRAIN_0: shard_bytes([1] * 50), TRAIN_1: shard_bytes([2] * 50)}
        stats = {"files_train": 3, "files_val": 1, "tokens_val": 40}  # the third is never published
        dataset = {"name": "fineweb10B_sp1024", "tokenizer_name": "sp_1024", "stats": stats}
        tokenizer = {"name": "sp_1024", "model_path": TOKENIZER}
        self.manifest = {"datasets": [dataset], "tokenizers": [tokenizer]}

    def fetch(self, repo_id, *, local_dir, allow_patterns, dry_run, **_):
        if self.is_offline and (dry_run or not local_dir.exists()):
            raise OSError("no connection\nat all")
        self.files["manifest.json"] = json.dumps(self.manifest).encode()
        published = {f"datasets/{name}": content for name, content in self.files.items()}
        names = [] if self.is_offline else [name for name in published if name in allow_patterns]
        if dry_run:
            return [SimpleNamespace(filename=n, file_size=len(published[n])) for n in names]
        for name in names:
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / name).write_bytes(published[name])
            self.fetched.append(name.removeprefix("datasets/"))


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.fetch)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "some/repo")
    return hub


def run_download(root, *settings):
    download.main(["--root", str(root), "--train-shards=2", "--variant=sp1024", *settings])


def test_download_lists_sizes_then_lands_where_train_gpt_looks(tmp_path, hub, capsys):
    run_download(tmp_path, "--dry-run")
    assert f"would_fetch file:datasets/{TRAIN_0} bytes:1124\n" in capsys.readouterr().out
    assert not files_below(tmp_path)
    hub.manifest["tokenizers"][0]["text_transform"] = "lossless_caps_caseops_v1"
    hub.files[f"{FOLDER}/fineweb_val_bytes_000000.bin"] = shard_bytes([3] * 40)
    run_download(tmp_path, "--with-docs")
    found = files_below(tmp_path)
    assert found.keys() ^ hub.files.keys() == {f"{FOLDER}/source.json", "manifest.json"}
    assert all(found[name] == hub.files[name] for name in found.keys() & hub.files.keys())
    paths = f"DATA_PATH={tmp_path / FOLDER} TOKENIZER_PATH={tmp_path / TOKENIZER}"
    assert capsys.readouterr().out.endswith(f"\n{paths} VOCAB_SIZE=1024\n")


def test_download_fetches_only_what_is_missing_or_damaged(tmp_path, hub):
    run_download(tmp_path, "--train-shards=1")
    (tmp_path / VAL).write_bytes(hub.files[VAL][:-2])
    hub.fetched.clear()
    run_download(tmp_path)
    assert {name for name in hub.fetched if name.endswith(".bin")} == {TRAIN_1, VAL}
    assert (tmp_path / VAL).read_bytes() == hub.files[VAL]


def test_download_checks_shard_headers_and_the_manifests_checksums(tmp_path, hub):
    good = hub.files[VAL]
    listed = {"name": Path(VAL).name, "sha256": hashlib.sha256(good).hexdigest()}
    hub.manifest["datasets"][0]["files"] = [listed]
    for bad, expected in ((shard_bytes([8] * 40), "SHA-256"), (good[:-1], "expected 1104")):
        hub.files[VAL] = bad
        assert re.search(f"fineweb_val_000000.bin.*{expected}", refusal(run_download, tmp_path))
        assert not (tmp_path / VAL).exists()
    hub.files[VAL] = good
    run_download(tmp_path)
    assert (tmp_path / VAL).read_bytes() == good


def test_download_keeps_another_tokenizer_and_another_sources_shards(tmp_path, hub):
    (tmp_path / TOKENIZER).parent.mkdir()
    (tmp_path / TOKENIZER).write_bytes(b"another")
    assert "fineweb_1024_bpe.model is another tokenizer" in refusal(run_download, tmp_path)
    assert (tmp_path / TOKENIZER).read_bytes() == b"another"
    (tmp_path / TOKENIZER).unlink()
    run_download(tmp_path)
    assert "another source" in refusal(run_download, tmp_path, "--revision=v2")


def test_download_names_what_is_wrong_with_a_manifest(tmp_path, hub):
    [dataset], [tokenizer] = hub.manifest.values()
    for entry, key, value, expected in [
        (dataset, "name", "fineweb10B_sp8", "but fineweb10B_sp8; choose one"),
        (dataset, "stats", dataset["stats"] | {"files_train": 1}, "1 training shards"),
        (dataset, "stats", dataset["stats"] | {"tokens_val": 41}, "has 40 validation tokens"),
        (dataset, "stats", {}, "unknown layout .*files_val"),
        (tokenizer, "model_path", "../evil", "unsafe file name"),
        (tokenizer, "model_path", "a\\..\\evil", "unsafe file name"),
        (tokenizer, "model_path", "absent.model", "has no .*absent.model"),
    ]:
        right = entry[key]
        entry[key] = value
        assert re.search(expected, refusal(run_download, tmp_path))
        entry[key] = right


def test_download_offline_or_without_the_library_says_what_to_do(tmp_path, hub, monkeypatch):
    run_download(tmp_path / "a")
    hub.is_offline = True
    run_download(tmp_path / "a")  # all is there
    for options in ("b",), ("a", "--dry-run"), ("a", "--train-shards=3"):
        message = refusal(run_download, tmp_path / options[0], *options[1:])
        assert "offline" in message and "copy data/datasets" in message
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install --upgrade huggingface_hub" in refusal(run_download, tmp_path / "b")


def test_download_knows_who_published_a_variant(monkeypatch):
    monkeypatch.delenv("MATCHED_FINEWEB_REPO_ID", raising=False)
    asked = []
    monkeypatch.setattr(download, "download", lambda args: asked.append(args.repo_id))
    for variant in [], ["--variant=sp1024"], ["--variant=sp8192_lossless_caps_caseops_v1_reserved"]:
        download.main(variant)
    owners = "kevclark/parameter-golf willdepueoai/parameter-golf romeerp/parameter-golf-caseops-v1"
    assert asked == owners.split()
