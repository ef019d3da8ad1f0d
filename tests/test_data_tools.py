"""data/prepare.py and data/download.py: the sample, formats, determinism, CaseOps, faults.

No network: the downloader runs, by huggingface_hub, against a repository served on 127.0.0.1.
"""

import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
SAMPLE = DATA / "sample"
MODEL = SAMPLE / "corpus_1024_bpe.model"
sys.path.insert(0, str(DATA))

import caseops  # noqa: E402
import download  # noqa: E402
import prepare  # noqa: E402

import train_gpt  # noqa: E402

DOCUMENTS = [
    f"Document {i}: the quick brown fox, {i * i} times.\nA second line.\n" for i in range(60)
]


def read_shard(path):
    raw = path.read_bytes()
    return np.frombuffer(raw[:1024], "<i4"), np.frombuffer(raw[1024:], "<u2")


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_plain(path, documents):
    path.write_text("\n\x1e\n".join(documents) + "\n", encoding="utf-8")
    return path


def write_jsonl(path, documents, key="text"):
    path.write_text("".join(json.dumps({key: d}) + "\n" for d in documents), encoding="utf-8")
    return path


def run_prepare(out, *settings):
    """prepare.main in this process with the sample's tokenizer; returns the parsed manifest."""
    settings = [str(each) for each in settings]
    if "--train-tokenizer" not in settings and "--tokenizer" not in settings:
        settings += ["--tokenizer", str(MODEL)]
    if "--procs" not in settings:
        settings += ["--procs", "1"]
    prepare.main(["--out", str(out), *settings])
    return json.loads((out / "manifest.json").read_text())


@pytest.fixture
def corpus(tmp_path):
    """Plain files train.txt (50 documents) and val.txt (10)."""
    train = write_plain(tmp_path / "train.txt", DOCUMENTS[:50])
    return train, write_plain(tmp_path / "val.txt", DOCUMENTS[50:])


# ---- prepare.py: output --------------------------------------------------------------------------


def test_sample_is_rebuilt_byte_for_byte_by_two_processes(tmp_path):
    command = [sys.executable, str(DATA / "prepare.py"), "--sample", "--procs", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "difference:0 verdict:ok" in done.stdout
    for name, content in folder_bytes(tmp_path).items():
        assert content == (SAMPLE / name).read_bytes(), name
    assert len(folder_bytes(tmp_path)) == 4


def test_sample_manifest_lists_what_the_folder_holds():
    manifest = json.loads((SAMPLE / "manifest.json").read_text())
    tokenizer = manifest["tokenizer"]
    for name, sha256 in [
        (tokenizer["file"], tokenizer["sha256"]),
        *((each["name"], each["sha256"]) for each in manifest["files"]),
    ]:
        assert hashlib.sha256((SAMPLE / name).read_bytes()).hexdigest() == sha256, name


def test_output_does_not_depend_on_process_count(tmp_path, monkeypatch, corpus):
    monkeypatch.setattr(prepare, "BATCH_DOCUMENTS", 3)  # many batches, so that order could differ
    settings = ["--input", *corpus, "--val-fraction", 0.3, "--shard-tokens", 100]
    run_prepare(tmp_path / "one", *settings, "--train-tokenizer", 300, "--procs", 1)
    run_prepare(tmp_path / "two", *settings, "--train-tokenizer", 300, "--procs", 2)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_shards_hold_header_bos_and_every_document(tmp_path, corpus):
    manifest = run_prepare(tmp_path / "out", "--train", corpus[0], "--val", corpus[1])
    sp = spm.SentencePieceProcessor(model_file=str(MODEL))
    for split, documents in (("train", DOCUMENTS[:50]), ("val", DOCUMENTS[50:])):
        header, tokens = read_shard(tmp_path / "out" / f"fineweb_{split}_000000.bin")
        assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
        starts = np.flatnonzero(tokens == sp.bos_id())
        texts = [sp.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]
        assert starts[0] == 0 and texts == [" ".join(d.split()) for d in documents]
        assert sp.eos_id() not in tokens
        sums = manifest["splits"][split]
        assert (sums["documents"], sums["tokens"]) == (len(documents), len(tokens))
        assert sums["decoded_bytes"] == sum(len(text.encode()) for text in texts)


def test_small_shards_join_to_the_same_stream(tmp_path, corpus):
    whole = run_prepare(tmp_path / "whole", "--train", corpus[0], "--val", corpus[1])
    parts = run_prepare(
        tmp_path / "parts", "--train", corpus[0], "--val", corpus[1], "--shard-tokens", 128
    )
    shards = [each for each in parts["files"] if each["split"] == "train"]
    assert all(each["tokens"] == 128 for each in shards[:-1]) and len(shards) > 3
    stream = np.concatenate([read_shard(tmp_path / "parts" / s["name"])[1] for s in shards])
    assert np.array_equal(stream, read_shard(tmp_path / "whole" / "fineweb_train_000000.bin")[1])
    assert parts["splits"] == whole["splits"]


def test_hash_split_keeps_each_document_in_its_split(tmp_path):
    def split(documents):
        args = prepare.build_parser().parse_args(
            ["--input", str(write_jsonl(tmp_path / "docs.jsonl", documents)), "--val-fraction=0.3"]
        )
        return {text: split for split, text in prepare.labelled_documents(args)}

    before, after = split(DOCUMENTS), split(["one more", *reversed(DOCUMENTS)])
    assert after == before | {"one more": after["one more"]}
    assert 5 < sum(each == "val" for each in before.values()) < 35
    # Pinned: a change of the hash would move documents between training and validation.
    assert prepare.text_hash(" stable\n") == prepare.text_hash("stable") == 0x5BFC0C64EFC10306


def test_val_first_takes_the_first_documents(tmp_path):
    path = write_jsonl(tmp_path / "docs.jsonl", DOCUMENTS)
    manifest = run_prepare(tmp_path / "out", "--input", path, "--val-first", 7)
    assert manifest["splits"]["val"]["documents"] == 7
    assert manifest["splits"]["train"]["documents"] == 53


def compress(path, suffix):
    raw, target = path.read_bytes(), path.with_name(path.name + suffix)
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard", reason=".zst input needs zstandard")
        half = len(raw) // 2  # two frames: tools that compress in parallel write many
        target.write_bytes(zstandard.compress(raw[:half]) + zstandard.compress(raw[half:]))
    else:
        target.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}[suffix](raw))
    return target


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "plain"])
def test_every_input_form_gives_the_same_documents(tmp_path, kind, suffix):
    if kind == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS, key="body")
    else:
        path = write_plain(tmp_path / "a.txt", DOCUMENTS)
    for each in (path, compress(path, suffix)):
        assert list(prepare.read_documents([each], "body")) == DOCUMENTS


