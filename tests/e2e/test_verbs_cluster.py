"""`yaongi status`, `logs`, `stop` and `resume` on a run of the cluster; a script replaces the trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from kube import Namespace, wait_for
from launching import pods_of, scripted, tiny

from components.cluster.api import Cluster
from components.launch.kubernetes import start
from manifests.kinds import KINDS

pytestmark = pytest.mark.e2e

# Continues from the step in a file on the volume, and saves it when stopped.
SCRIPT = """
file=/mnt/checkpoints/$RUN; step=$(cat $file 2>/dev/null || echo 0)
save() {
  [ "$index" = 0 ] && echo $step > $file && echo "checkpoint of step $step published after 0.1 s"
  sleep 8
  echo '{"code": 143, "reason": "stopped by SIGTERM"}' > /dev/termination-log; exit 143
}
trap save TERM
echo "worker $index begins after step $step"
while [ $step -lt 1000 ]; do
  step=$((step + 1))
  echo "step $step/1000  loss 2.5000  grad 1.0  lr 1.00e-02  1,234 tokens/s  ETA 0:10:00"
  sleep 0.7
done
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_shown_stopped_and_resumed(
    namespace: Namespace,
    yaongi: Callable[..., tuple[int, str, str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    kind: str,
) -> None:
    def ask(*arguments: str) -> tuple[int, str]:
        code, said, error = yaongi(*arguments, "--namespace", namespace.name)
        with capsys.disabled():
            print(f"$ yaongi {' '.join(arguments)} ({code})\n{said}{error}", flush=True)
        return code, said + error

    def good(*arguments: str) -> str:
        code, said = ask(*arguments)
        assert code == 0, said
        return said

    job = tiny(namespace, cluster={"job": kind, "grace_seconds": 30})
    name = job.run_name
    start(Cluster.connect(namespace.name), scripted(job, SCRIPT.replace("$RUN", name)), job.cluster)
    wait_for("steps", lambda: "step        " in (shown := good("status", name)) and "/1,000" in shown, 300, every=2)
    row = f"{name} namespace {namespace.name} running"  # columns are as wide as their longest entries
    wait_for("both workers", lambda: row in " ".join(good("status").split()), 300, every=2)
    shown = good("status", name[:7])
    for line in ("loss        2.5000", "speed       1,234 tokens/s", "left        0:10:00", "checkpoint  none yet"):
        assert line in shown
    assert good("logs", name).startswith("worker 0 begins after step 0\nstep 1/1000")
    assert good("logs", name, "--rank", str(job.cluster.ranks_per_node)).startswith("worker 1 begins")

    stopped = good("stop", name)
    saved = int(stopped.split("the newest checkpoint is of step ")[1].split(";")[0])
    assert saved > 0 and f"continue: yaongi resume {name} -n {namespace.name}" in stopped
    assert not pods_of(namespace, job)

    assert f"job {name} continues" in good("resume", name)
    wait_for("its log", lambda: f"begins after step {saved}" in ask("logs", name)[1], 300, every=2)
    code, said = ask("resume", name)
    assert code == 69 and f"job {name} is already running" in said
    assert not list((tmp_path / "work/stopped").iterdir())

    suspension = {"suspend": True} if kind == "trainjob" else {"runPolicy": {"suspend": True}}
    namespace.kubectl("patch", kind, name, "--type=merge", "-p", json.dumps({"spec": suspension}))
    wait_for("the suspension", lambda: "suspended: someone has suspended it" in good("status", name), 300, every=2)
    wait_for("the workers to go", lambda: not pods_of(namespace, job), 300)
    good("resume", name)
    wait_for("new workers", lambda: "worker 0 begins" in ask("logs", name)[1], 300, every=2)
    good("stop", name)
