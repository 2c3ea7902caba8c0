"""Two real ranks on simulated, different machines: both choose the same, which the weaker one supports."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
import torch

from trainer import distributed
from trainer.specbase import SpecError


@pytest.fixture(scope="module")
def told(micro_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    directory = tmp_path_factory.mktemp("agreement")
    nodes = [{"NODE_NAME": f"node-{rank}"} for rank in range(2)]
    arguments = [directory / "told", micro_data, directory]
    forked.done(forked.run("agreement_ranks", 2, arguments, directory, nodes))
    return [json.loads((directory / f"told.{rank}.out").read_text()) for rank in range(2)]


def test_alone_they_would_choose_otherwise(told: list[dict]):
    strong, weak = (rank["alone"] for rank in told)
    assert strong == {"layout": "ddp=2x1,experts=2x1", "precision": "bf16", "ssd": "chunked"}
    assert weak == {"layout": "fsdp=1x2,experts=2x1", "precision": "fp16", "ssd": "reference"}


def test_together_they_choose_what_the_weaker_one_can_do_and_say_who_that_is(told: list[dict]):
    strong, weak = (rank["auto"] for rank in told)
    log = strong.pop("log")
    del weak["log"]
    assert strong == weak
    assert (strong["layout"], strong["precision"]) == ("fsdp=1x2,experts=2x1", "fp16")
    assert strong["backends"]["ssd"] == "reference"
    assert not any(strong["compiled"])
    for topic in ("mesh (", "precision: ", "operation ssd: ", "layers are not compiled"):
        (line,) = [line for line in log if line.startswith(topic)]
        assert "rank 1 on node-1" in line


@pytest.mark.parametrize("named", ["bf16", "chunked", "compile"])
def test_what_is_named_and_one_rank_cannot_do_ends_the_start_on_both(told: list[dict], named: str):
    strong, weak = (rank[named]["error"] for rank in told)
    assert strong == weak and "rank 1 on node-1" in strong and "\n" not in strong
    field = {"bf16": "precision.dtype", "chunked": "backends.ssd", "compile": "runtime.compile"}[named]
    assert strong.startswith(f"train.{field}")


GPU, NONE, TOO_FEW = "cuda", "cpu", SpecError("local rank 1 has no GPU of its own")


@pytest.mark.parametrize(
    ("can", "expected"),
    [((GPU, GPU), "cuda"), ((NONE, NONE), "cpu"), ((GPU, NONE), "cpu"), ((NONE, GPU), "cpu"), ((GPU, TOO_FEW), None)],
)
def test_the_device_is_one_that_every_rank_has(can: tuple, expected: str | None, monkeypatch: pytest.MonkeyPatch):
    def picked(_: str, local_rank: int) -> torch.device:
        if isinstance(can[local_rank], SpecError):
            raise can[local_rank]
        return torch.device(can[local_rank], local_rank if can[local_rank] == GPU else None)

    monkeypatch.setattr(distributed, "pick_device", picked)
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(2) as ranks:
        chosen = [ranks.submit(distributed.agreed_device, "auto", rank, 2, rank, store) for rank in range(2)]
    if expected is None:
        for each in chosen:
            with pytest.raises(SpecError, match=r"no GPU of its own .so says rank 1 on"):
                each.result()
    else:
        assert [each.result().type for each in chosen] == [expected] * 2


def test_the_ranks_with_a_gpu_go_to_the_cpu_with_the_others(told: list[dict]):
    assert [rank["device"] for rank in told] == ["cpu", "cpu"]


def test_ranks_that_share_experts_know_of_a_failing_compiler_before_they_wait_for_each_other(told: list[dict]):
    for rank in told:
        found = rank["shared experts"]
        assert found["layout"].endswith("experts=1x2") and not any(found["compiled"])
        (line,) = [line for line in found["log"] if line.startswith("layers are not compiled")]
        assert "the compiler fails (so says rank 1 on node-1)" in line