def test_long_documents_are_cut_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_DOCUMENT_CHARS", 100)
    text = "word " * 50 + "x" * 250 + "\nline" * 40
    for path in (
        write_jsonl(tmp_path / "a.jsonl", [text]),
        write_plain(tmp_path / "a.txt", [text]),
    ):
        labelled = (("val", each) for each in prepare.read_documents([path], "text"))
        parts = [part for batch in prepare.batches(labelled) for _, part in batch]
        assert max(map(len, parts)) <= 100
        assert "".join(parts).replace("\n", "") == text.replace("\n", "")


def test_lone_surrogates_of_json_become_replacement_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert list(prepare.read_documents([path], "text")) == ["a\ufffdb", "\U0001f600"]


def test_trained_tokenizer_has_the_challenge_settings(tmp_path, corpus):
    manifest = run_prepare(
        tmp_path / "out", "--train", corpus[0], "--val", corpus[1], "--train-tokenizer", 300
    )
    sp = spm.SentencePieceProcessor(model_file=str(tmp_path / "out" / "fineweb_300_bpe.model"))
    assert manifest["tokenizer"]["vocab_size"] == sp.vocab_size() == 300
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert sum(sp.is_byte(i) for i in range(300)) == 256
    assert not sp.encode("fox", out_type=str)[0].startswith("\u2581")  # no dummy prefix
    assert len(sp.encode("11", out_type=str)) == 2  # digits split
    assert sp.decode(sp.encode("naïve \u2603")) == "naïve \u2603"  # byte fallback


