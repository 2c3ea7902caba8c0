"""The benchmark of a training step runs on a CPU as on a GPU."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from manifests.spec import load_job
from trainer.arithmetic.gpus import by_option
from trainer.arithmetic.roofline import roofline

FILE = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_step", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_step", module)
    spec.loader.exec_module(module)
    return module


def test_figures_and_problems_are_written_for_each_combination(benchmark, monkeypatch, tmp_path, capsys):
    out = tmp_path / "results" / "step.json"
    arguments = "--preset tiny --tokens 64 --precision fp32,fp8:delayed,fp8:half --recompute selective --repeats 1"
    monkeypatch.setattr(sys, "argv", ["train_step", *arguments.split(), "--out", str(out)])
    monkeypatch.setattr(benchmark, "pick_device", lambda _wanted: benchmark.torch.device("cpu"))
    benchmark.main()
    fp32, fp8, unknown = json.loads(out.read_text())["results"]
    for result in (fp32, fp8):
        assert result["problem"] is None and len(result["kernels"]) == benchmark.TOP_KERNELS
        # 4096 tokens a step are 64 micro-batches and one update
        seconds = 64 * result["micro_batch_seconds"] + result["optimizer_seconds"]
        assert result["tokens_per_second"] == pytest.approx(4096 / seconds)
    assert "half" in unknown["problem"] and unknown["tokens_per_second"] is None
    assert fp32["mfu"] is None and "does not run" in capsys.readouterr().out
    assert all(bound is None for _, _, bound, _ in (*fp32["kinds"], *fp8["kinds"])), "no peaks of a CPU are known"


def test_each_kind_of_layer_stands_beside_what_the_peaks_allow(benchmark, monkeypatch, tmp_path, capsys):
    out = tmp_path / "step.json"
    arguments = "--preset tiny --tokens 256 --precision bf16 --recompute none --repeats 1 --gpu H100"
    monkeypatch.setattr(sys, "argv", ["train_step", *arguments.split(), "--out", str(out)])
    monkeypatch.setattr(benchmark, "pick_device", lambda _wanted: benchmark.torch.device("cpu"))
    benchmark.main()
    (result,) = json.loads(out.read_text())["results"]
    assert result["problem"] is None and result["gpu"] == "h100"
    layers = Counter(load_job("tiny").train.model.layers)
    assert {kind: count for kind, count, *_ in result["kinds"]} == {**layers, benchmark.OUTSIDE: 1}
    assert sum(took for *_, took in result["kinds"]) == pytest.approx(result["micro_batch_seconds"])
    bound = sum(bound for _, _, bound, _ in result["kinds"])
    model, gpu = load_job("tiny").train.model, by_option("h100")
    options = {"seq_len": load_job("tiny").train.seq_len, "micro_batch_tokens": 256, "micro_batches": 1}
    whole = roofline(model, gpu, **options)
    assert bound == pytest.approx(sum(w.seconds(gpu) for kind, w in whole.rows.items() if "optimizer" not in kind))
    assert "at best on h100" in capsys.readouterr().out


def test_time_of_a_gpu_is_counted_once(benchmark):
    """An operation carries the time of its kernels, and an annotated range that of all within."""

    def event(key: str, kind: str, time: float, annotation: bool = False) -> SimpleNamespace:
        device_type = getattr(benchmark.DeviceType, kind)
        values = {"key": key, "count": 2, "device_type": device_type, "is_user_annotation": annotation}
        return SimpleNamespace(**values, self_device_time_total=time, self_cpu_time_total=1.0)

    events = [event("aten::mm", "CPU", 30), event("range", "CUDA", 40, True), event("copy", "CUDA", 10)]
    found = benchmark.largest([*events, event("gemm", "CUDA", 30)], on_gpu=True)
    assert found == [("gemm", 0.75, 2), ("copy", 0.25, 2)]
