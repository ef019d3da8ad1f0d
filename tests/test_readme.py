"""The README against what it speaks of: its settings table is made from Config, its files exist, its functions too.

    python tests/test_readme.py        writes the table anew
"""

import ast
import re
import sys
from dataclasses import fields

from conftest import ROOT

import train_gpt as t

README = ROOT / "README.md"
MARKS = "<!-- settings -->\n", "<!-- end of settings -->\n"


def settings_table():
    """Markdown: every setting by group with default and meaning, then what each preset changes."""
    lines = []
    for f in fields(t.Config):
        if "group" in f.metadata:
            lines += ["", f"**{f.metadata['group']}**", "", "| variable | default | meaning |", "|---|---|---|"]
        rule = f.metadata["rule"]
        text = f.metadata["help"] + (f" ({rule.text})" if rule else "")
        lines.append(f"| `{f.name.upper()}` | {shown(f.default)} | {text.replace('|', chr(92) + '|')} |")
    lines += ["", "**presets**", "", "| preset | sets |", "|---|---|"]
    for name, values in (t.PRESETS | {f"{name},sample": values for name, values in t.WITH_SAMPLE.items()}).items():
        changes = " ".join(f"`{key.upper()}={t.plain(relative(value))}`" for key, value in values.items())
        lines.append(f"| `{name}` | {changes or 'the defaults'} |")
    return "\n".join(lines[1:]) + "\n"


def relative(value):
    """Paths inside the folder as they are written from it."""
    return value.removeprefix(f"{ROOT}/") if isinstance(value, str) else value


def shown(value):
    """A default as a table cell."""
    return f"`{t.plain(value)}`" if t.plain(value) else "empty"


def in_readme():
    """The text before, in and behind the marks."""
    text = README.read_text(encoding="utf-8")
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    return text[:start], text[start:end], text[end:]


def test_settings_table_is_that_of_the_script():
    assert in_readme()[1] == settings_table(), "run python tests/test_readme.py"


def test_files_that_it_links_or_shows_exist():
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    assert links and all((ROOT / link).exists() for link in links if "://" not in link), links


def test_functions_and_tests_of_the_compliance_table_exist():
    text = README.read_text(encoding="utf-8")
    part = text[text.index("## Compliance"):]
    names = set(re.findall(r"`([A-Za-z_][\w.]*)`", part[:part.index("\n## ")]))
    nodes = list(ast.walk(ast.parse((ROOT / "train_gpt.py").read_text(encoding="utf-8"))))
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)} | {
        n.attr for n in nodes if isinstance(n, ast.Attribute)} | {f.name.upper() for f in fields(t.Config)}
    files = {path.name for path in (ROOT / "tests").iterdir()} | {"train_gpt.py"}
    missing = {n for n in names if n not in files and not set(n.split(".")) <= defined} - {"final", "adapt", "evaluate"}
    assert len(names) > 10 and not missing, missing


def test_every_log_that_it_names_is_kept():
    named = set(re.findall(r"`((?:h100|h200|sample|\d{8}-\d{6})_\w+)`", README.read_text(encoding="utf-8")))
    assert named and all((ROOT / "logs" / f"{name}.txt").is_file() for name in named), named


if __name__ == "__main__":
    before, _, behind = in_readme()
    README.write_text(before + settings_table() + behind, encoding="utf-8")
    sys.stdout.write(settings_table())
