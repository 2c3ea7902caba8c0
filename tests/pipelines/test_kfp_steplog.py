"""The log of a pod whose task has several steps, as `data` has: lines of a real one of Kubeflow Pipelines 2.17."""

from __future__ import annotations

from pipelines.runs.kfp import steplog

BEFORE = """\
I1130 22:29:51.695475      16 main.go:67] Setting log level to: '1'
[KFP Executor 2026-11-30 22:29:53,100 INFO]: Looking for component `data`
▶ volumes
run e2e-fc995774: 8 steps of 1024 tokens
✓ volumes (0.0 s)
▶ download
download: unchanged: /mnt/datasets/raw/1a2b
"""
DONE = """\
✓ download (0.2 s)
▶ hygiene
hygiene: off in this job
✓ hygiene (0.0 s)
[KFP Executor 2026-11-30 22:29:58,100 INFO]: Wrote executor output file
I1130 22:29:58.430913      16 client.go:847] Attempting to update DAG state
"""
FAILED = """\
✓ download (0.2 s)
▶ hygiene
error 65: hygiene: en.jsonl:3: not valid JSON; fix it
F1130 22:29:58.430913      16 main.go:57] failed to execute component: exit status 65
"""


def test_all_steps_of_a_task_are_its_own_lines():
    assert steplog.own(BEFORE)[-2:] == ["▶ download", "download: unchanged: /mnt/datasets/raw/1a2b"]
    own = steplog.own(BEFORE + DONE)
    assert [line for line in own if line.startswith(("▶", "✓"))] == [
        "▶ volumes",
        "✓ volumes (0.0 s)",
        "▶ download",
        "✓ download (0.2 s)",
        "▶ hygiene",
        "✓ hygiene (0.0 s)",
    ]
    assert steplog.last(own) == "hygiene: off in this job"
    assert not any("KFP Executor" in line or "client.go" in line for line in own)


def test_a_later_steps_error_is_the_reason():
    own = steplog.own(BEFORE + FAILED)
    assert own[-1] == "error 65: hygiene: en.jsonl:3: not valid JSON; fix it"
    assert steplog.has_failed(own) and steplog.failure(own, "") == "en.jsonl:3: not valid JSON; fix it"
