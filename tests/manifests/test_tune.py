"""The section `tune`: the job that results from it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from manifests.spec import JobSpec, job_from
from trainer.specbase import SpecError, to_yaml

FILES = {"kind": "files", "paths": ["chats/*.jsonl"]}
CHAT = {"licence": "CC0-1.0", "origin": FILES}


def job(tune: dict[str, Any] | None, **changes: Any) -> JobSpec:
    return job_from({"preset": "tiny", **({"tune": tune} if tune else {})}, changes)


def test_what_megatron_trained_is_tuned_by_our_own_engine() -> None:
    chat = {"licence": "Apache-2.0", "origin": {"kind": "files", "paths": ["sample://chat.jsonl.gz"]}}
    tuned = job_from({"preset": "qwen3-30b-a3b-megatron", "tune": {"steps": 9, "sources": {"chat": chat}}}).tuning()
    assert (tuned.train.engine, tuned.train.megatron) == ("yaongi", None)
    assert tuned.data.sources["chat"].loss == "answers"


def test_the_job_that_tunes_begins_with_the_jobs_own_run_and_its_tokenizer() -> None:
    plain, whole = job(None), job({"steps": 30, "sources": {"a": CHAT, "b": CHAT | {"weight": 3.0}}})
    assert (plain.run_name, plain.keys) == (whole.run_name, whole.keys), "the section changes nothing of the run itself"
    tuned = whole.tuning()
    assert tuned.tune is None and tuned.name == "tiny-tune"
    end = whole.train.steps
    assert tuned.train.init_from == tuned.tokenizer_from == f"{whole.run_name}@{end}"
    assert tuned.train_spec().init_from == f"{whole.run_dir}/checkpoints/step-{end:08}"
    assert tuned.train_spec().begun_with == f"{whole.run_name}, step-{end:08}"
    assert {name: source.weight for name, source in tuned.data.sources.items()} == {"a": 0.25, "b": 0.75}
    assert {(source.loss, source.template) for source in tuned.data.sources.values()} == {
        ("answers", "{messages:chat}")
    }
    train, adamw = tuned.train, tuned.train.optimizer.adamw
    assert (train.steps, train.seq_len, train.batch, train.model) == (30, 256, whole.train.batch, whole.train.model)
    assert (train.optimizer.name, adamw.learning_rate, adamw.weight_decay) == ("adamw", 1e-5, 0.0)
    assert (train.schedule.name, train.schedule.final_learning_rate, train.packing) == ("cosine", 0.0, "best_fit")
    assert train.evaluate.chat and train.evaluate.prompts == whole.train.evaluate.prompts
    assert (tuned.storage, tuned.cluster) == (whole.storage, whole.cluster)


def test_what_the_section_says_counts() -> None:
    section = {
        "init_from": "owner/model@v1",
        "sources": {"a": CHAT | {"loss": "all", "template": "{turns:chat}", "max_epochs": 9}},
        "steps": 7,
        "seed": 3,
        "seq_len": 128,
        "packing": "concat",
        "batch": {"tokens_per_step": 1024, "micro_batch_rows": 2},
        "optimizer": {"name": "muon", "muon": {"learning_rate": 0.5}},
        "schedule": {"name": "constant"},
        "checkpoint": {"every_steps": 7},
        "prompts": ["Who?"],
    }
    tuned = job(section).tuning()
    train, source = tuned.train, tuned.data.sources["a"]
    assert train.init_from == tuned.tokenizer_from == "owner/model@v1"
    assert (source.loss, source.template, source.max_epochs) == ("all", "{turns:chat}", 9)
    assert (train.steps, train.seed, train.seq_len, train.packing) == (7, 3, 128, "concat")
    assert (train.batch.tokens_per_step, train.optimizer.muon.learning_rate) == (1024, 0.5)
    assert (train.schedule.name, train.checkpoint.every_steps) == ("constant", 7)
    assert train.evaluate.prompts == ["Who?"]
    again = job_from(yaml.safe_load(to_yaml(job(section))))
    assert again.tuning() == tuned, "a stored job tunes in the same way"


def test_adapters_are_trained_at_a_rate_of_their_own_and_without_what_they_cannot_have() -> None:
    lora = {"rank": 4, "targets": {"attention": ["q_proj"]}}
    ahead = {"train": {"model": {"mtp": {"depth": 1}}}}
    tuned = job({"steps": 3, "sources": {"a": CHAT}, "lora": lora}, **ahead).tuning()
    assert tuned.train.model.lora.rank == 4 and tuned.train.model.mtp is None
    assert tuned.train.optimizer.adamw.learning_rate == 2e-4


def test_the_base_runs_order_of_data_is_not_the_tuned_ones() -> None:
    ordered = {"train": {"curriculum": [{"from_tokens": 4096, "seq_len": 128}], "skip": [[0, 4096]]}}
    tuned = job({"steps": 3, "sources": {"a": CHAT}}, **ordered).tuning()
    assert (tuned.train.curriculum, tuned.train.skip) == ((), ())


def test_a_run_that_was_lengthened_is_tuned_again() -> None:
    first = job({"steps": 3, "sources": {"a": CHAT}})
    longer = first.updated({"train": {"steps": first.train.steps + 20, "begun_with_steps": first.train.steps}})
    assert longer.run_name == first.run_name and longer.tuning().run_name != first.tuning().run_name


def test_other_steps_make_another_tuned_run_of_the_same_base() -> None:
    first, second = (job({"steps": steps, "sources": {"a": CHAT}}) for steps in (3, 4))
    assert first.run_name == second.run_name and first.tuning().run_name != second.tuning().run_name
    longer = job({"steps": 3, "sources": {"a": CHAT}}, train={"seed": 1})
    assert longer.tuning().run_name != first.tuning().run_name, "of another base run"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sources": {"a": CHAT}}, r"^tune\.steps: required field is missing; add it$"),
        ({"steps": 3, "sources": {}}, r"^tune\.sources: .*at least 1"),
        ({"steps": 3, "sources": {"a": {"origin": FILES}}}, r"^tune\.sources\.a\.licence: required field is missing"),
        (
            {"steps": 3, "sources": {"a": CHAT | {"template": "{text}"}}},
            r"^tune\.sources\.a: loss: answers needs chats, but the source has plain text",
        ),
        (
            {"steps": 3, "sources": {"a": CHAT}, "seq_len": 100},
            r"tune: train\.batch\.tokens_per_step 4096 must be a mult",
        ),
        (
            {"steps": 3, "sources": {"a": CHAT}, "lora": {"targets": {"attention": ["w_proj"]}}},
            r"^(JobSpec: )?tune: train\.model: .*w_proj.*q_proj",
        ),
        (
            {"steps": 3, "sources": {"a": CHAT}, "lora": {"rank": 999}},
            r"lora\.rank 999 is above the smaller side of every matrix with adapters, \d+ at most; lower it",
        ),
        ({"steps": 3, "sources": {"a": CHAT}, "lr": 1}, r"^tune\.lr: unknown field"),
    ],
)
def test_what_gives_no_job_is_one_line(section: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        job(section)
    assert "\n" not in str(error.value)


def test_a_job_without_the_section_says_how_to_write_it() -> None:
    with pytest.raises(SpecError, match=r"has no section tune; add one, as in tune: \{steps: 100, sources:") as error:
        job(None).tuning()
    example = yaml.safe_load(str(error.value).partition("as in ")[2])
    assert job(example["tune"]).tuning().train.steps == 100