def test_blank_records_are_documents_and_blank_stretches_of_plain_text_are_not(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", ["one", "", "two"])  # the exporter writes a lone BOS
    plain = write_plain(tmp_path / "a.txt", ["one", " ", "two"])
    assert list(prepare.read_documents([jsonl], "text")) == ["one", "", "two"]
    assert list(prepare.read_documents([plain], "text")) == ["one", "two"]
    manifest = run_prepare(tmp_path / "out", "--train", jsonl, "--val", plain)
    tokens = read_shard(tmp_path / "out" / "fineweb_train_000000.bin")[1]
    assert (tokens == 1).sum() == manifest["splits"]["train"]["documents"] == 3


# ---- CaseOps -------------------------------------------------------------------------------------

CASED = ["The NASA launch of McDonald's iPhone, A to Z.\n", "naïve CAFE\u0301 E\u0301 ﬁne", "x \ue001\ue004 Y"]


@pytest.mark.parametrize(
    "text, coded",
    [
        ("the cat", "the cat"),
        ("The A", "1the 1a"),
        ("NASA", "2nasa"),
        ("iPhone tHE", "i3phone t3h3e"),
        ("McDonald's ABc", "1mc3donald's 1a3bc"),
        ("ÉA é", "É1a é"),
        ("\ue001\ue004", "4\ue0014\ue004"),
    ],
)
def test_case_ops_writes_the_public_format(text, coded):
    symbols = str.maketrans("1234", "\ue001\ue002\ue003\ue004")
    assert caseops.encode(text) == coded.translate(symbols)


@given(st.text(st.one_of(st.sampled_from("abYZ '\n1éÉ" + "".join(caseops.MARKS)), st.characters())))
def test_case_ops_loses_nothing(text):
    coded = caseops.encode(text)
    assert caseops.decode(coded) == text
    assert len(caseops.bare(coded).encode("utf-8", "replace")) == len(
        text.encode("utf-8", "replace")
    )
    assert not re.search("[A-Z]", coded)


@pytest.fixture
def cased(tmp_path):
    """(folder, manifest) of a CaseOps export of texts with all kinds of capitals, in small shards."""
    train = write_jsonl(tmp_path / "train.jsonl", DOCUMENTS[:50] + CASED)
    val = write_jsonl(tmp_path / "val.jsonl", DOCUMENTS[50:] + CASED + [""])
    settings = ["--train-tokenizer", 330, "--case-ops", "--shard-tokens", 100]
    return tmp_path / "out", run_prepare(
        tmp_path / "out", "--train", train, "--val", val, *settings
    )


def test_sidecar_has_the_original_bytes_of_every_document(cased):
    out, manifest = cased
    sp = spm.SentencePieceProcessor(model_file=str(out / "fineweb_330_bpe_caseops.model"))
    shards = [read_shard(path)[1] for path in sorted(out.glob("fineweb_val_0*.bin"))]
    sidecars = [read_shard(path)[1] for path in sorted(out.glob("fineweb_val_bytes_*.bin"))]
    assert len(shards) > 2 and list(map(len, shards)) == list(map(len, sidecars))
    tokens, counts = np.concatenate(shards), np.concatenate(sidecars)
    starts = np.flatnonzero(tokens == sp.bos_id())
    found = [int(part.sum()) for part in np.split(counts, starts[1:])]
    documents = [sp.normalize(d).replace("\u2581", " ").strip() for d in DOCUMENTS[50:] + CASED]
    assert found == [len(text.encode()) for text in documents] + [0]
    sums = manifest["splits"]["val"]
    assert sums["counted_bytes"] == sums["decoded_bytes"] == sum(found)
    assert manifest["tokenizer"]["text_transform"] == "lossless_caps_caseops_v1"


def open_cased(out):
    """train_gpt's view of the export."""
    return train_gpt.open_data(
        tiny_config(
            data_path=str(out),
            tokenizer_path=str(out / "fineweb_330_bpe_caseops.model"),
            vocab_size=330,
        )
    )


class Uniform:
    """A model that gives every token the same probability."""

    def __init__(self, cfg):
        self.cfg = cfg

    def __call__(self, ids, state=None, cu_seqlens=None):
        return train_gpt.torch.zeros(*ids.shape, 330), None

    def parameters(self):
        return iter([train_gpt.torch.zeros(1)])


@pytest.mark.parametrize("method", ["roundtrip", "sliding", "exact"])
def test_score_is_by_the_sidecars_bytes(cased, method):
    out, manifest = cased
    data, cfg = open_cased(out), tiny_config(eval_spans=3, eval_warmup_tokens=16)
    ledger = train_gpt.evaluate(Uniform(cfg), data.val, data.table, method)
    assert ledger.bytes == manifest["splits"]["val"]["counted_bytes"]
    assert ledger.bpb == pytest.approx(ledger.tokens * np.log2(330) / ledger.bytes)
    # All but the escaped symbols is also in the table, which held-out training text is scored by.
    plain = train_gpt.evaluate(Uniform(cfg), data.val, data.table._replace(sidecar=None), method)
    assert ledger.bytes - plain.bytes == 2 * len(caseops.ESC.encode())


def test_run_check_holds_for_the_sidecar_and_finds_wrong_ones(cased):
    data = open_cased(cased[0])
    slack = train_gpt.CASE_SLACK

    def check(sidecar):
        counted, by_text = train_gpt.decoded_bytes(data.sp, data.val, 1, 10**6, sidecar)
        return abs(counted - by_text) / by_text

    assert check(data.table.sidecar) == 0
    of_marks = np.isin(data.val, train_gpt.case_marks(data.sp))
    assert check(data.table.sidecar + 3 * of_marks) > slack  # bytes of the transformed text
    assert check(np.roll(data.table.sidecar, 50)) > slack  # of other tokens
    assert train_gpt.CASE_MARKS == "".join(caseops.MARKS)


def rewrite(path, change):
    """Put change(tokens) into a shard."""
    tokens = change(read_shard(path)[1].copy())
    path.write_bytes(prepare.shard_header(len(tokens)) + tokens.astype("<u2").tobytes())


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda path: path.unlink(), r"holds \[100.*\] counts, the validation shards \[100"),
        (lambda path: rewrite(path, lambda counts: counts[:-1]), "counts, the validation shards"),
        (lambda path: rewrite(path, lambda counts: np.roll(counts, 1)), "belongs to other tokens"),
        (lambda path: rewrite(path, lambda counts: counts + (counts > 0)), "manifest.json says"),
        (lambda path: [p.unlink() for p in path.parent.glob("*_bytes_*")], "missing.*CaseOps marks"),
    ],
)
def test_a_sidecar_that_does_not_fit_is_refused(cased, change, expected):
    change(cased[0] / "fineweb_val_bytes_000000.bin")
    with pytest.raises(train_gpt.DataError, match=expected):
        open_cased(cased[0])


