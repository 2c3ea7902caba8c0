"""benchmarks/ablations.py: each row is the preset with one thing changed, and its table is made of real runs."""

import importlib.util
import sys
from pathlib import Path

import pytest

from trainer.arithmetic.flops import flops_per_token

FILE = Path(__file__).parents[2] / "benchmarks" / "ablations.py"
BATCH = {"tokens_per_step": 512, "micro_batch_rows": 2}


@pytest.fixture(scope="module")
def ablations():
    described = importlib.util.spec_from_file_location("ablations", FILE)
    module = importlib.util.module_from_spec(described)
    sys.modules["ablations"] = module  # dataclasses look for the module of a class
    described.loader.exec_module(module)
    yield module
    del sys.modules["ablations"]


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_every_row_is_a_valid_spec_and_the_dense_one_costs_as_much(ablations, preset: str):
    from manifests.spec import load_job

    spec = load_job(preset).train_spec()
    flops = {}
    for name, row in ablations.rows(spec).items():
        changed = ablations.changed(spec, row, 0.5, 1, name)
        assert changed.optimizer.muon.learning_rate == spec.optimizer.muon.learning_rate / 2 and changed.seed == 1
        flops[name] = flops_per_token(changed.model, spec.tokens.seq_len)
        assert name == ablations.BASE or changed != ablations.changed(
            spec, ablations.rows(spec)["default"], 0.5, 1, name
        )
    assert flops["dense"] == pytest.approx(flops["default"], rel=0.02)
    assert flops["no-experts"] == pytest.approx(flops["default"], rel=0.03)  # the others have a router


@pytest.mark.slow
def test_the_table_is_of_real_runs(ablations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ablations, "RATES", (1.0,))
    job = ablations.learning().prepare("tiny", tmp_path, steps=3, batch=BATCH)
    spec = job.train_spec()
    outcomes = ablations.measure(spec, ["default", "no-mask"], 1, 1)
    (_, [own]), (_, [other]) = outcomes["default"], outcomes["no-mask"]
    assert own.keys() == {"ko", "en", "code", "math", "all"} and own["all"] != other["all"]
    assert f"{other['all'] - own['all']:+.4f} ± 0.0000" in ablations.as_table(spec, outcomes)
    ablations.plot(outcomes, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
