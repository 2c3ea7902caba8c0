import io

from rich.console import Console

from pipelines.progress import Watcher

LINES = """\
13:00:00.000 - INFO - Running pipeline: 'yaongi-pretrain'
    [KFP Executor 2026-01-01 INFO]: Looking for component `download`
    {
        "inputs": {}
    }
    ▶ download
    download ko: 1.0 MB, 2.0 MB/s
    ✓ download (1.0 s)
    [KFP Executor 2026-01-01 INFO]: Wrote executor output file
13:00:01.000 - INFO - Task 'download' finished
    ▶ train
    step 1/4  loss 8.3
"""
CRASH = """\
    Traceback (most recent call last):
      File "loop.py", line 1, in run
        raise RuntimeError("boom")
    RuntimeError: boom
"""


def watch(text: str, *, verbose: bool = False) -> tuple[Watcher, str, str]:
    shown, log = io.StringIO(), io.StringIO()
    watcher = Watcher(Console(file=shown, width=100), log, verbose=verbose)
    watcher.follow(text.splitlines(keepends=True))
    return watcher, shown.getvalue(), log.getvalue()


def test_what_each_step_says_alike_is_shown_once_and_logged_each_time():
    text = "".join(
        f"    ▶ {name}\n    metrics of the steps: port 9391\n    operation ssd: {kind}\n    ✓ {name} (1.0 s)\n"
        for name, kind in (("train", "chunked"), ("evaluate", "chunked"), ("export", "reference"))
    )
    _, shown, log = watch(text)
    assert [line.strip() for line in shown.splitlines() if line.startswith("  ")] == [
        "metrics of the steps: port 9391",
        "operation ssd: chunked",
        "operation ssd: reference",
    ]
    assert log == text


def test_only_the_steps_and_their_lines_are_shown_and_everything_is_logged():
    _, shown, log = watch(LINES)
    assert shown.splitlines() == [
        "▶ download",
        "  download ko: 1.0 MB, 2.0 MB/s",
        "✓ download (1.0 s)",
        "▶ train",
        "  step 1/4  loss 8.3",
    ]
    assert log == LINES


def test_a_foreseen_failure_is_the_steps_own_line():
    watcher, shown, _ = watch(LINES + "    error 70: train: ended with exit code 70: loss is nan\n    after\n")
    assert watcher.failure == "train: ended with exit code 70: loss is nan"
    assert watcher.code == 70
    assert "error" not in shown


def test_of_a_crash_the_last_line_remains_and_the_traceback_goes_to_the_log():
    watcher, shown, log = watch(LINES + CRASH)
    assert (watcher.failure, watcher.last_line) == ("", "train: RuntimeError: boom")
    assert "Traceback" not in shown and "boom" not in shown
    assert CRASH in log


def test_verbose_shows_everything():
    _, shown, _ = watch(LINES + CRASH, verbose=True)
    assert "KFP Executor" in shown and "Traceback" in shown


CLEANED_UP = """\

13:00:02.000 - ERROR - Task \x1b[96m'launch'\x1b[0m finished with status \x1b[91mFAILURE\x1b[0m
13:00:02.100 - INFO - Executing task \x1b[96m'cleanup'\x1b[0m
    [KFP Executor 2026-01-01 INFO]: Looking for component `cleanup`
    {
        "ended": {
            "state": "FAILED"
        }
    }
    ▶ cleanup
    deleting job small
    error 69: cleanup: the API server cannot be reached
"""


def test_a_step_that_was_killed_is_what_failed_not_what_cleans_up_after_it():
    watcher, shown, _ = watch(LINES + CLEANED_UP)
    assert watcher.failure == "train: step 1/4  loss 8.3"
    assert shown.splitlines()[-2:] == ["▶ cleanup", "  deleting job small"]
    watcher, _, _ = watch(LINES + "    error 70: train: loss is nan\n" + CLEANED_UP)
    assert watcher.failure == "train: loss is nan"


SIDE_BY_SIDE = """\
            ▶ encode 1/2
            ▶ encode 2/2
            shards: encoded: 1 MB
            ✓ encode 1/2 (5.0 s)
            shards: encoded: 2 MB
"""


def test_steps_of_a_loop_are_deeper_and_run_side_by_side():
    watcher, shown, _ = watch(LINES + SIDE_BY_SIDE + "            ✓ encode 2/2 (6.2 s)\n    ▶ shards\n    a line\n")
    assert shown.splitlines()[5:] == [
        "▶ encode 1/2",
        "▶ encode 2/2",
        "  shards: encoded: 1 MB",
        "✓ encode 1/2 (5.0 s)",
        "  shards: encoded: 2 MB",
        "✓ encode 2/2 (6.2 s)",
        "▶ shards",
        "  a line",
    ]
    assert watcher.seconds.keys() == {"download", "encode 1/2", "encode 2/2"}
    watcher, _, _ = watch(SIDE_BY_SIDE + "            error 65: encode 2/2: ko.jsonl:3: not valid JSON; fix it\n")
    assert watcher.failure == "encode 2/2: ko.jsonl:3: not valid JSON; fix it"
