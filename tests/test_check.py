"""logs/tools/check.py: a good submission folder, and one fault after another."""

import hashlib
import json
import re
from pathlib import Path

import check
import pytest
import report
from test_report import BPBS, CODE, MODEL_BYTES, SEEDS, TOTAL, TYPED, log_text


def make_folder(folder, code=CODE):
    """A submission folder without a fault; `code` is its script."""
    folder.mkdir()
    (folder / "train_gpt.py").write_bytes(code)
    (folder / "requirements.txt").write_text("torch\n")
    total = MODEL_BYTES + len(code)
    for seed, bpb in zip(SEEDS, BPBS):
        text = log_text(seed, bpb, hashlib.sha256(code).hexdigest()).replace(str(TOTAL), str(total))
        text = text.replace(f"code_bytes:{len(CODE)}", f"code_bytes:{len(code)}")
        (folder / f"train_seed{seed}.log").write_text(text)
    out = report.submission(report.collect(sorted(folder.glob("*.log"))), TYPED)
    (folder / "submission.json").write_text(json.dumps(out))
    rows = [f"| {seed} | 6020 | {bpb:.5f} | {total:,} |" for seed, bpb in zip(SEEDS, BPBS)]
    title = f"# Hybrid, Track A: {sum(BPBS) / 3:.5f} ± {out['val_bpb_std']:.5f} bpb"
    (folder / "README.md").write_text("\n".join([title, *rows]))
    return folder


def kinds(folder):
    """Kinds of the faults, without those that verify.py finds too."""
    return {kind for kind, _ in check.review(folder)[0]} - {"verify"}


@pytest.fixture(name="folder")
def good_folder(tmp_path, monkeypatch):
    """A good folder, whose script is not imported: that takes a process."""
    monkeypatch.setattr(check, "check_import", lambda *_: None)
    return make_folder(tmp_path / "2026-11-22_Hybrid")


def test_good_folder(folder, capsys):
    assert check.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "0 fault(s)" in out and "note: syntax of Python 3.10 checked by" in out
    (folder / "requirements.txt").unlink()
    assert check.main([str(folder.rename(folder.with_name("Hybrid")))]) == 1
    out = capsys.readouterr().out
    assert "fault missing_file: requirements.txt" in out and "Hybrid, is not YYYY-MM-DD_" in out
    assert check.main([str(folder)]) == 2 and "no such folder" in capsys.readouterr().err


def edit(name, old, new):
    """A change of one file of a folder: a regular expression, which must match."""
    def change(folder):
        text, found = re.subn(old, new, (folder / name).read_text(), flags=re.MULTILINE)
        assert found, old
        (folder / name).write_text(text)
    return change


def edit_json(change_data):
    """A change of submission.json by a function of its dict."""
    def change(folder):
        data = json.loads((folder / "submission.json").read_text())
        change_data(data)
        (folder / "submission.json").write_text(json.dumps(data))
    return change


LOG = "train_seed42.log"
LACKS_LOG = " seeds seed_result mean readme_score compliance_claim"
BROKEN = [  # the kind of fault, others that follow from it, and the change
    ("missing_file", lambda f: (f / "README.md").unlink()),
    ("missing_logs" + LACKS_LOG, lambda f: (f / LOG).unlink()),
    ("log_unreadable" + LACKS_LOG, lambda f: (f / LOG).write_text("nothing\n")),
    ("log_unfinished" + LACKS_LOG, edit(LOG, r"^compliance .*\n", "")),
    ("log_seed seeds compliance_claim readme_seed seed_result", edit(LOG, "seed:42 ", "seed:7 ")),
    ("log_inconsistent", edit(LOG, r"^(final .*)", r"\1\n\1")),
    ("rerun log_inconsistent configurations_differ code_bytes code_sha256 total_bytes", edit(
        LOG, r"^(final_int6_roundtrip .*)", r"\1\nrun preset:record seed:42 world_size:8")),
    ("log_inconsistent", edit(LOG, "train_time:592012ms", "train_time:611012ms")),
    ("dirty_commit", edit(LOG, "commit:d474b71", "commit:d474b71-dirty")),
    ("configurations_differ", edit(LOG, "matrix_lr:0.03", "matrix_lr:0.026")),
    ("json_invalid", lambda f: (f / "submission.json").write_text("[]")),
    ("json_field", edit_json(lambda d: d.pop("github_id"))),
    ("json_type", edit_json(lambda d: d.update(author=" "))),
    ("json_type", edit_json(lambda d: d.update(seed_results=[1.0561]))),
    ("seeds", edit_json(lambda d: d.update(seeds=[1, 2, 3]))),
    ("seed_result", edit_json(lambda d: d["seed_results"]["42"].pop("steps"))),
    ("mean", edit_json(lambda d: d.update(val_bpb="1.0561"))),
    ("environment", edit_json(lambda d: d.update(hardware="8xA100 80GB"))),
    ("code_bytes code_sha256", lambda f: (f / "train_gpt.py").write_bytes(CODE + b"# more\n")),
    ("code_sha256", edit("train_gpt.py", "math.pi", "math.e ")),
    ("total_bytes", edit(LOG, r"^(Serialized model.*): \d+", r"\1: 15000000")),
    ("size_cap", edit(LOG, "cap_bytes:16000000 bytes_per", "cap_bytes:16777216 bytes_per")),
    ("size_cap seed_result total_bytes compliance_claim readme_seed", edit(LOG, "15900", "16100")),
    ("train_time compliance_claim", edit(LOG, "train_s:598.1", "train_s:600.4")),
    ("train_time", edit(LOG, "hessian_end_s:597.9", "hessian_end_s:600.1")),
    ("eval_time compliance_claim seed_result", edit(LOG, "eval_s:5.2", "eval_s:688.0")),
    ("compliance compliance_claim", edit(LOG, "causal:ok ", "")),
    ("compliance_claim", edit_json(lambda d: d["compliance"].update(no_slot="yes"))),
    ("bytes_per_token", edit(LOG, r"bytes_per_token:\S+", "bytes_per_token:3.70000")),
    ("bytes_per_token", edit(LOG, r"^(final .*bytes:)\d+", r"\g<1>177000000")),
    ("bytes_per_token configurations_differ", edit(LOG, "fineweb_8192", "fineweb_4096")),
    ("coverage", edit(LOG, r"tokens_scored:\d+", "tokens_scored:40540000")),
    ("coverage", edit(LOG, r"val_tokens:\d+", "val_tokens:62021846")),
    ("final_method configurations_differ", edit(LOG, "final_score:exact", "final_score:ttt")),
    ("final_method", edit(LOG, r"^(final_int6_exact val_loss:)\S+", r"\g<1>2.70000000")),
    ("readme_score", edit("README.md", r"1\.05615", "1.05000")),
    ("readme_score", edit("README.md", r"± 0\.\d+", "± 0.00010")),
    ("readme_seed", edit("README.md", r"1\.05633(.*) 15,", r"1.05600\1 16,")),
    ("artifact_bytes", lambda f: (f / "seed42.artifact").write_bytes(b"GDN1"))]


