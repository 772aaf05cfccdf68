"""What `make matrix` asks pip for, counts and writes; the runs themselves are its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("make matrix reads pyproject.toml with tomllib: use Python 3.11", allow_module_level=True)
from tests import matrix

REPORT = """<testsuites><testsuite>
<testcase name="good"/><testcase name="left"><skipped/></testcase><testcase name="bad"><failure/></testcase>
<testcase name="broken"><error/></testcase><testcase name="left and broken"><skipped/><error/></testcase>
</testsuite></testsuites>"""


def test_lower_bounds_and_ranges() -> None:
    oldest, newest = matrix.requirements("oldest"), matrix.requirements("newest")
    assert {line.split("==")[0] for line in oldest} == {line.split(">=")[0] for line in newest}
    assert {"torch", "triton", "transformers", "peft", "bitsandbytes", "pytest"} <= set(matrix.ranges())
    assert not any(">=" in line for line in oldest)
    assert all(line.replace("==", ">=") in newest for line in oldest)


def test_outcomes_of_a_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    found = matrix.read_report(report, "kernels", 90)
    assert (found.passed, found.skipped, found.failed) == (1, 1, ("bad", "broken", "left and broken"))
    assert found.row("oldest").startswith("| oldest | kernels | 1 | 3: bad, broken, left and broken | 1 | 1.5 |")


def test_a_part_replaces_its_own_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "TABLE", tmp_path / "docs" / "matrix.md")
    matrix.write("oldest", [matrix.Outcome("kernels", 1), matrix.Outcome("quant", 2)], ["3"] * (1 + len(matrix.SHOWN)))
    matrix.write("triton==3.8.0", [matrix.Outcome("compile gate", 5)], [])
    matrix.write("oldest", [matrix.Outcome("kernels", 7)], ["4"] * (1 + len(matrix.SHOWN)))
    rows = [line for line in matrix.TABLE.read_text().splitlines() if line.startswith("| ") and " part " not in line]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| oldest", "4", "4"],
        ["| oldest", "kernels", "7"],
        ["| triton==3.8.0", "compile gate", "5"],
    ]


@pytest.mark.parametrize("argument", ["latest", "triton==3", "--all"])
def test_unknown_parts_are_refused(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main([argument]) == 2
    assert argument in capsys.readouterr().err
