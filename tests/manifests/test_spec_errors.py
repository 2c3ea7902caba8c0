"""Errors of a job say what is wrong, where, and how to fix it, in one line for each problem."""

from collections.abc import Callable
from pathlib import Path

import pytest

from manifests.spec import TokenizerSpec, load_job, preset_names
from trainer.data.tokenizer import train
from trainer.specbase import SpecError, changes_from_sets


@pytest.mark.parametrize(
    ("changes", "where", "fix"),
    [
        ({"train": {"stps": 3}}, "train.stps", "did you mean 'train.steps'?"),
        (
            {"train": {"model": {"mamba": {"num_head": 3}}}},
            "train.model.mamba.num_head",
            "did you mean 'train.model.mamba.num_heads'?",
        ),
        ({"train": {"steps": 0}}, "train.steps", "greater than 0"),
        ({"train": {"model": {"layers": ["MX"]}}}, "train.model", "sublayers are M (mamba)"),
        ({"train": {"model": {"engram": []}}}, "train.model", "exactly one engram entry"),
        ({"train": {"model": {"mtp": {"layer": "N"}}}}, "train.model", "drop N"),
        (
            {"train": {"model": {"mup": {"base_hidden": 64, "base_head": 8}}}},
            "train.model.mup.base_head",
            "did you mean",
        ),
        ({"train": {"model": {"vocab_size": 2**32}}}, "train.model.vocab_size", "less than or equal to 2147483648"),
        ({"train": {"schedule": {"warmup_shape": "sqrt"}}}, "train.schedule.warmup_shape", "'linear' or 'cosine'"),
        ({"train": {"optimizer": {"spike_guard": {"window": 4}}}}, "train.optimizer.spike_guard.window", "equal to 8"),
        ({"train": {"optimizer": {"spike_guard": {"sigmas": 3}}}}, "train.optimizer.spike_guard", "skips 13 steps"),
        ({"train": {"optimizer": {"muon": {"momentum": 1}}}}, "train.optimizer.muon.momentum", "less than 1"),
        ({"train": {"optimizer": {"adamw": {"beta2": 1}}}}, "train.optimizer.adamw.beta2", "less than 1"),
        ({"train": {"schedule": {"final_learning_rate": 0.02}}}, "JobSpec", "train.optimizer.muon.learning_rate 0.01"),
        (
            {"train": {"optimizer": {"name": "adamw"}, "schedule": {"final_learning_rate": 0.006}}},
            "JobSpec",
            "train.optimizer.adamw.learning_rate 0.005; lower the one or raise the other",
        ),
        ({"train": {"model": {"norm_eps": -1}}}, "train.model.norm_eps", "greater than 0"),
        ({"train": {"model": {"attention": {"rope_theta": 0}}}}, "train.model.attention.rope_theta", "greater than 0"),
        (
            {"train": {"model": {"attention": {"rope_theta": 1e4, "head_dim": 33}}}},
            "train.model.attention",
            "must be even",
        ),
        ({"train": {"model": {"moe": {"top_k": 9}}}}, "train.model.moe", "lower top_k"),
        ({"train": {"model": {"moe": {"top_k": 1}}}}, "train.model.moe", "raise it"),
        ({"train": {"model": {"attention": {"num_kv_heads": 3}}}}, "train.model.attention", "multiple of num_kv_heads"),
        ({"train": {"batch": {"tokens_per_step": 1000}}}, "JobSpec", "multiple of"),
        ({"train": {"schedule": {"decay_fraction": 0.995}}}, "train.schedule", "lower one of them"),
        ({"tokenizer": {"vocab_size": 256}}, "tokenizer.vocab_size", "greater than or equal to 384"),
        ({"tokenizer": {"vocab_size": 5120}}, "JobSpec", "make them equal"),
        ({"tokenizer": {"vocab_size": 5000}}, "tokenizer", "make it and train.model.vocab_size 5120"),
        ({"data": {"sources": {"ko": {"weight": 0.9}}}}, "data", "they must sum to 1"),
        ({"cluster": {"nodes": 3}}, "JobSpec", "make train.batch.tokens_per_step a multiple of 6144"),
        ({"name": "Not A Name"}, "name", "small letters a-z, digits and hyphens"),
    ],
)
def test_a_wrong_field_is_one_line_with_place_and_remedy(changes: dict, where: str, fix: str) -> None:
    with pytest.raises(SpecError) as error:
        load_job("tiny", changes)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"tiny: {where}: ")
    assert fix in line


def test_the_smallest_vocabulary_of_a_job_is_the_smallest_that_can_be_trained() -> None:
    def fits(make: Callable[[int], object], vocab_size: int) -> bool:
        try:
            make(vocab_size)
        except ValueError:
            return False
        return True

    sizes = range(128, 1024, 128)
    of_jobs = [fits(lambda size: TokenizerSpec(vocab_size=size), size) for size in sizes]
    assert of_jobs == [fits(lambda size: train([], size), size) for size in sizes]
    assert True in of_jobs and False in of_jobs


def test_every_preset_is_valid_and_has_a_run_name_of_its_own() -> None:
    jobs = [load_job(name) for name in preset_names()]
    assert {"tiny", "small", "h100-4b", "h100-4b-interleaved"} <= {job.name for job in jobs}
    assert len({job.run_name for job in jobs}) == len(jobs)