def test_case_ops_and_tokenizer_must_fit(tmp_path, capsys, cased, corpus):
    settings = ["--train", corpus[0], "--val", corpus[1]]
    message = refusal(capsys, run_prepare, tmp_path / "a", *settings, "--case-ops")
    assert "has not the CaseOps symbols" in message
    model = cased[0] / "fineweb_330_bpe_caseops.model"
    message = refusal(capsys, run_prepare, tmp_path / "a", *settings, "--tokenizer", model)
    assert "add --case-ops" in message


# ---- prepare.py: refusals ------------------------------------------------------------------------


def refusal(capsys, function, *args):
    """The one-line message of a command that must fail."""
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    message = str(stopped.value)
    assert "Traceback" not in message and "Traceback" not in capsys.readouterr().err
    return message


def test_existing_shards_are_replaced_with_force_only(tmp_path, capsys, corpus):
    out, settings = tmp_path / "out", ["--train", corpus[0], "--val", corpus[1]]
    run_prepare(out, *settings, "--shard-tokens", 128)
    before = folder_bytes(out)
    assert "--force" in refusal(capsys, run_prepare, out, *settings)
    assert folder_bytes(out) == before
    run_prepare(out, *settings, "--force")
    assert len(list(out.glob("fineweb_train_*.bin"))) == 1  # no shard of the first run stays


def test_failure_leaves_nothing_behind(tmp_path, capsys, corpus):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "fine"}) + "\n{broken\n")
    message = refusal(capsys, run_prepare, tmp_path / "out", "--train", bad, "--val", corpus[1])
    assert "bad.jsonl, line 2" in message
    assert not list((tmp_path / "out").iterdir())


