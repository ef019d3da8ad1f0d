"""The documents against the script and the logs: line numbers, size, links, scores.

    python tests/test_readme.py --update        writes today's line numbers into README.md
"""

import ast
import json
import re
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "logs/README.md", "logs/RESULTS.md", "tests/README.md"]
LINE_NUMBER = re.compile(r"`([A-Za-z_][\w.]*)` \(line (\d+)\)")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def definitions():
    """Line of every function, class and method of train_gpt.py, by its dotted name."""
    kinds = ast.FunctionDef | ast.ClassDef
    top = [node for node in ast.parse(read("train_gpt.py")).body if isinstance(node, kinds)]
    members = [(f"{node.name}.{m.name}", m.lineno)
               for node in top for m in node.body if isinstance(m, kinds)]
    return {node.name: node.lineno for node in top} | dict(members)


def update():
    """Write today's line numbers into README.md; a name that is not defined raises KeyError."""
    lines = definitions()
    text = LINE_NUMBER.sub(lambda m: f"`{m[1]}` (line {lines[m[1]]})", read("README.md"))
    (ROOT / "README.md").write_text(text, encoding="utf-8")


def links(name):
    """Relative targets of a document's links and images, without their #anchor."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(name))
    targets += re.findall(r'\bsrc(?:set)?="([^"\s]+)"', read(name))
    return [target for target in targets if "://" not in target]


def scores(log):
    """4-decimal bpb of every line of a log that starts with `final`, in the log's order."""
    found = re.findall(r"^final\S* .*?\bval_bpb:(\S+)", log, re.MULTILINE)
    return [f"{float(bpb):.4f}" for bpb in found]


def rows(name):
    """(row of a table, texts of the logs that it links), for the rows that link one."""
    for row in re.findall(r"^\|.*\|$", read(name), re.MULTILINE):
        logs = re.findall(r"\]\(([^)\s]+\.txt)\)", row)
        if logs:
            yield row, [((ROOT / name).parent / log).read_text(encoding="utf-8") for log in logs]


def test_readme_is_short_and_has_its_pictures_for_light_and_dark_pages():
    text = read("README.md")
    assert len(text.splitlines()) <= 250 and len(text.split()) <= 2200
    found = [link for link in links("README.md") if link.endswith(".png")]
    assert len(found) == 4 and {name.replace("_dark.png", ".png") for name in found} == {
        "logs/figures/architecture.png", "logs/figures/evaluation.png"}


def test_line_numbers_are_true():
    lines, named = definitions(), LINE_NUMBER.findall(read("README.md"))
    wrong = {name: lines.get(name) for name, line in named if lines.get(name) != int(line)}
    assert len(named) >= 8 and not wrong, f"run python tests/test_readme.py --update: {wrong}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_linked_files_exist(name):
    folder = (ROOT / name).parent
    assert not [target for target in links(name) if not folder.joinpath(target).exists()]


@pytest.mark.parametrize("name", ["README.md", "logs/RESULTS.md"])
def test_a_row_holds_the_scores_of_the_logs_it_links(name):
    for row, logs in rows(name):
        for log in logs:
            found = scores(log)
            assert not found or any(score in row for score in found), (row, found)


def test_every_kept_log_is_cited():
    """Except what a user's own runs leave in logs/ itself and in logs/record/."""
    kept = {p.resolve() for p in (ROOT / "logs").glob("*/**/*.txt")}
    kept -= set((ROOT / "logs/record").glob("*"))
    cited = {(ROOT / name).parent.joinpath(link).resolve()
             for name in DOCUMENTS for link in links(name)}
    assert not kept - cited


def test_results_table_holds_final_scores_and_bytes():
    part = read("README.md").split("\n## Results\n")[1].split("\n## ")[0]
    seeds = []
    for row, (log,) in (pair for pair in rows("README.md") if pair[0] in part):
        total = int(re.search(r"^Total submission size .*: (\d+) bytes", log, re.MULTILINE)[1])
        before = re.search(r"^pre_quantization_post_ema .*val_bpb:(\S+)", log, re.MULTILINE)[1]
        cells = set(row.replace("|", " ").split())
        assert {f"{float(before):.4f}", scores(log)[-1], f"{total:,}"} <= cells, row
        if "logs/record/" in row:
            seeds.append(float(re.search(r"^final .*val_bpb:(\S+)", log, re.MULTILINE)[1]))
    assert len(seeds) == len(json.loads(read("submission.json"))["seeds"]) >= 2
    assert part.count(f"**{statistics.mean(seeds):.4f} ± {statistics.stdev(seeds):.4f}**") == 1


if __name__ == "__main__" and sys.argv[1:] == ["--update"]:
    update()
