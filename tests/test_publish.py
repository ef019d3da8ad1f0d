"""logs/tools/publish.py: a folder that works by itself, and its upload to a stand-in of the hub.

The stand-in answers the requests of huggingface_hub over HTTP, Git LFS included, and keeps what
it is sent; no other machine is reached.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, SAMPLE, files_in, launch, values
from test_report import TOOLS

import publish  # isort: skip

pytestmark = pytest.mark.slow
FILES = ["README.md", "generate.py", "model.artifact", "requirements.txt", "tokenizer.model",
         "train.log", "train_gpt.py"]


@pytest.fixture(scope="module")
def log(tiny, tmp_path_factory):
    """The log of a run of three steps, its artifact beside it."""
    folder = tmp_path_factory.mktemp("published")
    done = launch(tiny | dict(OUT_DIR=str(folder), RUN_ID="tiny"))
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    return folder / "tiny.txt"


@pytest.fixture(scope="module")
def folder(log):
    """The folder made of it."""
    out = log.parent / "hub"
    assert publish.main([str(log), "--out", str(out)]) == 0
    return out


def test_the_folder_is_whole_and_its_numbers_are_those_of_the_log(log, folder):
    assert files_in(folder) == FILES
    for name, source in (("train_gpt.py", ROOT / "train_gpt.py"), ("train.log", log),
                         ("model.artifact", log.with_suffix(".artifact")),
                         ("tokenizer.model", SAMPLE / "corpus_1024_bpe.model")):
        assert (folder / name).read_bytes() == source.read_bytes(), name
    text, card = log.read_text(), (folder / "README.md").read_text()
    final, run = values(text, "final"), values(text, "run")
    size = (folder / "model.artifact").stat().st_size
    for shown in (f"**{float(final['val_bpb']):.4f}** by `exact`", f"{int(final['tokens']):,}",
                  f"{float(final['val_loss']):.4f} nats", f"{size:,} bytes", run["code_sha256"],
                  f"commit {run['commit']}", "EVAL_STRIDE=32"):
        assert shown in card, shown
    example = re.search(r"(?s)seed 1337:\n\n> (.*?)\n\n", card)[1]
    assert example.startswith("The mayor") and len(example) > 20
    assert card.startswith("---\nlicense: mit\n") and "{" not in card


def test_the_printed_command_gives_the_printed_text(folder):
    card = (folder / "README.md").read_text()
    command = re.search(r"^(python generate.*)$", card, re.MULTILINE)[1]
    command = command.replace("python", sys.executable, 1) + " --tokens 60"
    env = dict(os.environ, DEVICE="cpu")
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    assert done.stdout.strip().replace("\n", "\n> ") in card and done.returncode == 0


@pytest.mark.parametrize("change, message", [
    (["--artifact", str(TOOLS / "report.py")], "bytes, but the log says"),
    (["--script", str(TOOLS / "report.py")], "not the script of the run; get it with `git show"),
    (["--tokenizer", "none.model"], "none.model: no such file; give --tokenizer FILE"),
    (["--upload", "nobody"], "expected USER/NAME"), (["--prompt", "$(id)"], "would break"),
    (["--out", str(TOOLS)], "is not empty; give another --out")])
def test_refused_in_one_line(log, tmp_path, change, message, capsys):
    assert publish.main([str(log), "--out", str(tmp_path / "new"), *change]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "new").exists()


def test_an_unfinished_log_is_refused(log, tmp_path, capsys):
    (tmp_path / "cut.txt").write_text(log.read_text().split("\ncompliance")[0])
    assert publish.main([str(tmp_path / "cut.txt"), "--out", str(tmp_path / "new")]) == 2
    assert "not the log of a finished run" in capsys.readouterr().err


# ---- the upload ----------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """A model repository that keeps commits and LFS objects; one token is known."""

    def log_message(self, *_):
        """Print nothing."""

    def answer(self, body, code=200):
        """Send a JSON object."""
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        """The request's bytes, sent whole or in pieces."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_POST(self):
        """Create a repository, sort files into regular and LFS, commit."""
        data = self.body()
        kept = self.server.kept
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid credentials"}, 401)
        address = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/validate-yaml":  # of the model card
            good = "\nlicense: mit\n" in json.loads(data)["content"]
            errors = [] if good else [{"message": "no license"}]
            return self.answer({"errors": errors, "warnings": []}, 200 if good else 400)
        if self.path == "/api/repos/create":
            kept["repo"] = json.loads(data)
            return self.answer({"url": f"{address}/ada/golf"})
        if self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(data)["files"]]
            modes = ["lfs" if path.endswith(".artifact") else "regular" for path in paths]
            return self.answer({"files": [dict(path=p, uploadMode=m, shouldIgnore=False)
                                          for p, m in zip(paths, modes)]})
        if self.path.endswith("/info/lfs/objects/batch"):
            found = json.loads(data)["objects"]
            actions = [o | {"actions": {"upload": {"href": f"{address}/lfs/{o['oid']}"}}}
                       for o in found]
            return self.answer({"transfer": "basic", "objects": actions})
        if self.path.endswith("/commit/main"):
            kept["commit"] = [json.loads(line) for line in data.splitlines()]
            return self.answer({"success": True, "commitOid": "c0ffee",
                                "commitUrl": f"{address}/ada/golf/commit/c0ffee"})
        return self.answer({"error": f"unexpected {self.path}"}, 404)

    def do_PUT(self):
        """An LFS object."""
        self.server.kept["lfs"][self.path.rsplit("/", 1)[1]] = self.body()
        self.answer({})

    def do_GET(self):
        """Questions about the repository: it is empty."""
        self.answer({"id": "ada/golf", "siblings": [], "sha": "0", "private": True})


