"""tests/cheats: each cheat still fits the script, and the quickest are run and must be found.

python tests/cheats/run.py runs all of them and writes logs/checks/cheats.md.
"""

import re

import pytest
import run as cheats

CHEATS = {cheat.name: cheat for cheat in cheats.read_cheats()}
QUICK = ["scores lowered by a constant", "scores that know the target", "probing switched off",
         "a leak at every place", "a leak from the row below", "the state has seen the whole row",
         "half of the text is scored", "the last part is left out", "bytes entered twice",
         "the cap is 16 MiB"]


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_still_applies_to_the_script_and_the_last_record_has_its_finder(name):
    """A change that no longer fits proves nothing: mend cheats.txt."""
    compile(cheats.plant(CHEATS[name]), name, "exec")
    record = cheats.OUT.read_text("utf-8")
    assert re.search(rf"^\| {re.escape(name)} \| (run|verify|test) \|", record, re.MULTILINE)


def test_nothing_is_found_in_the_script_as_it_is(tmp_path):
    (tmp_path / "train_gpt.py").write_text(cheats.SCRIPT, encoding="utf-8")
    assert cheats.caught_by_run(tmp_path, {}) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_cheat_is_found_by_the_run(name):
    cheat = CHEATS[name]._replace(settings=dict(ITERATIONS="1"))
    assert cheats.examine(cheat)[0] == "run"
