"""The files around the script: pyproject.toml, the workflow and the formatted folder."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import train_gpt as t


def requirements(name):
    """The lines of a requirements file, without comments, sorted."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return sorted(line.split("#")[0].strip() for line in lines if line.split("#")[0].strip())


def test_project_table_has_the_requirements_files():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert sorted(project["dependencies"]) == requirements("requirements.txt")
    assert sorted(extras["test"]) == requirements("tests/requirements.txt")
    command = re.search(r"^pip install (flash-qla.*)$", (ROOT / "README.md").read_text(), re.M)[1]
    assert extras["hopper"] == command.replace('"', "").split()


def test_the_scripts_header_has_the_result_of_the_submission():
    result = json.loads((ROOT / "submission.json").read_text())
    assert f"{result['val_bpb']:.4f} +- {result['val_bpb_std']:.4f} on" in t.__doc__


def test_the_workflow_runs_what_contributors_run():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"^ +- run: (.*)$", text, re.M) == ["bash .ci/run"]
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()
    for mark in ("main", "tests"):
        assert f"<!-- {mark} -->\n```bash\n" in (ROOT / "README.md").read_text()


def test_data_is_formatted_by_ruff():
    """The rest of the project is set by hand, such as tables of settings and of cases."""
    command = [sys.executable, "-m", "ruff", "format", "--diff", "data", "tests/test_data_tools.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
