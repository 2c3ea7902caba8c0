"""`yaongi budget`: every command of its help and its page, what it finds, and what it refuses."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manifests.spec import load_job, preset_names
from pipelines.cli import app
from trainer.arithmetic.flops import flops_per_token
from trainer.arithmetic.scaling import CORRECTED, effective_tokens
from trainer.errors import SpecError

PAGE = (Path(__file__).parents[2] / "docs" / "budget.md").read_text(encoding="utf-8")
H100 = 989e12


def found(*arguments: str) -> dict:
    result = CliRunner().invoke(app, ["budget", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def of(plan: dict, gpu: str) -> dict:
    return next(each for each in plan["gpus"] if each["name"] == gpu)


def test_hours_follow_from_the_operations_of_the_job():
    plan, job = found("h100-4b", "--gpu", "h100=2.50"), load_job("h100-4b")
    flops = job.train.steps * job.train.batch.tokens_per_step * flops_per_token(job.train.model, job.train.seq_len)
    assert plan["flops"] == pytest.approx(flops)
    hours = flops / (0.4 * H100) / 3600
    gpu = of(plan, "h100")
    assert gpu["gpu_hours"] == pytest.approx(hours) and gpu["days"] == pytest.approx(hours / 24)
    assert gpu["cost"] == pytest.approx(2.5 * hours) and gpu["kwh"] == pytest.approx(0.7 * hours)
    assert gpu["mfu_bound"] > 0.5 and of(plan, "a100")["cost"] is None
    assert plan["memory"] == [{"gpus": 1, "layout": "ddp=1x1,experts=1x1", "gib": pytest.approx(64.2, abs=0.1)}]


def test_any_two_give_the_third_and_the_way_back():
    plan = found("h100-4b", "--tokens", "1T", "--gpus", "8")
    hours = of(plan, "h100")["gpu_hours"]
    back = found("h100-4b", "--gpu-hours", str(hours))
    assert back["tokens"] == pytest.approx(1e12) and back["found"] == "tokens"
    paid = found("h100-4b", "--money", str(2 * hours), "--gpu", "h100=2")
    assert paid["tokens"] == pytest.approx(1e12)
    dense = found("--tokens", "20B", "--gpu-hours", "1000")
    again = found("--parameters", str(dense["parameters"]["active"]), "--tokens", "20B")
    assert of(again, "h100")["gpu_hours"] == pytest.approx(1000)
    best = found("--gpu-hours", "1000")
    assert (best["parameters"]["active"], best["tokens"]) == pytest.approx(CORRECTED.optimum(1000 * 3600 * 0.4 * H100))
    for one in (["--parameters", "1B"], ["--tokens", "20B"]):
        here, optimum = found(*one)["points"][:2]
        assert here["tokens"] == pytest.approx(optimum["tokens"], rel=1e-6)


def test_data_that_runs_short_is_told_and_worth_less():
    plan = found("h100-4b", "--tokens", "1T")
    assert plan["effective_tokens"] < 0.8 * plan["tokens"]
    assert any("data.sources.ko-wikipedia would be read 200.0 times, more than 4" in note for note in plan["notes"])
    plan = found("--parameters", "1B", "--tokens", "100B", "--unique", "10B")
    assert plan["effective_tokens"] == pytest.approx(effective_tokens(10e9, 100e9))
    assert any("The data would be read 10.0 times" in note for note in plan["notes"])
    assert not any("would be read" in note for note in found("h100-4b-1t")["notes"])


def test_the_preset_for_a_trillion_tokens():
    job = load_job("h100-4b-1t")
    assert job.train.steps * job.train.batch.tokens_per_step == pytest.approx(1e12, rel=1e-5)
    assert job.train.model == load_job("h100-4b").train.model
    plan = found("h100-4b-1t")
    assert 10 < of(plan, "h100")["days"] < 20 and of(plan, "h100")["num_gpus"] == 8, "as its first line says"


def test_gpus_that_cannot_share_a_step_are_told():
    notes = found("h100-4b", "--gpus", "7")["notes"]
    assert any("On 7 GPUs the job is refused as it is: " in note and "tokens_per_step" in note for note in notes)


def test_extrapolation_is_told():
    def told(*arguments: str) -> bool:
        return any(
            note.startswith("Extrapolated: the law is fitted on 70M to 16B") for note in found(*arguments)["notes"]
        )

    assert told("h100-4b-1t") and told("--parameters", "1B", "--tokens", "4B") and told("small")
    assert not told("h100-4b") and not told("--parameters", "1B", "--tokens", "100B")


def test_the_bound_is_that_of_the_gpus_that_train_together():
    """With eight, a step has an eighth of the micro-batches to spread the optimizer's traffic over."""
    one, eight = (of(found("h100-4b", "--gpus", count), "h100")["mfu_bound"] for count in ("1", "8"))
    assert eight < one


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_budget(name: str):
    result = CliRunner().invoke(app, ["budget", name], catch_exceptions=False)
    assert result.exit_code == 0 and "expected loss" in result.output


def test_commands_of_the_help_and_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = CliRunner().invoke(app, ["budget", "--help"], env={"COLUMNS": "200"}).output
    commands = re.findall(r"(yaongi budget .*?)(?:  |#|$)", f"{text}\n{PAGE}", re.M)
    assert len(commands) >= 10
    for command in commands:
        if "[OPTIONS]" not in command:
            result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
            assert result.exit_code == 0, command
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "name a job, or give one of --parameters"),
        ("h100-4b --tokens 1T --gpu-hours 5", "any two give the third; leave out"),
        ("--gpu-hours 5 --money 7 --gpu h100=2", "leave out one of them"),
        ("--money 100", "write --gpu h100=2.50"),
        ("--tokens 15B --mfu 40", "write 0.4 for 40%"),
        ("h100-4b --tokens 3", "3 tokens: less than one step of the job"),
        ("h100-4b --gpu-hours 0.0001", "less than one step of the job"),
        ("--tokens 3", "worse than chance; give more"),
        ("--parameters 1 --tokens 15B", "worse than chance; give more"),
        ("--tokens 15B --plot nowhere/loss.png", "write --plot loss.png"),
        ("--tokens 15B --plot loss.xyz", "write --plot loss.png"),
        ("h100-4b --gpus 0", "at least one GPU trains"),
        ("--gpu-hours 0", "not a positive number"),
        ("--tokens 1B --gpu h100=-1", "'-1' is no price"),
        ("--tokens 1B --gpu h900", "known are h100-pcie"),
        ("h100-4b --parameters 3", "h100-4b has its own"),
        ("--tokens 1B --set a=b", "name one"),
    ],
)
def test_impossible_budgets(arguments: str, message: str):
    with pytest.raises(SpecError, match=re.escape(message)) as error:
        CliRunner().invoke(app, ["budget", *shlex.split(arguments)], catch_exceptions=False)
    assert "\n" not in str(error.value)
