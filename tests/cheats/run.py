"""Plant each cheat of cheats.txt in a copy of train_gpt.py, run it at tiny size, see who finds it.

    python tests/cheats/run.py [word...]     writes logs/checks/cheats.md; words choose by name

Exit code 1 if a cheat is not found by the one who should find it, or if its text is no longer in
the script.  The first row is the script as it is, in which nobody may find anything.
"""

import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "logs" / "tools")]

import verify  # noqa: E402
from conftest import TINY, TOKENIZER, enter, write_tiny_shards  # noqa: E402

LIST = Path(__file__).with_name("cheats.txt")
OUT = ROOT / "logs" / "checks" / "cheats.md"
SCRIPT = (ROOT / "train_gpt.py").read_text(encoding="utf-8")


class Cheat(NamedTuple):
    """A change of the script: pairs (old, new) of text, and who must find it."""

    name: str
    who: str  # run, verify, or the test: "test_x.py -k word"
    edits: list
    settings: dict  # of the tiny run, beside the usual ones; None unsets


CONTROL = Cheat("nothing", "nobody", [], dict(FINAL_SCORE="ttt", EVAL_DIAGNOSTICS="1",
                                              TTT_CHUNK_TOKENS="512"))


def read_cheats():
    """[Cheat] of cheats.txt, whose head explains its form."""
    cheats = []
    for block in re.split("^== ", LIST.read_text(encoding="utf-8"), flags=re.MULTILINE)[2:]:
        head, _, body = block.partition("\n")
        name, who, settings = (head + " | ").split(" | ")[:3]
        edits = [["".join(line[1:] for line in part.splitlines(True) if line[0] in marks)
                  for marks in ("-=", "=+")]
                 for part in re.findall(r"(?:^[-=].*\n)+(?:^\+.*\n)*", body, re.MULTILINE)]
        settings = dict(setting.split("=") for setting in settings.split())
        cheats.append(Cheat(name, who, edits, {k: v or None for k, v in settings.items()}))
    return cheats


def plant(cheat):
    """The script with the cheat in it; ValueError if a change does not apply exactly once."""
    for old, _ in cheat.edits:
        if (count := SCRIPT.count(old)) != 1:
            raise ValueError(f"cheat '{cheat.name}': stands {count} times in train_gpt.py, "
                             f"expected once; mend cheats.txt: {old.strip()[:70]!r}")
    code = SCRIPT
    for old, new in sorted(cheat.edits, key=lambda edit: -SCRIPT.index(edit[0])):
        at = SCRIPT.index(old)
        code = code[:at] + new + code[at + len(old):]
    return code


def caught_by_run(folder, settings):
    """What the script of `folder`, run in this process at tiny size, says against itself, or ''."""
    write_tiny_shards(folder / "shards")
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        ended = enter(TINY | dict(
            DATA_PATH=str(folder / "shards"), OUT_DIR=str(folder), RUN_ID="run",
            TOKENIZER_PATH=str(TOKENIZER)) | settings,
            script=verify.load_script(folder / "train_gpt.py"))
    if ended.code == 2:
        return ended.err.strip().split("\n")[-1][:100]
    line = re.findall("^compliance .*", ended.out, re.MULTILINE)[-1]
    return "" if "verdict:ok" in line else " ".join(re.findall(r"\w+:(?:fail|other_limits)", line))


def caught_by_verify(folder):
    """The claims that differ, or ''."""
    log, args = verify.parse([
        str(folder / "run.txt"), "--cpu", "--places", "128", "--artifact",
        str(folder / "run.artifact"), "--script", str(folder / "train_gpt.py")])
    try:
        return "; ".join(verify.differing(verify.verify(log, args)))
    except ValueError as error:  # the artifact cannot even be read
        return str(error)[:100]


def caught_by_test(folder, words):
    """The tests that fail, or ''."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("data", "logs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    command = f"{sys.executable} -m pytest -n 0 -p no:cacheprovider tests/{words}"
    done = subprocess.run(command, cwd=folder, shell=True, capture_output=True, text=True,
                          timeout=600)
    return "; ".join(re.findall(r"^FAILED \S*::(\w+)", done.stdout, re.MULTILINE)[:2])


def examine(cheat, queue=None):
    """Plant one cheat: (who found it, what was found), ("nobody", ""), or ("error", traceback)."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = ("nobody", "")
        try:
            (folder / "train_gpt.py").write_text(plant(cheat), encoding="utf-8")
            (folder / "helper.py").write_text("ANSWERS = " + repr("x" * 1000))
            if cheat.who.startswith("test"):
                found = ("test", caught_by_test(folder, cheat.who))
            elif by_run := caught_by_run(folder, cheat.settings):
                found = ("run", by_run)
            elif cheat.who != "run":
                found = ("verify", caught_by_verify(folder))
        except Exception:
            found = ("error", traceback.format_exc())
    text = found[1].replace(f"{scratch}/", "").replace(f"{ROOT}/", "")
    found = (found[0], text) if text else ("nobody", "")
    if queue:
        queue.put(found)
    return found


def main(words):
    """Run the chosen cheats, print and write the table; the exit code."""
    chosen = [CONTROL, *(c for c in read_cheats() if all(word in c.name for word in words))]
    rows, missed = [], []
    began = time.perf_counter()
    fork = multiprocessing.get_context("fork")  # torch is imported once
    for cheat in chosen:
        queue = fork.Queue()
        process = fork.Process(target=examine, args=(cheat, queue))
        process.start()
        who, what = queue.get(timeout=900)
        process.join()
        if who != cheat.who.split("_")[0] and (who, cheat.who) != ("run", "verify"):
            missed.append(cheat.name)
        rows.append(f"| {cheat.name} | {who} | {what.strip().splitlines()[-1] if what else ''} |")
        print(rows[-1], flush=True)
    if not words:
        text = (f"# Planted cheats\n\n`python tests/cheats/run.py`: {len(chosen) - 1} changes of "
                "train_gpt.py ([cheats.txt](../../tests/cheats/cheats.txt)), each\nrun at toy size "
                f"on a CPU, {time.perf_counter() - began:.0f} s in all. run: the run's own verdict;"
                " verify:\n[verify.py](../tools/verify.py); test: the test-suite. What no program "
                "finds stands in\n[tests/README.md](../../tests/README.md).\n\n"
                "| cheat | caught by | as |\n|---|---|---|\n")
        OUT.write_text(text + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(chosen) - len(missed)} of {len(chosen)} as expected; not: {missed or 'none'}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
