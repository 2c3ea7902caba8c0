"""What the tests report about themselves."""

from types import SimpleNamespace

from tools import left_out


def test_skipped_tests_are_counted_by_what_is_missing_in_one_line():
    reasons = ["needs a CUDA device", "promtool is not installed", "needs a CUDA device", "no image: line 1\nline 2"]
    reports = [SimpleNamespace(longrepr=("file.py", 3, f"Skipped: {reason}")) for reason in reasons]
    line = left_out(reports)
    assert "needs a CUDA device (2)" in line and "promtool is not installed (1)" in line and line.startswith("4 ")
    assert "\n" not in line
    assert left_out([]) == ""
