"""Three real ranks on two nodes: each node proves once, and what is wrong on one of them is taken by none."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest

WRONG = "outputs differ by 1.0e-02 of the reference's, 1e-04 is allowed"


@pytest.fixture(scope="module")
def told(micro_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    directory = tmp_path_factory.mktemp("proof")
    own = [
        {
            "NODE_NAME": f"node-{node}",
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(2 - node),
            "XDG_CACHE_HOME": str(directory / f"node-{node}"),
            "TRITON_INTERPRET": "1",
        }
        for node, local_rank in ((0, 0), (0, 1), (1, 0))
    ]
    forked.done(forked.run("proof_ranks", 3, [directory / "told", micro_data, directory], directory, own))
    return [json.loads((directory / f"told.{rank}.out").read_text()) for rank in range(3)]


def test_a_kernel_that_fails_on_one_node_is_taken_on_none_and_named_with_its_numbers(told: list[dict]):
    first = [rank["first"] for rank in told]
    assert [rank["name"] for rank in first] == ["sdpa"] * 3 and all(rank["proven"] for rank in first)
    (reason,) = {rank["reason"] for rank in first}
    where = "in fp32 on interpreter with torch 2.13.0"
    assert f"not errs_on_node_1: wrong {where}: {WRONG} (so says rank 2 on node-1)" in reason
    for rank, says in enumerate((True, False, True)):  # the first rank of all, and the one that has found it
        lines = [line for line in first[rank]["log"] if WRONG in line and line.startswith("proof on node node-1: ")]
        assert len(lines) == says
    mine, others = ([line for line in first[rank]["log"] if line.startswith("proof: attention ")] for rank in (0, 2))
    assert "within" in mine[0] and WRONG in others[0]


def test_the_first_rank_of_each_node_proves(told: list[dict]):
    assert [rank["first"]["children"] for rank in told] == [1, 0, 1]
    assert all(rank["first"]["made"] == {"node-0": 2, "node-1": 2} for rank in told)


def test_a_restarted_run_proves_nothing_again_and_what_failed_on_one_node_has_failed(told: list[dict]):
    assert all(rank["restarted"]["children"] == 0 and rank["restarted"]["name"] == "sdpa" for rank in told)
    assert any(WRONG in line for line in told[0]["restarted"]["log"]), "beside the run, node-0 sees it too"


def test_the_time_of_the_slowest_rank_counts(told: list[dict]):
    assert told[0]["trial"] == told[1]["trial"] == told[2]["trial"]
    assert told[0]["trial"]["taken"] == "steady"
    seconds = {row["change"]: row["seconds"] for row in told[0]["trial"]["rows"]}
    # Three kinds of layers, one with attention; alone, node-0 would take 7 and change.
    assert seconds == {"as proven": 9.0, "attention: uneven": 15.0}
