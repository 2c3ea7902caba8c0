"""The command that measures all of a new GPU: parts that go on after one another, or in another call."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "first_hour.py"
PRINTS = [sys.executable, "-c", "print('measured')"]
FAILS = [sys.executable, "-c", "import sys; sys.exit(3)"]
SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("first_hour", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "first_hour", module)
    spec.loader.exec_module(module)
    return module


def test_parts_run_once_and_a_later_call_goes_on(benchmark, monkeypatch, tmp_path: Path, capsys):
    made = [benchmark.Part("step", name, command) for name, command in (("one", PRINTS), ("two", FAILS))]
    monkeypatch.setattr(benchmark, "parts", lambda presets, out: iter(made))
    monkeypatch.setattr(sys, "argv", ["first_hour", "--out", str(tmp_path)])
    (tmp_path / "step-h100-4b-bf16.json").write_text(
        json.dumps({"preset": "h100-4b", "results": [{"tokens_per_second": 61234.5}, {"tokens_per_second": None}]})
    )
    assert benchmark.main() == 1
    assert (tmp_path / "one.txt").read_text() == "measured\n"
    about = json.loads((tmp_path / "one.run.json").read_text())
    assert about["command"] == "python -c print('measured')" and about["status"] == 0 and about["versions"]["torch"]
    assert json.loads((tmp_path / "two.run.json").read_text())["status"] == 3
    said = capsys.readouterr().out
    assert "two: exit status 3" in said
    assert "step-h100-4b-bf16: 61,234 tokens/s, 60,000 wanted and 45,000 the least" in said

    made.append(benchmark.Part("step", "three", SLEEPS))
    monkeypatch.setattr(sys, "argv", ["first_hour", "--out", str(tmp_path), "--seconds", "0.5"])
    assert benchmark.main() == 0
    said = capsys.readouterr().out
    assert "one: has a result" in said and "three: its time is over; call again" in said
    assert not (tmp_path / "three.run.json").exists()


def test_the_parts_call_what_exists_in_the_order_of_the_help(benchmark, tmp_path: Path):
    found = list(benchmark.parts(["h100-4b-interleaved", "h100-4b"], tmp_path))
    groups = list(dict.fromkeys(part.group for part in found))
    assert groups == ["proof", "step", "experts", "optimizer", "curves"]
    assert all(f"\n    {group} " in benchmark.__doc__ for group in groups)
    files = [word for part in found for word in part.command if word.endswith(".py")]
    assert len(files) == len(found) - 1 and all(Path(file).exists() for file in files)
    assert len({part.name for part in found}) == len(found)
