"""data/prepare.py and data/download.py: the sample, formats, determinism, faults.

No network and no huggingface_hub needed: the downloader runs against a repository served on
127.0.0.1; one test goes through huggingface_hub where it is installed.
"""

import gzip
import hashlib
import http.server
import json
import lzma
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
SAMPLE = DATA / "sample"
MODEL = SAMPLE / "corpus_1024_bpe.model"
sys.path.insert(0, str(DATA))

import download  # noqa: E402
import prepare  # noqa: E402

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
    message = refusal(capsys, run_prepare, out, "--train", "absent.txt", "--val", corpus[1])
    assert "--force" in message  # said before any text is read
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
    monkeypatch.setattr(prepare, "make_byte_counter", lambda sp: lambda tokens: 2 * len(tokens))
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
    """The files over HTTP, at the hub's addresses; faults: {end of path: [fault, ...]} used up."""

    def __init__(self):
        self.files, self.faults, self.fetched = published_files(), {}, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(with_body=False)

            def do_GET(self):
                self.answer(with_body=True)

            def answer(self, with_body):
                path = self.path.split("?")[0].partition("/resolve/main/")[2]
                body, fault = server.files.get(path), None
                if with_body:
                    server.fetched.append(path)
                    waiting = next((v for k, v in server.faults.items() if path.endswith(k)), [])
                    fault = waiting.pop(0) if waiting else None
                self.send_response(404 if body is None else 503 if fault == "503" else 200)
                sha256 = hashlib.sha256(body or b"").hexdigest()
                body = b"" if body is None or fault == "503" else body
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("ETag", f'"{sha256}"')
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if fault == "truncated":
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                elif with_body:
                    self.wfile.write(body[:-1] + b"?" if fault == "altered" else body)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


class PlainRepository:
    """What HubRepository does, by urllib alone."""

    def __init__(self, url):
        self.base = f"{url}/datasets/some/repo/resolve/main"
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def info(self, path):
        try:
            request = urllib.request.Request(f"{self.base}/{path}", method="HEAD")
            with self.open(request) as answer:
                return int(answer.headers["Content-Length"]), answer.headers["ETag"].strip('"')
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise download.DownloadError(f"{path} is not in the repository") from error
            raise

    def get(self, path, folder):
        target = Path(folder) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.open(f"{self.base}/{path}") as answer:
            target.write_bytes(answer.read())
        return target


@pytest.fixture
def server():
    running = Server()
    yield running
    running.stop()


def run_download(server, root, *settings):
    """download.main against the server; returns the waits between tries, in seconds."""
    waits = []
    settings = ["--root", str(root), "--train-shards", "2", *settings]
    download.main(settings, PlainRepository(server.url), waits.append)
    return waits


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
        f"DATA_PATH={tmp_path / FOLDER} TOKENIZER_PATH={tmp_path}/tokenizers/fineweb_1024_bpe.model"
    )


@pytest.mark.parametrize("fault", ["503", "truncated", "altered"])
def test_download_tries_again_after_a_fault(tmp_path, server, fault):
    server.faults = {"fineweb_train_000001.bin": [fault, fault]}
    assert run_download(server, tmp_path) == [1.0, 2.0]
    assert landed(tmp_path) == LAYOUT
    name = LAYOUT[1]
    assert (tmp_path / name).read_bytes() == server.files[f"datasets/{name}"]


def test_download_never_names_a_file_that_fails_its_checksum(tmp_path, server, capsys):
    dataset = json.loads(server.files["datasets/manifest.json"])
    listed = {"name": "fineweb_val_000000.bin", "sha256": "0" * 64}
    dataset["datasets"][0]["files"] = [listed]
    server.files["datasets/manifest.json"] = json.dumps(dataset).encode()
    message = refusal(capsys, run_download, server, tmp_path, "--retries", "1")
    assert "SHA-256" in message and "fineweb_val_000000.bin" in message
    assert f"{FOLDER}/fineweb_val_000000.bin" not in landed(tmp_path)


def test_download_goes_on_where_it_stopped(tmp_path, server):
    run_download(server, tmp_path, "--train-shards", "1")
    damaged = tmp_path / LAYOUT[2]
    damaged.write_bytes(damaged.read_bytes()[:-2])
    server.fetched.clear()
    run_download(server, tmp_path)
    assert sorted(Path(path).name for path in server.fetched) == [
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
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "someone/else")
    assert "someone/else" in refusal(capsys, run_download, server, tmp_path)


def test_download_says_what_the_manifest_offers(tmp_path, server, capsys):
    message = refusal(capsys, run_download, server, tmp_path, "--variant", "sp8192")
    assert "fineweb10B_sp1024" in message and "MATCHED_FINEWEB_REPO_ID" in message
    message = refusal(capsys, run_download, server, tmp_path, "--train-shards", "9")
    assert "3 training shards" in message
    assert "sp<vocabulary>" in refusal(capsys, run_download, server, tmp_path, "--variant", "byte")


def test_download_offline_message_and_complete_files(tmp_path, server, capsys):
    run_download(server, tmp_path)
    server.stop()
    assert run_download(server, tmp_path) == [1.0, 2.0] * 2  # manifest and tokenizer of before
    message = refusal(capsys, run_download, server, tmp_path / "empty")
    assert "offline" in message and "PRESET=sample" in message
    server.stop = lambda: None


def test_download_without_huggingface_hub_names_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refusal(capsys, download.main, ["--root", str(tmp_path)])
    assert "pip install huggingface_hub" in message


def test_download_through_huggingface_hub(tmp_path, server):
    pytest.importorskip("huggingface_hub", reason="the same logic is tested by urllib above")
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "MATCHED_FINEWEB_REPO_ID": "some/repo",
    }
    server.faults = {"fineweb_val_000000.bin": ["503"]}
    command = [sys.executable, str(DATA / "download.py"), "--root", str(tmp_path / "data")]
    command += ["--train-shards", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert landed(tmp_path / "data") == LAYOUT
    shutil.rmtree(tmp_path / "data" / "tokenizers")
    del server.files["datasets/tokenizers/fineweb_1024_bpe.model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "is not in repository some/repo" in done.stderr