def test_where_and_how_it_runs_does_not_change_the_run() -> None:
    job = load_job("tiny")
    moved = {
        "storage": {"checkpoints_dir": "/elsewhere"},
        "cluster": {"nodes": 1},
        "train": {"runtime": {"device": "cpu"}},
    }
    assert load_job("tiny", moved).run_name == job.run_name
    assert load_job("tiny", {"train": {"seed": 1}}).run_name != job.run_name


@pytest.mark.parametrize(
    ("train", "fix"),
    [
        ({"curriculum": [{"from_tokens": 5}]}, "changes nothing; give it weights or seq_len"),
        ({"curriculum": [{"from_tokens": 5, "weights": {"jp": 1}}]}, "names 'jp', not a source"),
        (
            {"curriculum": [{"from_tokens": 5, "weights": {"ko": 0.5}}]},
            "sum to 0.5; they must sum to 1: ko 0.5",
        ),
        ({"curriculum": [{"from_tokens": 5, "seq_len": 999}]}, "must divide the tokens of a micro-batch"),
        ({"curriculum": [{"from_tokens": 5, "seq_len": 64}, {"from_tokens": 5, "seq_len": 128}]}, "must rise"),
        ({"skip": [[5, 9], [7, 12]]}, "must be ranges [first, last) that rise"),
    ],
)
def test_a_wrong_curriculum_is_refused_with_the_remedy(train: dict, fix: str) -> None:
    with pytest.raises(SpecError) as error:
        load_job("tiny", {"train": train})
    assert fix in str(error.value) and "\n" not in str(error.value)


def test_shares_are_those_of_the_curriculum() -> None:
    total = 120 * 4096
    later = [{"from_tokens": total // 4, "weights": {"ko": 1.0}}]
    synthetic = {"sources": {"en": {"synthetic": 1.0}}, "max_synthetic_share": 0.1}
    tiny = load_job("tiny")
    assert tiny.train.steps * tiny.train.batch.tokens_per_step == total
    share = tiny.data.sources["en"].weight
    with pytest.raises(SpecError, match=f"a model wrote {share:g} of the training tokens"):
        load_job("tiny", {"data": synthetic})
    assert load_job("tiny", {"data": synthetic, "train": {"curriculum": later}})
    few = {"sources": {"ko": {"available_tokens": total / 20, "max_epochs": 10}}}
    assert load_job("tiny", {"data": few})
    with pytest.raises(SpecError, match=r"ko: its share is .* epochs give only"):
        load_job("tiny", {"data": few, "train": {"curriculum": later}})


def test_skipping_tokens_does_not_change_the_run() -> None:
    skipping = load_job("tiny", {"train": {"skip": [[4096, 8192]]}})
    assert skipping.run_name == load_job("tiny").run_name
    assert skipping.train_spec().tokens.skip == ((4096, 8192),)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("steps=5", "steps: unknown field; did you mean 'train.steps'?"),
        ("train.seed=yes", "train.seed: a number is wanted, not a truth value"),
        ("train.steps=on", "train.steps: a number is wanted"),
        ("data.sources.ko.weight=no", "data.sources.ko.weight: a number is wanted"),
        ("train.skip=[[yes, no]]", "train.skip: a number is wanted"),
        ("train.steps=abc", "train.steps: a whole number is wanted (got 'abc')"),
        ("train.steps=0", "train.steps: must be greater than 0 (got 0)"),
        ("data.sources.ko.weight=much", "data.sources.ko.weight: a number is wanted (got 'much')"),
        ("hygiene.exact_duplicates=perhaps", "hygiene.exact_duplicates: true or false is wanted (got 'perhaps')"),
        ("name=5", "name: a text is wanted (got 5)"),
        ("train.model.layers=M", "train.model.layers: a list is wanted (got 'M')"),
        ("data=5", "data: a mapping of fields is wanted (got 5)"),
        (
            "data.sources.ko.origin={kind: files, pathz: [a]}",
            "data.sources.ko.origin.pathz: unknown field; did you mean 'data.sources.ko.origin.paths'?",
        ),
        ("train.steps=", "train.steps: has no value"),
        ("train.steps=[8]", "train.steps: a whole number is wanted (got "),
        ("train.steps=1.5e0", "train.steps: a whole number is wanted (got "),
        ("name=Foo_Bar", "name: 'Foo_Bar' cannot be a name here; write at most 40 small letters a-z, digits"),
    ],
)
def test_what_people_write_for_a_number_or_a_name_is_answered_with_its_field(change: str, said: str):
    with pytest.raises(SpecError) as caught:
        load_job("tiny", changes_from_sets([change]))
    assert str(caught.value).startswith(f"tiny: {said}")


def test_a_number_may_be_written_with_an_exponent_and_a_truth_value_in_any_word():
    job = load_job("tiny", changes_from_sets(["train.steps=1e3", "train.optimizer.adamw.learning_rate=1e-3"]))
    assert (job.train.steps, job.train.optimizer.adamw.learning_rate) == (1000, 1e-3)
    assert load_job("tiny", changes_from_sets(["hygiene.exact_duplicates=on"])).hygiene.exact_duplicates is True


def test_a_job_file_without_a_preset_is_told_of_them(tmp_path: Path):
    (tmp_path / "job.yaml").write_text("name: mine\ntrain: {steps: 3}\n")
    with pytest.raises(SpecError, match=r"^[^\n]*job\.yaml: names no preset; begin it with one \(.*tiny\)"):
        load_job(str(tmp_path / "job.yaml"))
