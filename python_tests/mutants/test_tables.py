"""The tables of mutants fit the code, and no mutant that changes a number is known to survive."""

from __future__ import annotations

import pytest
from mutants import ROOT, Mutant, read_results, read_tables


def test_every_mutant_fits_the_code_and_stands_once():
    mutants = read_tables()
    assert len({m.id for m in mutants}) == len(mutants)
    for mutant in mutants:
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert mutant.apply(text) != text, mutant
        assert mutant.tests, mutant
        for test in mutant.tests:
            assert (ROOT / test.split("::")[0]).exists(), test


def test_every_mutant_was_run_and_none_survived_unexplained():
    results = read_results()
    for mutant in read_tables():
        assert mutant.id in results, f"{mutant.id} has no result: make mutants"
        assert mutant.equivalent or results[mutant.id]["outcome"] == "killed", mutant


def test_a_text_that_stands_twice_or_never_is_refused():
    mutant = Mutant("room", "file", "a", "b", ("tests",))
    assert mutant.apply("cac") == "cbc"
    for text in ("aa", "c"):
        with pytest.raises(ValueError, match="old must stand once in file, got"):
            mutant.apply(text)
