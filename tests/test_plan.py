"""logs/tools/plan.py and generate.py: runs that were made, a continuation by carried state."""

import re
import shutil

import generate
import plan
import pytest
import torch
from conftest import ROOT

import train_gpt as t


def numbers(lines, label):
    """The numbers of the plan's line that begins with `label`."""
    [line] = [line for line in lines if line.startswith(label)]
    return [float(n.replace(",", "")) for n in re.findall(r"[\d,]*\.?\d+", line)]


def test_plan_of_runs_that_were_made(capsys):
    old = dict(MAX_WALLCLOCK_SECONDS="300", TRAIN_BATCH_TOKENS="131072")
    lines = plan.plan(old | dict(VOCAB_SIZE="1024"))  # logs/ladder/300s_seed1337.txt
    assert numbers(lines, "steps")[0] == pytest.approx(2552, rel=0.02)
    lines = plan.plan(dict(MAX_WALLCLOCK_SECONDS="150", GPU="H200"))  # logs/record
    assert numbers(lines, "steps")[0] == pytest.approx(2746, rel=0.02)
    lines = plan.plan(old | dict(GPU="H200"))  # logs/ladder/300s_vocab8192.txt
    assert numbers(lines, "model") == [43_382_624, 12, 99]
    assert numbers(lines, "steps")[0] == pytest.approx(2876, rel=0.04)
    assert 15_900_000 < numbers(lines, "bytes")[1] < 16_000_000
    assert 2.7 < numbers(lines, "bits")[0] < 3
    lines = plan.plan(dict(GPU="H200", HOLDOUT_TOKENS="1465478"))  # its 31.6 s with TTT
    seconds = [float(line.split()[1].replace(",", "")) for line in lines if "seconds" in line[:7]]
    assert sum(seconds[4:6]) == pytest.approx(31.6, rel=0.1)
    lines = plan.plan({})
    eight = plan.plan(dict(GPUS="8", PRICE="3"))
    assert numbers(eight, "speed")[0] == 8 * numbers(lines, "speed")[0]
    seconds = [float(line.split()[1].replace(",", "")) for line in eight if "seconds" in line[:7]]
    assert seconds[-1] == pytest.approx(sum(seconds[:-1]), abs=0.4)  # each has one decimal
    dollars = float(re.search(r"([\d.]+) dollars at PRICE=3$", eight[-1])[1])
    assert dollars == pytest.approx(8 * seconds[-1] / 3600 * 3, abs=0.01)
    lines = plan.plan(dict(PRESET="sample", GPU="CPU"))  # logs/sample/record.txt
    assert numbers(lines, "steps")[0] == pytest.approx(267, rel=0.1)
    assert numbers(lines, "bytes")[0] == pytest.approx(835_499, rel=0.15)
    assert plan.main(dict(MODEL_DIM="1024")) == 0 and "\nwarning" in capsys.readouterr().out


def test_plan_of_a_gpu_that_was_not_measured():
    half = plan.plan(dict(GPU="a100", SPEED="0.5", MEMORY_GB="40", MAX_WALLCLOCK_SECONDS="300"))
    whole = plan.plan(dict(MAX_WALLCLOCK_SECONDS="300"))
    assert numbers(half, "speed")[0] == numbers(whole, "speed")[0] / 2
    assert numbers(half, "memory")[1] == 40 and half[0].startswith("machine    1 x A100")
    small = plan.plan(dict(SPEED="1", MEMORY_GB="2", MICRO_BATCH_TOKENS="131072"))
    assert any(line.startswith("warning    more memory") for line in small)


@pytest.mark.parametrize("env, message", [
    (dict(GPU="abacus"), "GPU=ABACUS: measured are H100, H200, CPU; for another one add SPEED"),
    (dict(GPUS="eight"), "GPUS=eight: must be a whole number above 0"),
    (dict(GPUS="0"), "GPUS=0: must be a whole number above 0"),
    (dict(PRICE="-1"), "PRICE=-1: must be a number above 0"),
    (dict(SPEED="nan"), "SPEED=nan: must be a number above 0")])
def test_plan_refuses_in_one_line(env, message, capsys):
    assert plan.main(env) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {message}") and err.count("\n") == 1 and not out


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
    assert generate.main([str(ROOT), "x"]) == 2 and str(ROOT) in capsys.readouterr().err
    monkeypatch.setenv("TOKENIZER_PATH", "none.model")
    assert generate.main(options) == 2 and "TOKENIZER_PATH=none" in capsys.readouterr().err
    monkeypatch.delenv("TOKENIZER_PATH")
    monkeypatch.delenv("PRESET")  # which sets the sample's tokenizer
    assert generate.main(options) == 2  # the default of the artifact's vocabulary
    assert "fineweb_1024_bpe.model" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text(f"run x:1\nsettings tokenizer_path:{cfg.tokenizer_path} a:b\n")
    assert generate.main(options) == 0  # by the run's log
    (tmp_path / "a.txt").unlink()
    shutil.copyfile(cfg.tokenizer_path, tmp_path / "tokenizer.model")
    assert generate.main(options) == 0  # by the file beside it
    assert capsys.readouterr().out == 2 * shown[0]
