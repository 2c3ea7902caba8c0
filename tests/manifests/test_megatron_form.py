"""Jobs in Megatron's own words: what they become, and what is said of words that nobody knows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from manifests.megatronform import Form, read_form
from manifests.spec import JobSpec, load_job
from trainer.errors import SpecError
from trainer.megatron.arguments import arguments, options, parsed
from trainer.megatron.check import check

EXAMPLE = Path(__file__).parents[2] / "manifests" / "examples" / "megatron_qwen3_30b_2n16g.json"
GIVEN: dict[str, Any] = json.loads(EXAMPLE.read_text("utf-8"))


def job(tmp_path: Path, changes: dict[str, dict[str, Any]] | None = None) -> JobSpec:
    value = copy.deepcopy(GIVEN)
    for section, fields in (changes or {}).items():
        value.setdefault(section, {}).update(fields)
    file = tmp_path / "job.json"
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return load_job(str(file))


def passed(made: JobSpec, dtype: Any = "fp8") -> dict[str, list[str]]:
    spec = made.train_spec()
    return parsed(arguments(spec, check(spec, made.cluster.world_size), dtype))


def test_every_argument_of_the_example_reaches_megatron_as_it_is_written(tmp_path: Path):
    found, compared = passed(job(tmp_path)), 0
    ours = {"data_path", "tokenizer_type", "tokenizer_model", "vocab_size", "log_interval"}
    for section in ("data", "model", "parallelism", "runtime"):
        for name, value in GIVEN[section].items():
            written = value["value"] if isinstance(value, dict) else value
            option = f"--{name.replace('_', '-')}"
            if option not in options() or name in ours:
                continue
            compared += 1
            if isinstance(written, bool):
                assert (option in found) == written, name
            else:
                (text,) = found[option]
                assert text == str(written) or float(text) == float(written), name
    assert compared > 35


def test_the_example_is_the_preset_with_other_sources(tmp_path: Path):
    made, preset = job(tmp_path), load_job("qwen3-30b-a3b-megatron")
    places = {"--per-split-data-args-path", "--data-cache-path", "--save", "--load", "--tensorboard-dir"}
    places |= {"--eval-interval", "--eval-iters"}
    theirs = passed(preset)
    assert {name: text for name, text in passed(made).items() if name not in places} == {
        name: text for name, text in theirs.items() if name not in places
    }
    assert {name: source.weight for name, source in made.data.sources.items()} == pytest.approx(
        {"ko-web": 0.4, "en-fineweb-edu": 0.3, "code-stack-edu": 0.2, "math-finemath": 0.1}
    )
    assert made.tokenizer_from == "Qwen/Qwen3-30B-A3B" and (made.cluster.nodes, made.cluster.gpus_per_node) == (2, 8)
    assert made.train.evaluate.every_steps == 1000


def test_names_may_have_dashes_and_common_short_forms(tmp_path: Path):
    value = {
        "parallelism": {"tp": 2, "--pipeline-model-parallel-size": 2, "ep": 8, "nnodes": 2, "nproc-per-node": 8},
        "runtime": {"learning_rate": 1e-4, "train-iters": 500, "_comment": "짧은 시험", "warmup_iters": 10},
    }
    file = tmp_path / "job.json"
    file.write_text(json.dumps(value), encoding="utf-8")
    made = load_job(str(file))
    assert made.train.megatron is not None
    assert (made.train.megatron.tensor_parallel, made.train.megatron.pipeline_parallel) == (2, 2)
    assert (made.train.steps, made.train.optimizer.adamw.learning_rate) == (500, 1e-4)
    assert passed(made)["--lr-warmup-iters"] == ["10"]


@pytest.mark.parametrize(
    ("section", "fields", "said"),
    [
        ("parallelism", {"tensor_model_parallel_size": 8}, "heads and 4 key/value heads .*; write 4"),
        ("parallelism", {"tensor_model_paralel_size": 4}, "did you mean 'parallelism.tensor_model_parallel_size'"),
        ("parallelism", {"lr": 1e-4}, "parallelism.lr: unknown field; did you mean 'runtime.lr'"),
        ("parallelism", {"data_parallel_size": 4}, "data_parallel_size 4: it is 2"),
        ("parallelism", {"overlap_param_gather": False}, "--overlap-param-gather is passed as a flag; remove it"),
        ("runtime", {"warm_up": 3, "colour": "red"}, "runtime.colour: unknown field; it is neither"),
        ("runtime", {"moe_router_dtype": "fp64"}, "'fp64', but --moe-router-dtype is passed as fp32; remove it"),
        ("runtime", {"split": "969,30,1"}, "--split is not passed; remove it"),
        ("runtime", {"train_iters": "many"}, "runtime.train_iters: a whole number is wanted"),
        ("runtime", {"lr_decay_style": "inverse-square-root"}, "write one of WSD, cosine"),
        ("runtime", {"lr_decay_iters": 10}, "the rate falls until train_iters 14305"),
        ("runtime", {"fp8_recipe": "mxfp8"}, "write tensorwise or delayed"),
        ("data", {"data_path": "/data/my_corpus_text_document"}, "is no source of the job"),
        ("data", {"data_path": "0.3 ko-web 0.7"}, "weights above 0 and names of sources by turns"),
        ("data", {"tokenizer_type": "SentencePieceTokenizer"}, "the shards hold ids already"),
        ("data", {"vocab_size": 150000}, "vocab_size"),
        ("model", {"swiglu": False}, "model.swiglu: False, but --swiglu is passed as a flag"),
        ("model", {"num_layers": 10**30}, "model.num_layers: must be less than or equal to 2000"),
        ("model", {"num_attention_heads": 10**30}, "model.num_attention_heads: must be less than or equal to 65536"),
        ("model", {"seq_length": 8192}, "model.seq_length: 8192, but data.seq_length is 4096; remove one"),
        ("model", {"rotary_base": 10000.5}, "wants a whole number"),
        ("parallelism", {"tp": 2}, "parallelism.tp: 2, but parallelism.tensor_model_parallel_size is 4; remove one"),
        ("runtime", {"nodes": 4}, "runtime.nodes: 4, but parallelism.nodes is 2; remove one"),
        ("runtime", {"bf16": False}, "write true"),
        ("runtime", {"fp8_format": None}, "fp8_recipe tensorwise: write fp8_format"),
        ("runtime", {"eval_interval": None}, "eval_iters 1: give eval_interval too, or write 0"),
        ("runtime", {"lr_warmup_fraction": 0.1}, "lr_warmup_iters is given too"),
        ("data", {"data_path": "0.5 ko-web 0.5 ko-web"}, "named twice"),
        ("data", {"data_path": "nan ko-web"}, "weights above 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_the_fix(section: str, fields: dict, said: str, tmp_path: Path):
    with pytest.raises(SpecError, match=said):
        job(tmp_path, {section: fields})


def test_no_clipping_and_no_validation_are_not_taken_for_fields_left_open(tmp_path: Path):
    made = job(tmp_path, {"runtime": {"clip_grad": 0, "eval_iters": 0}})
    assert (made.train.optimizer.clip_norm, made.train.evaluate.every_steps) == (None, None)
    assert passed(made)["--clip-grad"] == ["0.0"]


def test_a_form_needs_no_section_parallelism_but_a_job_with_a_misplaced_section_is_none(tmp_path: Path):
    file = tmp_path / "job.json"
    file.write_text('{"runtime": {"train_iters": 500}}', encoding="utf-8")
    assert load_job(str(file)).train.steps == 500
    file.write_text('{"preset": "tiny", "model": {"layers": ["*-"]}}', encoding="utf-8")
    with pytest.raises(SpecError, match=r"model: unknown field; did you mean 'train\.model'"):
        load_job(str(file))


def test_a_key_that_is_no_text_is_an_unknown_field(tmp_path: Path):
    file = tmp_path / "job.yaml"
    file.write_text("parallelism: {1: 2}\n", encoding="utf-8")
    with pytest.raises(SpecError, match=r"parallelism\.1: unknown field"):
        load_job(str(file))


def test_a_file_nested_thousands_of_levels_deep_is_refused(tmp_path: Path):
    file = tmp_path / "job.json"
    file.write_text('{"model": ' * 2000 + "1" + "}" * 2000, encoding="utf-8")
    with pytest.raises(SpecError, match="levels deep"):
        load_job(str(file))


def test_descriptions_may_stand_anywhere():
    form, others = read_form(
        {
            "description": "a job",
            "runtime": {"lr": {"value": 1e-4, "description": "학습률"}, "lr_설명": "위와 같음", "//": "x", "_": 1},
            "parallelism": {"비고": ["a", "b"], "nodes": {"설명": "노드 수", "value": 2}},
        }
    )
    assert (form.runtime.lr, form.parallelism.nodes, others) == (1e-4, 2, {})
    assert form.model == Form().model
