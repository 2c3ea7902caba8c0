"""What doctor says about kernels' packages that are not installed."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from pipelines.doctor import kernels
from trainer.ops import packages

GPU = torch.device("cuda", 0)
REQUIRES = [
    'flash-attn-4>=4.0.0b36; extra == "cuda"',
    'flash-attn>=2.8; extra == "cuda"',
    'mamba-ssm>=2.3.1; extra == "cuda"',
    'transformer-engine[pytorch]>=2.11; extra == "cuda"',
    "numpy>=1.26",
]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    packages.load.cache_clear()


def test_each_missing_package_is_told_with_its_use_and_the_command(hopper: None):
    found = {finding.what: finding for finding in kernels.absent(GPU)}
    assert {"mamba_ssm", "causal_conv1d", "flash_attn", "flash-attn-4", "transformer_engine"} <= found.keys()
    assert found["mamba_ssm"].state == "missing"
    assert found["mamba_ssm"].detail == "not installed; it would compute: ssd"
    assert found["transformer_engine"].detail == "not installed; it would compute: experts, products in FP8"
    assert found["mamba_ssm"].remedy.startswith(
        "pip install --no-build-isolation 'mamba-ssm>=2.3.1', or take the image"
    )
    assert "'flash-attn>=2.8'" in found["flash_attn"].remedy
    assert "'flash-attn-4>=4.0.0b36'" in found["flash-attn-4"].remedy
    assert "'transformer-engine[pytorch]>=2.11'" in found["transformer_engine"].remedy
    assert "torch" not in found, "what is installed is not missing"
    assert "flash_attn_3" not in found, "no registry has it"


def test_a_package_that_this_gpu_cannot_use_is_not_missed(hopper: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert "flash_attn" not in {finding.what for finding in kernels.absent(GPU)}


def test_the_command_names_the_version_that_the_extra_demands():
    """Every package of the extra, by the project's own metadata."""
    for line in importlib.metadata.requires("yaongi") or []:
        requirement, _, marker = line.partition(";")
        if "cuda" in marker:
            name = requirement.partition(">=")[0].partition("[")[0]
            assert kernels.install_command(name) == f"pip install --no-build-isolation '{requirement.strip()}'"
