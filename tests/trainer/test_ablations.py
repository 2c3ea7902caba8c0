"""benchmarks/ablations.py: each row is the preset with one thing changed, and its table is made of real runs."""

import importlib.util
import sys
from pathlib import Path

import pytest
from data_cases import random_documents, write_shards

from trainer.arithmetic.flops import flops_per_token
from trainer.data.documents import open_shards, open_stream
from trainer.spec import OrderSpec, TokensSpec
from trainer.specbase import parse

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


def test_orders_are_compared_over_whole_epochs_of_every_source(ablations, tmp_path: Path):
    """Else a run that takes the short documents first would have fewer tokens to choose from, not another order."""
    from manifests.spec import load_job

    documents = {name: {"train": random_documents(n, 50 * (n + 1))} for n, name in enumerate(("ko", "en"))}
    write_shards(tmp_path, documents)
    spec = load_job("tiny", {"train": {"batch": BATCH}, "cluster": {"nodes": 1}}).train_spec()
    tokens = {"shards": str(tmp_path / "shards"), "tokenizer": str(tmp_path / "tokenizer")}
    mix = {name: {"weight": 0.5} for name in documents}
    spec = spec.model_copy(update={"tokens": TokensSpec(**tokens, mix=mix, seq_len=spec.tokens.seq_len)})
    whole = ablations.of_whole_epochs(spec, 2)
    length = parse(OrderSpec, {"by": "length"})
    ordered = ablations.changed(whole, ablations.rows(whole)["order-length"], 1.0, 0, "order-length").tokens
    assert [source.order for source in ordered.mix.values()] == [length, length]
    _, stream = open_stream(ordered, *open_shards(ordered))
    stream.take(whole.steps * BATCH["tokens_per_step"])
    assert all(1.8 < epochs <= 2.05 for epochs in stream.epochs(stream.cursor()).values())
