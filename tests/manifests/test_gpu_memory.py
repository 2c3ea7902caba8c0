"""A job that a GPU cannot hold is refused; sizes of the state are counted here from the built parameters."""

import subprocess
import sys

import pytest

from manifests.spec import load_job
from trainer.arithmetic.activations import activations
from trainer.specbase import SpecError

GIB = 2**30


def job(gib: float, gpus: int = 1, **train):
    return load_job("tiny", {"cluster": {"nodes": 1, "gpus_per_node": gpus, "gpu_memory_gib": gib}, "train": train})


def state_bytes(**optimizer: str) -> int:
    """FP32 weights, gradients and what the real optimizers hold."""
    from trainer.model.hybrid import build_model
    from trainer.optim import build_optimizers
    from trainer.spec import OptimizerSpec

    model_spec = load_job("tiny").train.model
    model = build_model(model_spec, seed=0, token_classes=list(range(model_spec.vocab_size)))
    optimizers = build_optimizers(model, OptimizerSpec(**optimizer), model_spec)
    states = [tensor for tensor in optimizers.state_dict().values() if tensor.ndim > 0]  # without the step counts
    return 8 * sum(p.numel() for p in model.parameters()) + sum(t.numel() * t.element_size() for t in states)


@pytest.mark.parametrize("optimizer", [{"name": "muon"}, {"name": "adamw"}, {"state_dtype": "bf16"}])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_the_limit_is_state_activations_and_reserve(optimizer, policy):
    """In FP32, without copies of weights; tests/trainer/test_recompute.py holds the activations to what torch keeps."""
    model = load_job("tiny").train.model
    activated = 8 * 256 * activations(model, 256, policy, "fp32").peak
    needed = (state_bytes(**optimizer) + activated + 2 * GIB) / GIB
    options = {"optimizer": optimizer, "runtime": {"activation_checkpointing": policy}, "precision": {"dtype": "fp32"}}
    job(needed * 1.00001, **options)
    with pytest.raises(SpecError) as error:
        job(needed * 0.99999, **options)
    assert "cluster.gpu_memory_gib" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_message_says_how_much_is_needed_and_what_to_change():
    with pytest.raises(SpecError, match=r"gpu_memory_gib 40 is too little: .* take 41\.2 GiB on each GPU.*larger GPUs"):
        load_job("h100-4b", {"cluster": {"gpu_memory_gib": 40}})


def test_the_large_presets_fit_80_gib_only_when_they_recompute():
    for name in ("h100-4b", "h100-4b-interleaved"):
        assert load_job(name).cluster.gpu_memory_gib == 80
    keeping = {"train": {"runtime": {"activation_checkpointing": "none"}}}
    with pytest.raises(SpecError, match=r"micro-batch 38\.8 GiB.*lower .*micro_batch_rows 4, or write .*full"):
        load_job("h100-4b", keeping)
    assert load_job("h100-4b", {**keeping, "cluster": {"gpu_memory_gib": 141}})
    fewer = {"batch": {"micro_batch_rows": 2}, **keeping["train"]}
    assert load_job("h100-4b", {"train": fewer})


def test_without_gpus_the_field_says_nothing():
    assert job(1e-6, gpus=0).cluster.gpu_memory_gib == 1e-6


def test_the_check_needs_no_pytorch():
    code = "import sys; sys.modules['torch'] = None; from manifests.spec import load_job; load_job('h100-4b')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ranks_that_share_the_state_need_less_each():
    cluster = {"nodes": 2, "gpus_per_node": 8, "gpu_memory_gib": 24}
    rows = {"batch": {"micro_batch_rows": 1}}
    assert load_job("h100-4b", {"cluster": cluster, "train": rows})
    with pytest.raises(
        SpecError, match=r"take 41\.2 GiB on each GPU \(ddp=16x1,experts=16x1\).*train\.parallel\.data fsdp"
    ):
        load_job("h100-4b", {"cluster": cluster, "train": {**rows, "parallel": {"data": "ddp"}}})
    assert load_job("h100-4b", {"cluster": cluster, "train": {**rows, "parallel": {"expert": 16}}})


def test_a_mesh_that_the_cluster_cannot_form_is_refused_before_submission():
    with pytest.raises(
        SpecError, match=r"train\.parallel\.expert 6 must divide the 16 ranks .* write one of 1, 2, 4, 8, 16"
    ):
        load_job("h100-4b", {"cluster": {"nodes": 2, "gpus_per_node": 8}, "train": {"parallel": {"expert": 6}}})


def test_how_ranks_share_a_model_is_not_part_of_the_run():
    jobs = [load_job("tiny", {"train": {"parallel": parallel}}) for parallel in ({}, {"data": "fsdp"}, {"expert": 2})]
    assert len({job.run_name for job in jobs}) == 1
