"""logs/tools/plan.py and generate.py: runs that were made, a continuation by carried state."""

import re

import pytest
import torch
from test_report import TOOLS  # puts the tools on sys.path

import train_gpt as t

import generate  # isort: skip
import plan  # isort: skip


def numbers(lines, label):
    """The numbers of the plan's line that begins with `label`."""
    [line] = [line for line in lines if line.startswith(label)]
    return [float(n.replace(",", "")) for n in re.findall(r"[\d,]*\.?\d+", line)]


def test_plan_of_runs_that_were_made(capsys):
    lines = plan.plan(dict(MAX_WALLCLOCK_SECONDS="300"))  # logs/ladder/300s_seed1337.txt
    assert numbers(lines, "model") == [39_712_608, 12, 99]
    assert numbers(lines, "steps")[0] == pytest.approx(2552, rel=0.02)
    assert 15_900_000 < numbers(lines, "bytes")[1] < 16_000_000
    assert 3 < numbers(lines, "bits")[0] < 3.3
    eight = plan.plan(dict(GPUS="8", PRICE="3"))
    assert numbers(eight, "speed")[0] == 8 * numbers(lines, "speed")[0] and "dollars" in eight[-1]
    lines = plan.plan(dict(PRESET="sample", GPU="CPU"))  # logs/sample/record.txt
    assert numbers(lines, "steps")[0] == pytest.approx(267, rel=0.1)
    assert numbers(lines, "bytes")[0] == pytest.approx(835_499, rel=0.15)
    assert plan.main(dict(MODEL_DIM="1024")) == 0 and "\nwarning" in capsys.readouterr().out
    assert plan.main(dict(GPU="abacus")) == 2 and "GPU=abacus" in capsys.readouterr().err


def test_generate(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PRESET", "sample")
    cfg = t.Config.from_env(dict(PRESET="sample", STACK="gdn swa:a", MODEL_DIM="64"))
    t.save_artifact(tmp_path / "a.artifact", t.init_weights(t.LM(cfg), 0), cfg)
    options = [str(tmp_path / "a.artifact"), "The mayor", "--tokens", "12"]
    capsys.readouterr()
    shown = []
    for more in ([], [], ["--seed", "2"], ["--temperature", "0"]):
        assert generate.main(options + more) == 0
        shown.append(capsys.readouterr().out)
        assert shown[-1].startswith("The mayor") and len(shown[-1]) > 12
    assert shown[0] == shown[1] != shown[2]
    model = t.load_artifact(tmp_path / "a.artifact")
    ids = torch.tensor([[1, 5, 9]])
    for token in generate.generate(model, ids, 3, 0.0, None):  # as by one pass over the whole text
        assert int(model(ids)[0][0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert generate.main([str(TOOLS), "x"]) == 2 and str(TOOLS) in capsys.readouterr().err
    monkeypatch.setenv("TOKENIZER_PATH", "none.model")
    assert generate.main(options) == 2 and "TOKENIZER_PATH=none" in capsys.readouterr().err
