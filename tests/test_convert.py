"""logs/tools/convert.py: each line of a log as JSON, and what TensorBoard and W&B would be sent."""

import json
import sys
from types import ModuleType, SimpleNamespace

import convert
import pytest
from test_report import BPBS, TOKENS, log_text, ttt_lines, with_lines


@pytest.fixture
def path(tmp_path):
    """A whole log with two lines of test-time training."""
    text = with_lines(log_text(), "final m", ttt_lines((1, "1.2000"), (2, "1.1000")))
    (tmp_path / "one.txt").write_text(text)
    return tmp_path / "one.txt"


def test_json_lines(path, capsys):
    assert convert.main([str(path)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    lines = path.read_text().splitlines()
    assert len(found) == len(lines)  # every line of a log of ours
    by_event = {record["event"]: record for record in found}
    assert {record["run"] for record in found} == {"one"}
    assert by_event["run"]["commit"] == "d474b71" and by_event["run"]["seed"] == 1337
    step = next(r for r in found if r["event"] == "step" and r["step"] == 1000)
    assert step["planned_steps"] == 20000 and step["train_time_s"] == 98.0
    assert by_event["stopping_early"] == dict(run="one", event="stopping_early", step=6020,
                                              train_time_s=592.012)
    assert by_event["final"]["val_bpb"] == BPBS[0] and by_event["final"]["tokens"] == TOKENS
    assert by_event["total_submission_size"]["bytes"] == by_event["compliance"]["total_bytes"]
    assert by_event["compliance"]["verdict"] == "ok"
    assert by_event["compliance"]["train_s"] == 598.1


@pytest.mark.parametrize("key, text, found", [
    ("train_time", "1500ms", ("train_time_s", 1.5)), ("lr", "2e-05", ("lr", 2e-05)),
    ("commit", "1234567", ("commit", "1234567")), ("loss", "nan", ("loss", "nan")),
    ("chunk", "1/9", ("chunk", "1/9")), ("x", "", ("x", ""))])
def test_value(key, text, found):
    assert convert.value_of(key, text) == found


def test_weights_and_biases_get_every_point_once(path, monkeypatch):
    """A stand-in of the library's few calls keeps what it is given."""
    sent = []
    run = SimpleNamespace(define_metric=lambda *a, **k: None, log=sent.append, summary={},
                          finish=lambda: sent.append("finish"))
    wandb = ModuleType("wandb")
    wandb.init = lambda **given: sent.append(given) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert convert.main([str(path), "--wandb", "golf"]) == 0
    first, *points, last = sent
    assert (first["project"], first["name"], last) == ("golf", "one", "finish")
    assert first["config"]["matrix_lr"] == 0.03 and first["config"]["seed"] == 1337
    assert run.summary["final_bpb"] == BPBS[0] and run.summary["verdict"] == "ok"
    log = convert.collect([path])[0]
    assert sum("train/loss" in point for point in points) == len(log.train)
    assert [point["val/bpb"] for point in points if "val/bpb" in point] == [
        log.val[step].bpb for step in sorted(log.val)]
    assert [p["ttt/running_bpb"] for p in points if "ttt/running_bpb" in p] == [1.2, 1.1]


@pytest.mark.parametrize("option, missing", [("--wandb", "wandb"),
                                             ("--tensorboard", "torch.utils.tensorboard")])
def test_a_missing_library_is_one_clear_line(option, missing, path, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert convert.main([str(path), option, str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"convert.py: {option}: pip install") and error.count("\n") == 1