def test_bad_input_is_named(tmp_path, capsys, corpus):
    blank, binary = tmp_path / "blank.txt", tmp_path / "binary.txt"
    blank.write_text("\n\x1e\n \n")
    binary.write_bytes(b"fine\n\xff\xfe\n")
    other_key = write_jsonl(tmp_path / "key.jsonl", ["a"], key="body")
    for path, expected in [
        (tmp_path / "absent.txt", "absent.txt: no such file"),
        (tmp_path, "a folder"),
        (blank, "no document"),
        (binary, "binary.txt: line 2 is not UTF-8"),
        (other_key, "--text-key"),
    ]:
        out = tmp_path / "out"
        assert expected in refusal(capsys, run_prepare, out, "--train", path, "--val", corpus[1])
    message = refusal(capsys, run_prepare, out, "--train", *corpus, "--val", corpus[1])
    assert "val.txt stands in both" in message
    message = refusal(capsys, run_prepare, out, "--input", *corpus)
    assert "--val-fraction" in message


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_truncated_compressed_file_is_an_error(tmp_path, capsys, corpus, suffix):
    path = compress(corpus[0], suffix)
    path.write_bytes(path.read_bytes()[:-9])
    message = refusal(capsys, run_prepare, tmp_path / "out", "--train", path, "--val", corpus[1])
    assert f"train.txt{suffix}: truncated or damaged" in message


def test_unusable_tokenizers_are_refused(tmp_path, capsys, monkeypatch, corpus):
    settings = ["--train", corpus[0], "--val", corpus[1]]
    fake = tmp_path / "fake.model"
    fake.write_bytes(b"not a model")
    out = tmp_path / "out"
    assert "not a Sentence" in refusal(capsys, run_prepare, out, *settings, "--tokenizer", fake)
    for vocab_size in (100, 65537):
        message = refusal(capsys, run_prepare, out, *settings, "--train-tokenizer", vocab_size)
        assert "65536" in message
    monkeypatch.setattr(prepare, "MAX_VOCAB", 1023)  # as if the model had too many pieces
    assert "does not fit" in refusal(capsys, run_prepare, out, *settings)


def test_byte_table_that_disagrees_with_the_text_is_refused(tmp_path, capsys, monkeypatch, corpus):
    monkeypatch.setattr(prepare, "make_byte_counter", lambda *_: lambda tokens: 0 * tokens + 9)
    message = refusal(
        capsys, run_prepare, tmp_path / "out", "--train", corpus[0], "--val", corpus[1]
    )
    assert "byte table" in message


# ---- download.py ---------------------------------------------------------------------------------


def shard_bytes(num_tokens, fill):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, num_tokens
    return header.tobytes() + np.full(num_tokens, fill, "<u2").tobytes()


