"""Two pods train by megatron-core over gloo: rendezvous, token files, data sets, experts on both pods, checkpoints.

The images have no Megatron, and its program needs GPUs: the folder YAONGI_MEGATRON_CORE (made by run.sh) and the
program in tests/e2e/megatron are copied onto the checkpoints volume. Everything else is as in a run on GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from kube import TRAINER_IMAGE, Namespace
from launching import Launcher, tiny
from pipeline_run import losses

from trainer.specbase import to_yaml

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "trainer"))
import micro  # noqa: E402  a corpus of random words

pytestmark = pytest.mark.e2e
STEPS = 4
MODEL = {
    "layers": ["*E", "*E"],
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_theta": 10000.0, "qk_norm": True},
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "expert_width": 16,
        "activation": "swiglu",
        "scores": "softmax",
        "score_scale": 1.0,
        "bias_update_rate": 0.0,
        "sequence_loss_weight": 0.0,
        "balance_loss_weight": 0.01,
    },
    "mamba": None,
    "mlp": None,
    "engram": [],
}


def test_two_pods_train_one_model_by_megatron_core(volumes: Namespace, launcher: Launcher, tmp_path: Path) -> None:
    core = os.environ.get("YAONGI_MEGATRON_CORE")
    if not core:
        pytest.skip("needs YAONGI_MEGATRON_CORE, a folder with the package megatron-core (make e2e)")
    programs = tmp_path / "programs"
    shutil.copytree(core, programs, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (TESTS / "e2e" / "megatron" / "pretrain_gpt.py", TESTS / "peers" / "megatron_rank.py"):
        shutil.copy(file, programs)
    (tmp_path / "data").mkdir()
    micro.make_data(tmp_path / "data")
    job = tiny(volumes, cluster={"cpus_per_node": 0.2, "memory_gib_per_node": 1.5, "shared_memory_gib": 0.0625})
    place, data = Path(f"/mnt/checkpoints/{job.run_name}"), Path(f"/mnt/datasets/{job.run_name}")
    for source, target in ((programs, place), (tmp_path / "data", data)):
        volumes.kubectl("cp", str(source), f"reader:{target}", "--no-preserve=true")
    spec = micro.micro_spec(
        data,
        place / "run",
        engine="megatron",
        model=MODEL,
        megatron={"expert_parallel": 2},
        optimizer={"name": "adamw", "spike_guard": None},
        steps=STEPS,
        checkpoint={"every_steps": STEPS},
        runtime={"hang_timeout_seconds": 300, "communication_timeout_seconds": 120},
    )
    script = f"cat > /tmp/train.yaml <<'END'\n{to_yaml(spec)}\nEND\nexport PYTHONPATH={place}; "
    launcher(job, f"{script}exec python -m trainer.entrypoint train --spec /tmp/train.yaml", TRAINER_IMAGE)

    assert launcher.has("mesh: TP 1 × PP 1 × EP 2 × DP 2"), "\n".join(launcher.lines)
    found = losses(volumes.execute("reader", "cat", f"{place}/run/logs/metrics.jsonl"))
    assert len(found) == STEPS and found[-1] < found[0]
    written = set(volumes.execute("reader", "ls", f"{place}/run/megatron/iter_{STEPS:07d}").split())
    assert {name.split("_")[2] for name in written if name.endswith(".distcp")} == {"0", "1"}, "by both pods"
    index = volumes.execute("reader", "sh", "-c", f"ls {place}/run/megatron/cache")
    assert "GPTDataset-train-document_index.npy" in index
    made = volumes.execute("reader", "cat", f"{place}/run/checkpoints/step-{STEPS:08d}/checkpoint.json")
    assert json.loads(made)["step"] == STEPS
