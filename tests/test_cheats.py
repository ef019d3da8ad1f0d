"""tests/cheats: each cheat still fits the script, and the quickest are run and must be found.

python tests/cheats/run.py runs all of them and writes logs/checks/cheats.md.
"""

import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "cheats"))

import run as cheats  # noqa: E402

CHEATS = {cheat.name: cheat for cheat in cheats.read_cheats()}
QUICK = ["scores lowered by a constant", "scores that know the target", "probing switched off",
         "a leak at every place", "a leak from the row below", "the state has seen the whole row",
         "half of the text is scored", "the last part is left out", "bytes entered twice",
         "the cap is 16 MiB"]


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_still_applies_to_the_script(name):
    """A change that no longer fits proves nothing: mend cheats.txt."""
    compile(cheats.plant(CHEATS[name]), name, "exec")


def test_change_that_does_not_fit_is_named():
    cheat = CHEATS["bytes entered twice"]._replace(edits=[["no such line\n", ""]])
    with pytest.raises(ValueError, match="'bytes entered twice': stands 0 times .* cheats.txt"):
        cheats.plant(cheat)


def test_there_are_thirty_cheats_and_each_names_its_catcher():
    assert len(CHEATS) >= 30
    for cheat in CHEATS.values():
        assert re.fullmatch(r"run|verify|test_\w+\.py -k .+", cheat.who) and cheat.edits, cheat


def test_last_record_has_a_row_of_each_cheat_that_was_found():
    found = dict(re.findall(r"^\| (.+?) \| (\w+) \|", cheats.OUT.read_text("utf-8"), re.MULTILINE))
    assert [name for name in CHEATS if found.get(name) not in ("run", "verify", "test")] == []


def test_nothing_is_found_in_the_script_as_it_is(tmp_path):
    (tmp_path / "train_gpt.py").write_text(cheats.SCRIPT, encoding="utf-8")
    assert cheats.caught_by_run(tmp_path, {}) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_cheat_is_found_by_the_run(name):
    cheat = CHEATS[name]._replace(settings=dict(ITERATIONS="1"))
    assert cheats.examine(cheat)[0] == "run"
