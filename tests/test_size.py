"""The ratchet: train_gpt.py may become smaller and plainer, never larger or denser."""

import ast
import os
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, SCRIPT

import train_gpt as t

# Of the script without section 10, whose kernels may grow.  Lower a number when it has fallen.
NUMBERS = dict(lines=3251, bytes=168_700, definitions=217, settings=98)

LINES = SCRIPT.read_text(encoding="utf-8").splitlines()
KERNELS = range(LINES.index("# 10. Kernels"), LINES.index("# 11. main"))
TREE = ast.parse("\n".join(LINES), feature_version=(3, 10))
NODES = list(ast.walk(TREE))
FUNCTIONS = [node for node in NODES if isinstance(node, ast.FunctionDef)]
DEFINITIONS = [node for node in NODES if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
REST = [line for i, line in enumerate(LINES) if i not in KERNELS]
TODAY = dict(lines=len(REST), bytes=sum(len(line.encode()) + 1 for line in REST),
             definitions=sum(node.lineno not in KERNELS for node in DEFINITIONS),
             settings=len(fields(t.Config)))


def inside(*nodes):
    """All nodes below these."""
    return [inner for node in nodes for inner in list(ast.walk(node))[1:]]


def attributes(tops):
    """(name of the definition, attribute) of all that these top-level nodes read."""
    return [(getattr(top, "name", "module"), node.attr) for top in tops for node in ast.walk(top)
            if isinstance(node, ast.Attribute)]


USED = {attr for name, attr in attributes(TREE.body) if name != "Config"}
USED |= {text for route in t.ROUTES for text in route}  # read by getattr(cfg, route.lr)
FOUND = {
    "line of more than 100 columns": [i for i, line in enumerate(LINES, 1) if len(line) > 100],
    "function of more than 60 lines (train_loop: 80)": [
        node.name for node in FUNCTIONS if node.lineno not in KERNELS
        and node.end_lineno - node.lineno >= (80 if node.name == "train_loop" else 60)],
    "function with more than 8 parameters": [
        node.name for node in FUNCTIONS if node.lineno not in KERNELS
        and len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) > 8],
    "assignment of three values at once": [
        node.lineno for node in NODES if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple) and len(getattr(node.value, "elts", [])) > 2],
    "conditional expression inside another": [
        node.lineno for node in inside(*[n for n in NODES if isinstance(n, ast.IfExp)])
        if isinstance(node, ast.IfExp)],
    "public definition without a docstring": [
        node.name for node in set(DEFINITIONS) - set(inside(*FUNCTIONS))
        if node.name[0] != "_" and not ast.get_docstring(node)],
    "environment read outside entry()": [
        name for name, attr in attributes(TREE.body)
        if attr in ("environ", "getenv") and name != "entry"],
    "setting that nothing uses": [f.name for f in fields(t.Config) if f.name not in USED],
}


@pytest.mark.parametrize("rule", FOUND)
def test_source_has_no(rule):
    assert FOUND[rule] == []


@pytest.mark.parametrize("name", NUMBERS)
def test_number_never_grows_and_is_lowered_when_it_falls(name):
    assert 0.98 * NUMBERS[name] <= TODAY[name] <= NUMBERS[name]


def test_import_in_an_empty_environment_has_no_side_effects(tmp_path):
    probe = f"""
import os, sys, torch
os.environ = os.getenv = None  # reading them would raise
sys.path.insert(0, {str(ROOT)!r})
import train_gpt
assert not torch.cuda.is_initialized()
optional = "triton fla flash_qla flash_attn sentencepiece brotli zstandard torch._dynamo".split()
assert not set(optional) & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-B", "-c", probe], cwd=tmp_path, env={}, timeout=120,
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert os.listdir(tmp_path) == []
