"""The chart's server on a real cluster: it answers through its Service without a break while it is rolled out anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kube import PIPELINE_IMAGE, TRAINER_IMAGE, pod, wait_for
from pipeline_run import PipelineRun
from test_chart_cluster import helm

from manifests import chart, serving
from manifests.names import APP_LABEL, SERVER_APP

pytestmark = pytest.mark.e2e

KEY, SECRET, CLIENT, RELEASE = "a key of the test", "serve-key", "serving-client", "served"


def test_no_answer_breaks_while_the_server_is_rolled_out(first: PipelineRun, tmp_path: Path) -> None:
    """Of four clients, two keep their connections and two make a new one each time; none tries anything twice."""
    assert first.code == 0, first.log
    space = first.namespace
    values = {
        "launcher": {"create": False},
        "storage": {name: {"existingClaim": f"llm-{name}-pvc"} for name in ("datasets", "checkpoints")},
        "networkPolicy": {"enabled": False},  # the namespace has them
        # Prometheus' operator may be there for another test's time only.
        "monitoring": {name: {"enabled": False} for name in ("dashboards", "podMonitor", "rules")},
        "serve": {
            "enabled": True,
            "export": f"{first.job.run_dir.removeprefix('/mnt/checkpoints/')}/export",
            "image": TRAINER_IMAGE,
            "apiKeySecret": SECRET,
            "rows": 8,
            "cpus": "200m",
            "memory": "1Gi",
            "graceSeconds": 20,
        },
    }
    space.kubectl("create", "secret", "generic", SECRET, f"--from-literal={serving.KEY}={KEY}")
    (tmp_path / "values.json").write_text(json.dumps(values))
    try:
        helm(space, "install", RELEASE, str(chart.CHART), f"--values={tmp_path / 'values.json'}")
        status = ("rollout", "status", f"deployment/{SERVER_APP}", "--timeout=300s")
        space.kubectl(*status)
        before = {item["metadata"]["name"] for item in space.find("pods", "-l", f"{APP_LABEL}={SERVER_APP}")}
        script = Path(__file__).with_name("serving_client.py").read_text()
        model = first.read_json("export/manifest.json")["name"]
        command = ["python", "-c", script, SERVER_APP, str(serving.PORT), KEY, model]
        space.apply(pod(CLIENT, PIPELINE_IMAGE, command, mounts={}))
        space.running(CLIENT)
        space.kubectl("rollout", "restart", f"deployment/{SERVER_APP}")
        space.kubectl(*status)

        def pods() -> set[str]:
            return {item["metadata"]["name"] for item in space.find("pods", "-l", f"{APP_LABEL}={SERVER_APP}")}

        wait_for("the old server to go", lambda: not pods() & before, 120)
        space.execute(CLIENT, "touch", "/tmp/stop")
        code, log = space.exit_of(CLIENT, 300)
        told = json.loads(log.splitlines()[-1])
        assert code == 0 and told["failures"] == [], told
        assert told["answers"] >= 40 and len(told["texts"]) == 2, told
    finally:
        print(space.kubectl("logs", "-l", f"{APP_LABEL}={SERVER_APP}", "--prefix", "--tail=-1", check=False))
        helm(space, "uninstall", RELEASE, "--ignore-not-found")
        space.kubectl("delete", "pod", CLIENT, "--ignore-not-found", "--grace-period=0", "--force", check=False)
