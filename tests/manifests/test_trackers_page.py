"""docs/trackers.md: what it tells people to write is right."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import manifests
from manifests.clusterspec import ClusterSpec
from manifests.spec import load_job
from trainer.specbase import changes_from_sets
from trainer.trackerspec import KEYS, variables_of

PAGE = (Path(manifests.__file__).parents[1] / "docs" / "trackers.md").read_text(encoding="utf-8")


def test_the_section_is_one_of_a_job_with_every_tracker() -> None:
    lines = [line[4:] for line in PAGE.splitlines() if line.startswith("    ")]
    start = lines.index("train:")
    section = yaml.safe_load("\n".join(lines[start : start + 5]))
    job = load_job("tiny", section)
    assert job.train.trackers is not None and job.train.trackers.names == list(KEYS)
    assert load_job("tiny").run_name == job.run_name


def test_changes_on_the_command_line_are_understood() -> None:
    found = re.findall(r"--set (train\.trackers\S+?)[`\s]", PAGE)
    assert len(found) >= 2
    for change in found:
        trackers = load_job("tiny", changes_from_sets([change])).train.trackers
        assert trackers is not None and trackers.wandb is not None and trackers.wandb.project == "my-models"


def test_commands_make_the_secrets_that_pods_read() -> None:
    made = {
        match[1]: re.findall(r"--from-file=(\w+)=FILE", match[2])
        for match in re.finditer(r"create secret generic (\S+)(.*)", PAGE)
    }
    cluster = ClusterSpec()
    expected = {"wandb": cluster.wandb_secret, "mlflow": cluster.mlflow_secret, "langfuse": cluster.langfuse_secret}
    assert set(made) == set(expected.values())
    for name, complete in KEYS.items():
        assert tuple(made[expected[name]]) in complete
        assert all(f"`{variable}`" in PAGE for variables in complete for variable in variables)
        assert set(made[expected[name]]) <= set(variables_of(name))
