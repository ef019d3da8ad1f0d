"""logs/tools/sweep.py: real runs at toy size, and its rules on a script that only writes a log."""

import json
import sys

import pytest
import report
import sweep

QUICK = '''
import os, sys, time
bpb = float(os.environ["BPB"]) + 0.001 * int(os.environ["SEED"])
time.sleep(float(os.environ.get("TAKES", "0")))
if bpb < 0:
    sys.exit("a warning\\nerror: BPB=%g: must be at least 0\\n\\ntorch.ChildFailedError: \\n" % bpb)
with open(os.path.join(os.environ["OUT_DIR"], os.environ["RUN_ID"] + ".txt"), "x") as log:
    log.write("run preset:quick gpu:%s code_sha256:a\\n" % os.environ.get("CUDA_VISIBLE_DEVICES"))
    log.write("final method:exact val_loss:2.0 val_bpb:%.8f tokens:10 bytes:20\\n" % bpb)
    log.write("Serialized model a: 91 bytes\\nTotal submission size a: 100 bytes\\n")
    log.write("compliance verdict:ok\\n")
'''


@pytest.fixture
def quick(tmp_path, capsys):
    """quick(table, *options, code=QUICK) runs a sweep: its exit code, output, and results.json."""
    def call(table, *options, code=QUICK):
        (tmp_path / "quick.py").write_text(code)
        (tmp_path / "table.txt").write_text(table)
        found = tmp_path / "out" / "results.json"
        ended = sweep.main([str(tmp_path / "table.txt"), "--out", str(found.parent), "--script",
                            str(tmp_path / "quick.py"), *options])
        results = json.loads(found.read_text()) if found.exists() else None
        out, err = capsys.readouterr()
        return ended, out + err, results
    return call


@pytest.mark.slow
def test_the_script_runs_and_the_sweep_goes_on(tiny, tmp_path, capsys):
    settings = " ".join(f"{name}='{value}'" for name, value in tiny.items())
    (tmp_path / "table.txt").write_text(f"all {settings} SEED=5\nfast MATRIX_LR=0.05\n")
    command = [str(tmp_path / "table.txt"), "--out", str(tmp_path / "out")]
    assert sweep.main(command) == 0
    first = capsys.readouterr().out
    fast = first.splitlines()[-1]
    assert "| fast | – | 1 of 1 |" in fast
    log = report.parse_log(tmp_path / "out" / "fast-seed5.txt")
    assert log.config["matrix_lr"] == "0.05" and f"{log.final.bpb:.5f}" in fast and log.steps == 3
    assert log.finished and not log.left_out and set(log.scores) == {"pre", "exact"}
    assert log.series("gptq", "rel_err") and log.series("hessians", "loop_end_s", "hessian_end_s")
    assert sweep.main(command) == 0  # nothing is run again
    assert capsys.readouterr().out == first[first.index("\n| variant"):]


def test_mean_deviation_and_difference(quick):
    code, out, _ = quick("all SEED=0,1,2 BPB=1.5\n# a comment\nbase\nsame BPB=1.5009\n"
                         "better BPB=1.2 SEED=0,1\nsingle BPB=1.1 SEED=4\n")
    assert code == 0 and "| base | BPB=1.5 | 3 of 3 | 1.50100 ± 0.00100 | – | – |" in out
    assert "| same | BPB=1.5009 | 3 of 3 | 1.50190 ± 0.00100 | +0.00090 | no |" in out
    assert "| better | BPB=1.2 | 2 of 2 | 1.20050 ± 0.00071 | -0.30050 | yes |" in out
    assert "| single | BPB=1.1 | 1 of 1 | 1.10400 | -0.39700 | – |" in out
    assert out.index("base-seed0") < out.index("same-seed0") < out.index("base-seed1")


def test_a_failure_is_a_row_and_is_tried_again(quick, tmp_path):
    code, out, _ = quick("all BPB=1 SEED=0,1\nbase\nbad BPB=-1\nlast\n")
    assert code == 1 and "| 0 of 2 |" in out and "error: BPB=-1: must be at least 0; " in out
    assert out.index("last-seed1: 1.001") < out.index("| variant")  # the others still ran
    code, out, _ = quick("all BPB=1 SEED=0,1\nbase\nbad BPB=2\nlast\n")
    ran = [line.split(":")[0] for line in out.splitlines() if "-seed" in line]
    assert code == 0 and ran == ["bad-seed0", "bad-seed1"]
    assert (tmp_path / "out" / "results.md").read_text().strip() in out


def test_other_settings_or_another_script_run_again(quick, tmp_path):
    quick("base BPB=1 SEED=0\n")
    _, _, results = quick("base BPB=2 SEED=0\n")
    assert results["base-seed0"]["val_bpb"] == 2 and (tmp_path / "out" / "base-seed0.old").exists()
    assert "base-seed0:" not in quick("base BPB=2 SEED=0\n")[1]
    assert "base-seed0:" in quick("base BPB=2 SEED=0\n", code=QUICK + "# edited\n")[1]


def test_limit_gpus_and_launch(quick, tmp_path):
    table = "all BPB=1 SEED=0\nbase TAKES=0.6\nother\nthird\n"
    code, out, results = quick(table, "--limit-s", "1")
    assert code == 1 and "other-seed0: not started" in out and "1 not run" in out
    assert list(results) == ["base-seed0"]
    launch = f"env BPB=3 {sys.executable}"
    code, out, results = quick(table, "--gpus", "0,1", "2,3", "--launch", launch)  # goes on
    assert code == 0 and "base-seed0:" not in out
    assert [run["val_bpb"] for run in results.values()] == [1, 3, 3]
    logs = [report.parse_log(tmp_path / "out" / f"{name}-seed0.txt") for name in ("other", "third")]
    assert {log.run["gpu"] for log in logs} == {"0,1", "2,3"}


def test_a_bad_table_is_one_clear_line(quick):
    for table, message in (("", "no variant"), ("a X=1\na X=2\n", ":2: 'a' is named twice"),
                           ("a lr\n", "'lr' is not NAME=value"), ("a X='1\n", "No closing")):
        code, out, results = quick(table)
        assert code == 2 and results is None and message in out and out.count("\n") == 1
