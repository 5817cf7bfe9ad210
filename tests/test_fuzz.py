import sys

import pytest

from fuzz import KINDS, fuzz
from fuzzing.verdicts import run_input


@pytest.mark.parametrize("kind", KINDS)
def test_odd_inputs_are_taken_or_refused_with_a_written_error(kind):
    report = fuzz(kind, range(50))
    assert not report.findings, report.to_text()
    assert report.outcomes["taken"] > 3 and report.outcomes["refused"] > 3


# Pillow closes the files of damaged pictures when they are collected, which is nobody's refusal.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_odd_inputs_are_taken_or_refused_with_a_written_error(kind):
    report = fuzz(kind, range(50, 1050))
    assert not report.findings, report.to_text()


def test_an_input_is_the_same_whatever_came_before():
    alone, behind = fuzz("rows", [9], seed=3), fuzz("rows", [4, 9], seed=3)
    assert alone.doors.keys() <= behind.doors.keys()
    assert fuzz("rows", [9], seed=3).doors == alone.doors


@pytest.mark.parametrize(
    ("fail", "outcome"),
    [
        (lambda: [][1], "finding"),
        (lambda: {}["a"], "finding"),
        (lambda: 1 + None, "finding"),
        (lambda: int("word"), "finding"),
        (lambda: sys.exit(1), "finding"),
        (lambda: [0 for _ in iter(int, 1)], "finding"),
        (lambda: None, "taken"),
    ],
)
def test_what_merely_happens_is_a_finding(fail, outcome):
    assert run_input("door", fail, "", max_seconds=0.2).outcome == outcome


def test_what_the_package_wrote_down_is_a_refusal():
    from hf_mm.data.formats import check_row

    assert run_input("door", lambda: check_row({}, 0, "pair"), "", max_seconds=1).outcome == "refused"
