"""logs/sweep.py: the table of variants, runs of the real script, going on, failures, the time limit, the comparison.

The script itself runs twice, at toy size; the driver's own rules are tried on a script that writes a log and ends.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY
from test_report import report

sys.modules["report"] = report
sys.path.insert(0, str(ROOT / "logs"))
import sweep  # noqa: E402

QUICK = '''
import os, sys, time
bpb = float(os.environ["BPB"]) + 0.001 * int(os.environ["SEED"])
time.sleep(float(os.environ.get("TAKES", "0")))
meet = os.environ.get("MEET")
if meet:
    open(os.path.join(meet, os.environ["CUDA_VISIBLE_DEVICES"]), "x").close()
    for _ in range(2000):
        if len(os.listdir(meet)) == 2:
            break
        time.sleep(0.01)
    else:
        sys.exit("error: alone")
if bpb < 0:
    sys.exit("a warning\\nerror: BPB=%g: must be at least 0\\n\\ntorch.ChildFailedError: \\n=====\\n" % bpb)
with open(os.path.join(os.environ["OUT_DIR"], os.environ["RUN_ID"] + ".txt"), "x") as log:
    log.write("run preset:quick seed:%s code_bytes:9 code_sha256:ab\\n" % os.environ["SEED"])
    log.write("config run_id:%s\\nstep:7/7 train_loss:1.0 train_time:70ms\\n" % os.environ["RUN_ID"])
    log.write("final method:exact val_loss:2.0 val_bpb:%.8f tokens:10 bytes:20\\n" % bpb)
    log.write("Serialized model int6+brotli: 91 bytes\\nTotal submission size int6+brotli: 100 bytes\\n")
    log.write("compliance total_bytes:100 verdict:ok\\n")
'''


@pytest.fixture
def quick(tmp_path):
    """quick(table, *options) runs the driver on the quick script; returns the code and results.json."""
    (tmp_path / "quick.py").write_text(QUICK)

    def call(table, *options):
        (tmp_path / "table.txt").write_text(table)
        code = sweep.main([str(tmp_path / "table.txt"), "--out", str(tmp_path / "out"), "--script",
                           str(tmp_path / "quick.py"), *options])
        found = tmp_path / "out" / "results.json"
        return code, json.loads(found.read_text()) if found.exists() else None
    return call


def test_the_script_runs_and_the_driver_goes_on(tokens_folder, tmp_path, capsys):  # noqa: F811
    settings = TINY | dict(DATA_PATH=str(tokens_folder), VAL_LOSS_EVERY="0", EVAL_DIAGNOSTICS="0", GPTQ_ENABLED="0",
                           SEED="5")
    words = " ".join(f"{name}='{value}'" for name, value in settings.items())
    (tmp_path / "table.txt").write_text(f"all {words}\nbase\nfast MATRIX_LR=0.05\n")
    command = [str(tmp_path / "table.txt"), "--out", str(tmp_path / "out")]
    assert sweep.main(command) == 0
    first = capsys.readouterr().out
    lines = [line for line in first.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == ["| variant", "| base", "| fast"]
    assert "MATRIX_LR=0.05 | 1 of 1 |" in lines[2] and lines[2].endswith("| ok |")
    log = report.parse_log(tmp_path / "out" / "fast-seed5.txt")
    assert log.config["matrix_lr"] == "0.05" and f"{log.final.bpb:.5f}" in lines[2] and log.steps == 3
    assert sweep.main(command) == 0  # nothing is run again
    assert capsys.readouterr().out == first[first.index("\n| variant"):]


def test_mean_deviation_and_difference(quick, capsys):
    code, results = quick("all SEED=0,1,2 BPB=1.5\n# a comment\nbase\nsame BPB=1.5009\nbetter BPB=1.2 SEED=0,1\n"
                          "single BPB=1.1 SEED=4\n")
    assert code == 0
    rows = {row["name"]: row for row in results["variants"]}
    assert rows["base"]["mean"] == pytest.approx(1.501) and rows["base"]["std"] == pytest.approx(0.001)
    assert rows["base"]["difference"] is None and rows["same"]["difference"] == pytest.approx(0.0009)
    assert [rows[name]["beyond_spread"] for name in rows] == [None, False, True, None]
    out = capsys.readouterr().out
    assert "| same | BPB=1.5009 | 3 of 3 | 1.50190 ± 0.00100 | +0.00090 | no | 7 |" in out
    assert "| better | BPB=1.2 | 2 of 2 | 1.20050 ± 0.00071 | -0.30050 | yes | 7 |" in out
    assert "| single | BPB=1.1 | 1 of 1 | 1.10400 | -0.39700 | – | 7 |" in out
    assert out.index("base-seed0") < out.index("same-seed0") < out.index("base-seed1")  # seeds outermost


def test_a_failure_is_a_row_and_is_tried_again(quick, tmp_path, capsys):
    code, results = quick("all BPB=1 SEED=0,1\nbase\nbad BPB=-1\nlast\n")
    out = capsys.readouterr().out
    assert code == 1 and "| bad | BPB=-1 | 0 of 2 | – | – | – | – | – | – | error: BPB=-1: must be at least 0; " in out
    assert out.count("\n| ") == 4 and out.index("last-seed1: 1.001") < out.index("| variant")  # the others still ran
    code, results = quick("all BPB=1 SEED=0,1\nbase\nbad BPB=2\nlast\n")
    out = capsys.readouterr().out
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines() if "-seed" in line] == ["bad-seed0", "bad-seed1"]
    assert (tmp_path / "out" / "results.md").read_text().strip() in out


def test_other_settings_or_another_script_run_again(quick, tmp_path, capsys):
    quick("base BPB=1 SEED=0\n")
    _, results = quick("base BPB=2 SEED=0\n")
    assert results["variants"][0]["mean"] == 2 and (tmp_path / "out" / "base-seed0.old").exists()
    sweep.main([str(tmp_path / "table.txt"), "--out", str(tmp_path / "out"), "--script", str(tmp_path / "quick.py")])
    assert capsys.readouterr().out.count("base-seed0:") == 2
    (tmp_path / "quick.py").write_text(QUICK + "# edited\n")
    sweep.main([str(tmp_path / "table.txt"), "--out", str(tmp_path / "out"), "--script", str(tmp_path / "quick.py")])
    assert "base-seed0:" in capsys.readouterr().out


def test_nothing_is_started_that_would_not_end_in_time(quick, capsys):
    table = "all BPB=1 SEED=0\nbase TAKES=0.8\nother\nthird\n"
    code, results = quick(table, "--limit-s", "1.2")
    out = capsys.readouterr().out
    assert code == 1 and "other-seed0: not started" in out and "1 not run" in out
    assert [len(row["runs"]) for row in results["variants"]] == [1, 0, 0]
    code, results = quick(table, "--limit-s", "60")  # goes on with what is left
    assert code == 0 and "base-seed0:" not in capsys.readouterr().out


def test_runs_side_by_side_on_gpus_of_their_own(quick, tmp_path, capsys):
    """Two runs that each wait for the other; a third gets the GPU that is free first."""
    (tmp_path / "meet").mkdir()
    code, results = quick(f"all BPB=1 SEED=0\na MEET={tmp_path}/meet\nb MEET={tmp_path}/meet\nc BPB=2\n",
                          "--gpus", "0,1", "2,3")
    assert code == 0 and sorted(os.listdir(tmp_path / "meet")) == ["0,1", "2,3"]
    assert [row["mean"] for row in results["variants"]] == [1, 1, 2]
    assert capsys.readouterr().out.index("c-seed0: 2") > 0


def test_launch_replaces_the_interpreter(quick, tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/said\nshift\nexec {sys.executable} \"$@\"\n")
    launcher.chmod(0o755)
    code, _ = quick("base BPB=1 SEED=0\n", "--launch", f"{launcher} --nproc_per_node=8")
    assert code == 0 and (tmp_path / "said").read_text().startswith("--nproc_per_node=8 ")


@pytest.mark.parametrize("table, message", [
    ("", "no variant"), ("a X=1\na X=2\n", ":2: variant 'a' is named twice"), ("a/b X=1\n", "other characters"),
    ("a lr\n", "'lr' is no NAME=value"), ("a RUN_ID=7\n", "RUN_ID and OUT_DIR are set here"),
    ("a X='1\n", "No closing quotation")])
def test_a_bad_table_is_one_clear_line(table, message, quick, capsys):
    code, results = quick(table)
    captured = capsys.readouterr()
    assert code == 2 and results is None and message in captured.err and captured.err.count("\n") == 1


def test_it_runs_from_anywhere_without_torch(tmp_path):
    code = ("import runpy, sys; sys.modules.update(dict.fromkeys(('numpy', 'torch'))); sys.argv = ['sweep.py', '-h']; "
            f"sys.path.insert(0, {str(ROOT / 'logs')!r}); runpy.run_path({str(ROOT / 'logs/sweep.py')!r}, "
            "run_name='__main__')")
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0 and "--limit-s" in done.stdout