def published_files():
    """{path in the repository: content} of a small export in the challenge's layout."""
    folder = "datasets/datasets/fineweb10B_sp1024"
    files = {f"{folder}/fineweb_train_{i:06d}.bin": shard_bytes(50 + i, i) for i in range(3)}
    files[f"{folder}/fineweb_val_000000.bin"] = shard_bytes(40, 9)
    files["datasets/tokenizers/fineweb_1024_bpe.model"] = b"model"
    files["datasets/docs_selected.jsonl"] = b'{"text": "a"}\n'
    docs_sha256 = hashlib.sha256(files["datasets/docs_selected.jsonl"]).hexdigest()
    files["datasets/docs_selected.source_manifest.json"] = json.dumps(
        {"docs_sha256": docs_sha256}
    ).encode()
    manifest = {
        "shard_size": 50,
        "datasets": [
            {
                "name": "fineweb10B_sp1024",
                "tokenizer_name": "sp_bpe_1024",
                "stats": {"files_train": 3, "files_val": 1, "tokens_val": 40},
            }
        ],
        "tokenizers": [{"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }
    files["datasets/manifest.json"] = json.dumps(manifest).encode()
    return files


class Server:
    """The files over HTTP, at the hub's addresses.

    faults: {end of path: [fault, ...]}, one used up by each GET: 503, altered (the last byte), cut
    (half of the answer, then nothing).   fetched: (path, first byte asked for) of each GET.
    """

    def __init__(self):
        self.files, self.faults, self.fetched = published_files(), {}, []
        self.has_ranges = True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(with_body=False)

            def do_GET(self):
                self.answer(with_body=True)

            def answer(self, with_body):
                path = self.path.split("?")[0].partition("/resolve/main/")[2]
                whole = server.files.get(path)
                first = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[0])
                fault = server.take_fault(path, first) if with_body else None
                first = first if server.has_ranges else 0
                absent = whole is None or fault == "503"
                body = b"" if absent else whole[first:]
                self.send_response(503 if fault else 404) if absent else self.send_response(
                    206 if first else 200
                )
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("ETag", f'"{hashlib.sha256(whole or b"").hexdigest()}"')
                self.send_header("Content-Length", str(len(body)))
                if first:
                    last = first + len(body) - 1
                    self.send_header("Content-Range", f"bytes {first}-{last}/{first + len(body)}")
                self.end_headers()
                if with_body and fault == "cut":
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                elif with_body and body:
                    self.wfile.write(body[:-1] + b"?" if fault == "altered" else body)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def take_fault(self, path, first):
        """Note a GET; returns its fault, or None."""
        self.fetched.append((path.rsplit("/")[-1], first))
        waiting = next((v for k, v in self.faults.items() if path.endswith(k)), [])
        return waiting.pop(0) if waiting else None

    def edit_manifest(self, edit):
        """Publish what edit(manifest) made of the manifest."""
        manifest = json.loads(self.files["datasets/manifest.json"])
        edit(manifest)
        self.files["datasets/manifest.json"] = json.dumps(manifest).encode()

    def stop(self):
        """Refuse connections from now on; a second call does nothing."""
        if self.thread.is_alive():
            self.http.shutdown()
            self.thread.join()
            self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("huggingface_hub", reason="download.py needs it, train_gpt.py does not")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server()
    yield running
    running.stop()


def run_download(server, root, *settings):
    """download.main against the server; returns the waits between tries, in seconds."""
    waits = []
    settings = ["--root", str(root), "--train-shards", "2", *settings]
    repository = download.HubRepository("some/repo", "main", server.url)
    download.main(settings, repository, waits.append)
    return waits


def run_script(server, root, *settings, **keywords):
    """download.py as a process of its own, by its environment variables."""
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(root / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MATCHED_FINEWEB_REPO_ID": "some/repo",
    }
    command = [sys.executable, str(DATA / "download.py"), "--root", str(root / "data"), *settings]
    environment |= keywords.pop("environment", {})
    return subprocess.run(command, env=environment, capture_output=True, text=True, **keywords)


def landed(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


FOLDER = "datasets/fineweb10B_sp1024"
LAYOUT = [
    f"{FOLDER}/fineweb_train_000000.bin",
    f"{FOLDER}/fineweb_train_000001.bin",
    f"{FOLDER}/fineweb_val_000000.bin",
    f"{FOLDER}/source.json",
    "manifest.json",
    "tokenizers/fineweb_1024_bpe.model",
]


def test_download_lands_in_the_challenge_layout(tmp_path, server, capsys):
    assert run_download(server, tmp_path, "--with-docs") == []
    documents = ["docs_selected.jsonl", "docs_selected.source_manifest.json"]
    assert landed(tmp_path) == sorted(LAYOUT + documents)
    for name in LAYOUT[:3]:
        assert (tmp_path / name).read_bytes() == server.files[f"datasets/{name}"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"DATA_PATH={tmp_path / FOLDER} TOKENIZER_PATH={tmp_path}/tokenizers/fineweb_1024_bpe.model "
        "VOCAB_SIZE=1024"
    )


@pytest.mark.parametrize("fault", ["503", "altered"])
def test_download_tries_again_after_a_fault(tmp_path, server, fault):
    server.faults = {"fineweb_train_000001.bin": [fault, fault]}
    assert run_download(server, tmp_path) == [1.0, 2.0]
    assert landed(tmp_path) == LAYOUT
    name = LAYOUT[1]
    assert (tmp_path / name).read_bytes() == server.files[f"datasets/{name}"]


def test_download_resumes_within_a_file_after_a_cut(tmp_path, server):
    server.faults = {"fineweb_train_000001.bin": ["cut", "cut"]}
    assert run_download(server, tmp_path) == [1.0, 2.0]
    whole = server.files[f"datasets/{LAYOUT[1]}"]
    asked = [first for name, first in server.fetched if name == "fineweb_train_000001.bin"]
    assert asked == [0, len(whole) // 2, len(whole) // 2 + len(whole) // 4]
    assert (tmp_path / LAYOUT[1]).read_bytes() == whole


def test_download_starts_a_file_anew_where_the_server_cannot_resume(tmp_path, server):
    server.has_ranges, server.faults = False, {"fineweb_train_000001.bin": ["cut"]}
    assert run_download(server, tmp_path) == [1.0]
    assert (tmp_path / LAYOUT[1]).read_bytes() == server.files[f"datasets/{LAYOUT[1]}"]


def test_a_second_run_resumes_within_the_file_where_the_first_broke_off(tmp_path, server, capsys):
    server.faults = {"fineweb_train_000001.bin": ["cut"] + ["503"] * 9}
    message = refusal(capsys, run_download, server, tmp_path, "--retries", "1")
    assert "fineweb_train_000001.bin in 2 tries" in message and "503" in message
    server.faults = {}
    server.fetched.clear()
    run_download(server, tmp_path)
    whole = server.files[f"datasets/{LAYOUT[1]}"]
    asked = [each for each in server.fetched if each[0].endswith(".bin")]
    assert asked == [("fineweb_train_000001.bin", len(whole) // 2)]
    assert (tmp_path / LAYOUT[1]).read_bytes() == whole and landed(tmp_path) == LAYOUT


def test_download_never_names_a_file_that_fails_its_checksum(tmp_path, server, capsys):
    listed = {"name": "fineweb_val_000000.bin", "sha256": "0" * 64}
    server.edit_manifest(lambda manifest: manifest["datasets"][0].update(files=[listed]))
    message = refusal(capsys, run_download, server, tmp_path, "--retries", "1")
    assert "SHA-256" in message and "fineweb_val_000000.bin" in message
    assert "offline" not in message
    assert f"{FOLDER}/fineweb_val_000000.bin" not in landed(tmp_path)


def test_download_keeps_what_is_there_and_replaces_what_is_damaged(tmp_path, server):
    run_download(server, tmp_path, "--train-shards", "1")
    damaged = tmp_path / LAYOUT[2]
    damaged.write_bytes(damaged.read_bytes()[:-2])
    server.fetched.clear()
    run_download(server, tmp_path)
    assert sorted(name for name, _ in server.fetched) == [
        "fineweb_1024_bpe.model",
        "fineweb_train_000001.bin",
        "fineweb_val_000000.bin",
        "manifest.json",
    ]
    altered = tmp_path / LAYOUT[0]
    altered.write_bytes(altered.read_bytes()[:-2] + b"??")
    run_download(server, tmp_path, "--verify")
    assert altered.read_bytes() == server.files[f"datasets/{LAYOUT[0]}"]


def test_download_refuses_to_mix_two_repositories(tmp_path, server, capsys, monkeypatch):
    run_download(server, tmp_path)
    assert "v2" in refusal(capsys, run_download, server, tmp_path, "--revision", "v2")
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "someone/else")
    assert "someone/else" in refusal(capsys, run_download, server, tmp_path)


def test_download_says_what_the_manifest_offers(tmp_path, server, capsys):
    message = refusal(capsys, run_download, server, tmp_path, "--variant", "sp8192")
    assert "fineweb10B_sp1024" in message and "MATCHED_FINEWEB_REPO_ID" in message
    message = refusal(capsys, run_download, server, tmp_path, "--train-shards", "9")
    assert "3 training shards" in message
    assert "sp<vocabulary>" in refusal(capsys, run_download, server, tmp_path, "--variant", "byte")


def test_download_names_a_file_that_the_repository_lacks(tmp_path, server, capsys):
    del server.files[f"datasets/{LAYOUT[1]}"]
    message = refusal(capsys, run_download, server, tmp_path)
    assert "fineweb_train_000001.bin is not in repository some/repo" in message and "404" in message


def test_download_keeps_the_old_manifest_when_the_new_one_is_cut_short(tmp_path, server, capsys):
    run_download(server, tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    server.files["datasets/manifest.json"] = before[: len(before) // 2]
    message = refusal(capsys, run_download, server, tmp_path)
    assert "manifest.json: not whole JSON" in message
    assert (tmp_path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "edit, expected",
    [
        (lambda m: m.pop("tokenizers"), "no list of tokenizers"),
        (lambda m: m["datasets"].append("text"), "no list of datasets"),
        (lambda m: m["tokenizers"].clear(), "names tokenizer sp_bpe_1024"),
        (lambda m: m["tokenizers"][0].update(model_path=None), "no SentencePiece model"),
        (lambda m: m["datasets"][0].pop("stats"), "no shard counts"),
        (lambda m: m["datasets"][0]["stats"].update(files_train=10**9), "impossible shard counts"),
        (lambda m: m["datasets"][0]["stats"].update(tokens_val=41), "40 tokens, the manifest 41"),
        (lambda m: m["datasets"][0].update(files=["a.bin"]), "lists files as 'a.bin'"),
        (lambda m: m["datasets"][0].update(files=[{"bytes": "9"}]), "impossible size or SHA-256"),
    ],
)
def test_download_names_what_is_wrong_with_a_manifest(tmp_path, server, capsys, edit, expected):
    server.edit_manifest(edit)
    assert expected in refusal(capsys, run_download, server, tmp_path)


@pytest.mark.parametrize("path", ["../../../evil.model", "tokenizers/..", "a\\..\\evil", "C:/evil"])
def test_download_refuses_paths_that_lead_elsewhere(tmp_path, server, capsys, path):
    server.edit_manifest(lambda manifest: manifest["tokenizers"][0].update(model_path=path))
    assert "unsafe path" in refusal(capsys, run_download, server, tmp_path / "a" / "root")
    outside = [name for name in landed(tmp_path) if "/.download-sp1024/" not in name]
    assert outside == ["a/root/manifest.json"]


def test_download_brings_the_sidecar_of_a_transformed_variant(tmp_path, server, capsys):
    variant = "fineweb10B_sp1024_caseops"
    folder = f"datasets/datasets/{variant}"
    for split in ("train", "val"):
        name = f"fineweb_{split}_000000.bin"
        server.files[f"{folder}/{name}"] = server.files[f"datasets/{FOLDER}/{name}"]
    server.files[f"{folder}/fineweb_val_bytes_000000.bin"] = shard_bytes(40, 3)
    server.edit_manifest(lambda manifest: manifest["datasets"][0].update(name=variant))
    settings = ["--variant", "sp1024_caseops", "--train-shards", "1"]
    run_download(server, tmp_path, *settings)
    assert f"datasets/{variant}/fineweb_val_bytes_000000.bin" in landed(tmp_path)
    assert "data split:val_bytes shards:1 tokens:40" in capsys.readouterr().out
    (tmp_path / "datasets" / variant / "fineweb_val_bytes_000000.bin").unlink()
    server.files[f"{folder}/fineweb_val_bytes_000000.bin"] = shard_bytes(39, 3)
    message = refusal(capsys, run_download, server, tmp_path, *settings)
    assert "40 tokens, fineweb_val_bytes_*.bin 39" in message


def test_download_offline_message_and_complete_files(tmp_path, server, capsys):
    run_download(server, tmp_path)
    server.stop()
    assert run_download(server, tmp_path) == [1.0, 2.0] * 2  # manifest and tokenizer of before
    message = refusal(capsys, run_download, server, tmp_path / "empty")
    assert "offline" in message and "PRESET=sample" in message


def test_download_without_huggingface_hub_names_the_command(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refusal(capsys, download.main, ["--root", str(tmp_path)])
    assert "pip install --upgrade huggingface_hub" in message


def test_download_that_does_not_fit_the_disk_is_refused_beforehand(
    tmp_path, server, capsys, monkeypatch
):
    usage = type("Usage", (), {"free": download.SPARE_DISK_BYTES + 2000})  # two shards of three
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    message = refusal(capsys, run_download, server, tmp_path)
    assert "3 files need" in message and "--root" in message
    assert not [name for name in landed(tmp_path) if name.endswith(".bin")]


def test_download_stops_at_once_when_the_disk_refuses_a_write(tmp_path, server):
    server.files[f"datasets/{LAYOUT[1]}"] = shard_bytes(400_000, 1)
    limit = 500_000, 500_000  # bytes of a file, for this process: the system's EFBIG
    done = run_script(
        server,
        tmp_path,
        "--train-shards=2",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert done.returncode == 1 and "cannot be written (File too large)" in done.stderr
    assert "retry" not in done.stdout and "Traceback" not in done.stderr
    assert f"data/{LAYOUT[1]}" not in landed(tmp_path)


def test_download_as_a_command_and_offline_by_setting(tmp_path, server):
    done = run_script(server, tmp_path, "--train-shards", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert landed(tmp_path / "data") == LAYOUT
    done = run_script(server, tmp_path / "b", environment={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1 and done.stderr.startswith("download.py: HF_HUB_OFFLINE is set")


def test_progress_bar_shows_share_and_speed_on_a_terminal_only():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    here = [250_000_000]
    with download.ProgressBar(10**9, lambda: here[0], terminal := Terminal()):
        here[0] = 2 * 10**9  # more than wanted: a file that is written and moved at the same time
    last = terminal.getvalue().splitlines()[-1]
    assert "[########################] 100% 1.00/1.00 GB" in last and "MB/s 0 s left" in last
    with download.ProgressBar(10, lambda: 5, pipe := io.StringIO()):
        pass
    assert pipe.getvalue() == ""
