"""logs/tools/publish.py: a folder that works by itself, and its upload to a stand-in of the hub."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import publish
import pytest
from conftest import ROOT, TOKENIZER, enter, files_in, values
from huggingface_hub.errors import HfHubHTTPError

pytestmark = pytest.mark.slow
FILES = ["README.md", "generate.py", "model.artifact", "requirements.txt", "tokenizer.model",
         "train.log", "train_gpt.py"]


@pytest.fixture(scope="module")
def log(tiny, tmp_path_factory):
    """The log of a run of three steps, its artifact beside it."""
    ended = enter(tiny | dict(OUT_DIR=str(tmp_path_factory.mktemp("published")), RUN_ID="tiny"))
    assert ended.code == 0, ended.err
    return ended.folder / "tiny.txt"


@pytest.fixture(scope="module")
def folder(log):
    out = log.parent / "hub"
    assert publish.main([str(log), "--out", str(out)]) == 0
    return out


def test_the_folder_is_whole_and_its_numbers_are_those_of_the_log(log, folder):
    assert files_in(folder) == FILES
    for name, source in (("train_gpt.py", ROOT / "train_gpt.py"), ("train.log", log),
                         ("model.artifact", log.with_suffix(".artifact")),
                         ("tokenizer.model", TOKENIZER)):
        assert (folder / name).read_bytes() == source.read_bytes(), name
    text, card = log.read_text(), (folder / "README.md").read_text()
    final, run = values(text, "final"), values(text, "run")
    size = (folder / "model.artifact").stat().st_size
    for shown in (f"**{float(final['val_bpb']):.4f}** by `exact`", f"{int(final['tokens']):,}",
                  f"{float(final['val_loss']):.4f} nats", f"{size:,} bytes", run["code_sha256"],
                  f"commit {run['commit']}", "EVAL_STRIDE=32"):
        assert shown in card, shown
    assert card.startswith("---\nlicense: mit\n") and "{" not in card


def test_the_printed_command_gives_the_printed_text(folder):
    card = (folder / "README.md").read_text()
    example = re.search(r"(?s)seed 1337:\n\n> (.*?)\n\n", card)[1]
    assert example.startswith("The mayor") and len(example) > 20
    command = re.search(r"^(python generate.*)$", card, re.MULTILINE)[1]
    command = command.replace("python", sys.executable, 1) + " --tokens 60"
    env = dict(os.environ, DEVICE="cpu")
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    assert done.stdout.strip().replace("\n", "\n> ") in card and done.returncode == 0


@pytest.mark.parametrize("change, message", [
    (["--artifact", str(ROOT / "README.md")], "bytes, but the log says"),
    (["--script", str(ROOT / "README.md")], "not the script of the run; get it with `git show"),
    (["--tokenizer", "none.model"], "none.model: no such file; give --tokenizer FILE"),
    (["--upload", "nobody"], "expected USER/NAME"), (["--prompt", "$(id)"], "would break"),
    (["--out", str(ROOT)], "is not empty; give another --out")])
def test_refused_in_one_line(log, tmp_path, change, message, capsys):
    assert publish.main([str(log), "--out", str(tmp_path / "new"), *change]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "new").exists()


def test_an_unfinished_log_is_refused(log, tmp_path, capsys):
    (tmp_path / "cut.txt").write_text(log.read_text().split("\ncompliance")[0])
    assert publish.main([str(tmp_path / "cut.txt"), "--out", str(tmp_path / "new")]) == 2
    assert "not the log of a finished run" in capsys.readouterr().err


@pytest.fixture
def hub(monkeypatch):
    """The library's client, whose calls must fit the installed version; nothing is sent."""
    api = mock.create_autospec(huggingface_hub.HfApi, instance=True)
    api.upload_folder.return_value = SimpleNamespace(commit_url="https://hub/commit/c0ffee")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_right")
    return api


@pytest.mark.parametrize("options, private", [([], True), (["--public"], False)])
def test_upload_sends_the_folder(hub, log, tmp_path, monkeypatch, capsys, options, private):
    monkeypatch.setattr(publish, "example_text", lambda *_: "The mayor said")
    command = [str(log), "--out", str(tmp_path / "new")]
    assert publish.main([*command, "--upload", "ada/golf", *options]) == 0
    [created], [sent] = hub.create_repo.call_args_list, hub.upload_folder.call_args_list
    assert created.args == ("ada/golf",) and created.kwargs["private"] == private
    assert sent.kwargs["repo_id"] == "ada/golf"
    assert files_in(Path(sent.kwargs["folder_path"])) == FILES
    assert capsys.readouterr().out.endswith("\nhttps://hub/commit/c0ffee\n")
    assert publish.main([str(log), "--out", str(tmp_path / "b")]) == 0  # without --upload nothing
    assert hub.upload_folder.call_count == 1


def test_without_the_right_login_nothing_is_sent(hub, folder, monkeypatch):
    hub.create_repo.side_effect = HfHubHTTPError("Invalid\ncredentials", response=mock.Mock())
    with pytest.raises(publish.ReportError, match="Invalid credentials; the folder .* is ready"):
        publish.upload(folder, "ada/golf", public=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(publish.ReportError, match="no login; run `hf auth login` first"):
        publish.upload(folder, "ada/golf", public=False)
    assert not hub.upload_folder.called
