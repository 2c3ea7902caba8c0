"""Runs that start with the weights of another model, in several layouts of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import micro
import parallel_ranks
import pytest
import torch
from qwen_oracle import MOE, qwen_for
from test_hf_weights import imported
from torch import Tensor

from manifests.spec import load_job
from trainer import export
from trainer.errors import CheckpointError, SpecError
from trainer.kinds.ngrams import token_classes
from trainer.model import hybrid
from trainer.model.hybrid import build_model
from trainer.pretrained import find, refuse_misfit, tokenizer_of
from trainer.spec import TrainSpec
from trainer.trained import load_trained

STILL = {  # a step without effect, so that its checkpoint holds the initial weights
    "steps": 1,
    "optimizer": {"muon": {"learning_rate": 1e-30}, "adamw": {"learning_rate": 1e-30}},
    "schedule": {"final_learning_rate": 0.0},
    "model": {"moe": {"bias_update_rate": 0.0}},
}
DECODER = MOE.updated({"vocab_size": micro.VOCAB, "layers": ["*E", "*E"], "moe": {"bias_update_rate": 0.0}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data; a run `first`, exported; and `theirs`, saved by transformers in several files."""
    folder = tmp_path_factory.mktemp("begin")
    micro.make_data(folder)
    first = micro.micro_spec(folder, folder / "first", steps=2, checkpoint={"every_steps": 2})
    parallel_ranks.run([first], 1, folder)
    export.run(first)
    torch.manual_seed(0)
    qwen_for(DECODER).to(torch.bfloat16).save_pretrained(folder / "theirs", max_shard_size="80KB")
    assert len(list((folder / "theirs").glob("*.safetensors"))) > 2
    return folder


def begun(folder: Path, name: str, init_from: Path, **changes: object) -> TrainSpec:
    spec = micro.micro_spec(folder, folder / name, **changes)
    return spec.updated(STILL | {"init_from": str(init_from)})


def weights(spec: TrainSpec) -> dict[str, Tensor]:
    return load_trained(spec, torch.device("cpu")).model.state_dict()


def test_every_rank_begins_with_its_part_of_the_other_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = {"data": "fsdp", "expert": 2}
    moe = {"model": DECODER.model_dump(mode="json") | {"engram": []}, "batch": {"micro_batch_rows": 1}}
    specs = {
        "run": begun(folder, "a", folder / "first", parallel=cut, model={"mtp": {"depth": 1}}),
        "export": begun(folder, "b", folder / "first" / "export"),
        "transformers": begun(folder, "c", folder / "theirs", parallel=cut, **moe),
    }
    parallel_ranks.run(list(specs.values()), 2, folder)
    first = load_trained(micro.micro_spec(folder, folder / "first"), torch.device("cpu")).model.state_dict()
    wanted = {"run": first, "export": first, "transformers": imported(folder / "theirs").state_dict()}
    for name, spec in specs.items():
        found = weights(spec)
        assert found.keys() >= wanted[name].keys()
        for key, value in wanted[name].items():
            assert torch.equal(found[key], value), (name, key)
    monkeypatch.setattr(hybrid, "INIT_BLOCK_ELEMENTS", 300)  # as in the ranks
    classes = token_classes(folder / "tokenizer" / "tokenizer.json")
    drawn = build_model(specs["run"].model, seed=0, token_classes=classes).state_dict()
    ahead = {key: value for key, value in weights(specs["run"]).items() if key.startswith("mtp.")}
    assert ahead and all(torch.equal(value, drawn[key]) for key, value in ahead.items())


def test_what_came_in_goes_out_again_to_the_last_bit(folder: Path) -> None:
    spec = begun(folder, "d", folder / "theirs", model=DECODER.model_dump(mode="json") | {"engram": []})
    parallel_ranks.run([spec], 1, folder)
    export.run(spec)
    before, after = (_stored(place) for place in (folder / "theirs", folder / "d" / "export" / "transformers"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items())


def _stored(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def test_finds_models_and_their_tokenizers(folder: Path) -> None:
    first = folder / "first"
    (step,) = (first / "checkpoints").glob("step-*")
    assert [find(place).folder for place in (first, step)] == [step, step]
    assert [find(place).kind for place in (first, first / "export", folder / "theirs")] == [
        "checkpoint",
        "export",
        "transformers",
    ]
    assert tokenizer_of(first) == tokenizer_of(folder / "tokenizer") == folder / "tokenizer"
    assert tokenizer_of(first / "export") == first / "export"
    with pytest.raises(SpecError, match=r"theirs has no tokenizer\.json; set tokenizer\.from to another model"):
        tokenizer_of(folder / "theirs")
    for place, said in (
        ("none", "is not a folder on this machine"),
        ("shards", "holds no model; name a run, a checkpoint"),
    ):
        with pytest.raises(SpecError, match=said):
            find(folder / place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 128}, r"train\.model\.hidden is 128, but the model in .*theirs has 64"),
        ({"layers": ["*E"]}, r'train\.model\.layers is "\*E", but the model in .* has "\*E\*E"'),
        (
            {"layers": ["*", "E*E"]},
            "train.model does not fit .*, which holds a model of type qwen3_moe: layers are not all",
        ),
        (
            {"attention": {"rope_theta": 10000}},
            r"attention\.rope_theta is 10000\.0, but the model in .* has 1000000\.0",
        ),
        ({"moe": {"renormalise": False}}, r"moe\.renormalise is false, .* has none"),
        ({"tied_embedding": True}, r"tied_embedding is true, .* has none"),
    ],
)
def test_another_model_is_refused_by_the_field_that_differs(folder: Path, change: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        refuse_misfit(find(folder / "theirs"), DECODER.updated(change))
    assert "\n" not in str(error.value)


def test_the_preset_of_qwens_is_the_model_that_qwen_published(tmp_path: Path) -> None:
    """Their config.json, from huggingface.co/Qwen/Qwen3-30B-A3B."""
    config = {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151936}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "rope_theta": 1000000.0}
    config |= {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    config |= {"rms_norm_eps": 1e-06, "tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu"}
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False, "rope_scaling": None}
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"router_aux_loss_coef": 0.001, "intermediate_size": 6144})
    )
    refuse_misfit(find(tmp_path), load_job("qwen3-30b-a3b").train.model)


def test_what_only_training_needs_may_differ(folder: Path) -> None:
    free = {"init_std": 0.5, "mtp": {"depth": 1}, "moe": {"bias_update_rate": 0.01, "balance_loss_weight": 0.5}}
    refuse_misfit(find(folder / "theirs"), DECODER.updated(free))


def test_a_config_that_lacks_something_or_is_none_is_one_line(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "theirs" / "config.json").read_text())
    for change, message in (
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"model_type": "gemma9"}, r"model_type 'gemma9' is not known"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ):
        changed = {key: value for key, value in (config | change).items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(SpecError, match=message) as error:
            find(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        find(tmp_path)