@pytest.fixture
def hub():
    """A running stand-in; `kept` is what it was sent."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.kept = {"lfs": {}}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def upload(hub, folder, token):
    """publish.upload against the stand-in, as its own process: (exit code, stdout, stderr)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | dict(
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HOME=str(folder / "no_login"),
        HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", PYTHONPATH=str(TOOLS), **token)
    code = f"import publish; print(publish.upload({str(folder)!r}, 'ada/golf', public=False))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                          timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_upload_sends_every_file_to_a_private_repository(hub, folder):
    code, out, err = upload(hub, folder, {"HF_TOKEN": "hf_right"})
    assert code == 0, err
    assert out.endswith("/ada/golf/commit/c0ffee\n")
    assert hub.kept["repo"]["name"] == "golf" and hub.kept["repo"].get(
        "visibility", hub.kept["repo"].get("private")) in ("private", True), hub.kept["repo"]
    sent = {}
    for line in hub.kept["commit"]:
        if line["key"] == "file":
            sent[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        if line["key"] == "lfsFile":
            sent[line["value"]["path"]] = hub.kept["lfs"][line["value"]["oid"]]
    assert sorted(sent) == FILES
    for name in FILES:
        assert sent[name] == (folder / name).read_bytes(), name
    [oid] = hub.kept["lfs"]
    assert oid == hashlib.sha256(sent["model.artifact"]).hexdigest()


@pytest.mark.parametrize("token, message", [({}, "no login; run `hf auth login` first"),
                                            ({"HF_TOKEN": "hf_wrong"}, "is ready")])
def test_without_the_right_login_nothing_is_sent(hub, folder, token, message):
    code, _, err = upload(hub, folder, token)
    assert code == 1 and message in err.strip().splitlines()[-1]
    assert hub.kept == {"lfs": {}}


def test_the_command_uploads_only_if_it_is_asked_to(log, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(publish, "example_text", lambda *_: "The mayor said")
    monkeypatch.setattr(publish, "upload", lambda *given: calls.append(given) or "address")
    for name, options in (("a", []), ("b", ["--upload", "ada/golf"]),
                          ("c", ["--upload", "ada/golf", "--public"])):
        assert publish.main([str(log), "--out", str(tmp_path / name), *options]) == 0
    assert calls == [(str(tmp_path / "b"), "ada/golf", False),
                     (str(tmp_path / "c"), "ada/golf", True)]
    assert capsys.readouterr().out.endswith("\naddress\n")