@pytest.mark.parametrize("expected, change", BROKEN, ids=range(len(BROKEN)))
def test_broken_folder(expected, change, folder):
    change(folder)
    found = kinds(folder)
    assert expected.split()[0] in found and found <= set(expected.split())


def test_each_log_is_audited_by_verify(folder):
    edit(LOG, "loop_end_s:592.0", "loop_end_s:400.0")(folder)
    faults, notes = check.review(folder)
    assert [text for kind, text in faults if kind == "verify"][0].startswith(
        "train_seed42.log: last step, loop, Hessians, training, limit: ")
    part = "log and script only: no artifact, or no text"
    assert f"train_seed42.log: verified on cpu: {part}" in notes


@pytest.mark.parametrize("gpu, part", [(True, "all targets"), (False, "the first 500 targets")])
def test_artifacts_are_verified_whole_on_a_gpu_in_part_on_a_cpu(folder, monkeypatch, gpu, part):
    asked = []
    monkeypatch.setattr(check.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(check.verify, "verify", lambda log, args: asked.append(args) or [
        ("ttt: val_bpb", "1.0, log 0.9", "DIFFERS")] * (log.seed == 42))
    for seed in (42, 1337):
        (folder / f"seed{seed}.artifact").write_bytes(b"GDN1")
    faults, notes = check.review(folder, data=folder, tokenizer=folder / "README.md", sample=500)
    assert ("verify", "train_seed42.log: ttt: val_bpb: 1.0, log 0.9") in faults
    assert f"train_seed42.log: verified on {'cuda' if gpu else 'cpu'}: {part}" in notes
    given = {Path(args.log).name: args for args in asked}
    assert given["train_seed42.log"].artifact.endswith("seed42.artifact")
    assert given["train_seed42.log"].sample == (0 if gpu else 500)
    assert given["train_seed7.log"].artifact is None


def test_a_record_on_another_machine(folder):
    edit_json(lambda d: d.update(hardware="1xH100 80GB"))(folder)
    for seed in SEEDS:
        edit(f"train_seed{seed}.log", "world_size:8", "world_size:1")(folder)
    assert kinds(folder) == {"environment"}  # a record is of eight GPUs
    edit_json(lambda d: d.update(track="non_record_16mb"))(folder)
    assert kinds(folder) == set()


SCRIPTS = [
    ("python310 import_failed", "def f(:\n    pass\n"), ("import_effect", "print('hello')\n"),
    ("exec_wrapper", "import zlib\n\n\ndef run(blob):\n    exec(zlib.decompress(blob))\n"),
    ("import_failed", "raise SystemExit\n"),
    ("import_effect", "from pathlib import Path\nCODE = Path(__file__).read_bytes()\n"),
    ("import_effect", "import subprocess\nsubprocess.run(['true'])\n"),
    ("import_effect", "import threading\nthreading.Timer(1, int).start()\n"),
    ("", "from dataclasses import dataclass, fields\n\n\n@dataclass\nclass A:\n    x: int = 1\n\n\n"
     "NAMES = [f.name for f in fields(A)]\nif __name__ == '__main__':\n    print('no')\n")]


@pytest.mark.parametrize("expected, code", SCRIPTS, ids=range(len(SCRIPTS)))
def test_script(expected, code, tmp_path):
    assert kinds(make_folder(tmp_path / "f", code=code.encode())) == set(expected.split())
