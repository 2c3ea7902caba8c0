"""Metrics as seen by a Prometheus server: scraped over HTTP and parsed."""

import ast
import pathlib
import urllib.request
from typing import get_args

import micro
import pytest
import torch
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families

from trainer.arithmetic.flops import flops_per_token
from trainer.data.loader import TokenLoader
from trainer.distributed import World
from trainer.recording import metrics as metrics_module
from trainer.recording import recorder
from trainer.recording.exporter import Metrics
from trainer.recording.metrics import METRICS, PREFIX, Process
from trainer.recording.recorder import peak_flops


@pytest.fixture
def serve():
    opened = []

    def start(rank=0, process="trainer"):
        port = free_port()
        opened.append(Metrics(rank=rank, port=port, process=process))
        return opened[-1], port

    yield start
    for metrics in opened:
        metrics.close()


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return families, {(s.name, *sorted(s.labels.items())): s.value for f in families for s in f.samples}


def use_all(metrics):
    for metric in METRICS:
        labels = dict.fromkeys(metric.labels, "x")
        {"gauge": metrics.set, "counter": metrics.add, "histogram": metrics.observe}[metric.kind](
            metric.name, 2.0, **labels
        )


@pytest.mark.enable_socket
def test_scrape_has_the_values_and_the_rank(serve):
    metrics, port = serve()
    metrics.set("loss", 3.25)
    metrics.add("tokens_total", 100)
    metrics.add("tokens_total", 28)
    metrics.add("phase_seconds_total", 0.5, phase="data")
    metrics.add("goodput_seconds_total", 4, **{"class": "step"})
    metrics.observe("step_seconds", 0.7)
    _, samples = scrape(port)
    assert samples["yaongi_loss",] == 3.25
    assert samples["yaongi_tokens_total",] == 128
    assert samples["yaongi_phase_seconds_total", ("phase", "data"), ("rank", "0")] == 0.5
    assert samples["yaongi_goodput_seconds_total", ("class", "step")] == 4
    assert samples["yaongi_step_seconds_sum", ("rank", "0")] == 0.7
    assert samples["yaongi_step_seconds_bucket", ("le", "0.5"), ("rank", "0")] == 0
    assert samples["yaongi_step_seconds_bucket", ("le", "1.0"), ("rank", "0")] == 1
    assert not any(name == "yaongi_grad_norm" for name, *_ in samples), "a gauge never set must be absent"
    assert samples["yaongi_clips_total",] == 0


@pytest.mark.enable_socket
@pytest.mark.parametrize("process", get_args(Process))
def test_exactly_the_table_is_exported(serve, process):
    metrics, port = serve(process=process)
    use_all(metrics)
    families, _ = scrape(port)
    expected = {
        PREFIX + m.name.removesuffix("_total" if m.kind == "counter" else ""): (m.kind, m.help)
        for m in METRICS
        if process in m.processes
    }
    assert {f.name: (f.type, f.documentation) for f in families} == expected


@pytest.mark.enable_socket
def test_other_ranks_export_only_their_own(serve):
    metrics, port = serve(rank=3)
    use_all(metrics)
    _, samples = scrape(port)
    assert samples
    assert all(("rank", "3") in labels for _, *labels in samples)


@pytest.mark.enable_socket
def test_taken_port_is_one_clear_line(serve):
    _, port = serve()
    with pytest.raises(ValueError, match=f"metrics port {port} is taken; set train.runtime.metrics_port") as caught:
        Metrics(rank=0, port=port)
    assert "\n" not in str(caught.value)


@pytest.mark.enable_socket
def test_closing_frees_the_port():
    port = free_port()
    Metrics(rank=0, port=port).close()
    Metrics(rank=0, port=port).close()


def test_port_zero_serves_nothing(monkeypatch):
    monkeypatch.setattr(
        "trainer.recording.exporter.start_http_server", lambda *a, **k: pytest.fail("a server was started")
    )
    metrics = Metrics(rank=0, port=0)
    metrics.set("loss", 1.0)
    assert metrics.registry.get_sample_value("yaongi_loss") == 1.0
    metrics.close()


def test_names_outside_the_table_are_refused():
    with pytest.raises(ValueError, match="losss is not in the table"):
        Metrics(rank=0, port=0).set("losss", 1.0)


def test_conventions():
    names = [m.name for m in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith("."), metric.name
        assert not {"run", "run_id", "step", "pod", "host", "rank"} & set(metric.labels), metric.name
        assert metric.processes and not (metric.per_rank and metric.processes != ("trainer",)), metric.name


def test_every_metric_of_the_table_is_recorded_somewhere():
    """The panel of a metric that no code sets would stay empty."""
    table = pathlib.Path(metrics_module.__file__)
    root = table.parents[2]
    for processes, package in ((("trainer", "evaluation", "server"), "trainer"), (("launcher", "data"), "components")):
        literals = set()
        for path in (root / package).rglob("*.py"):
            if path != table:
                literals |= {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert {metric.name for metric in METRICS if set(metric.processes) & set(processes)} <= literals


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("Tesla T4", 65),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 2080 Ti", None),
    ],
)
def test_mfu_is_against_the_data_sheet_and_absent_for_unknown_gpus(name, teraflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (None if teraflops is None else teraflops * 1e12)
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("skip", [[], [[0, 4096]]])
def test_utilisation_counts_the_rows_of_the_step(skip, micro_data, tmp_path, monkeypatch):
    """What was skipped moves the stream on, so that a later stage's rows come earlier than by tokens trained on."""
    stage = {"from_tokens": 4096, "seq_len": 16}
    spec = micro.micro_spec(micro_data, tmp_path, tokens={"curriculum": [stage], "skip": skip})
    monkeypatch.setattr(recorder, "peak_flops", lambda device: 1e12)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    with TokenLoader(spec.tokens, spec.batch, rank=0, world_size=1) as loader:
        batch = [next(loader) for _ in range(2)][-1]  # the first step begins before what it skips
    recording = recorder.Recorder(spec, World(1, 2, 1, 2, torch.device("cuda"), None, None), 0.0)
    values: dict[str, float] = {}
    monkeypatch.setattr(recording.metrics, "set", lambda name, value, **labels: values.update({name: value}))
    record = recorder.StepRecord(
        step=2, loss=1.0, auxiliary={}, grad_norm=1.0, learning_rate=1.0, tokens=512, tokens_per_second=1000.0,
        seconds=0.25, clipped=False, skipped=None, expert_load_max_ratio=1.0, expert_starved_ratio=0.0,
        by_source=batch.tokens_by_source,
    )  # fmt: skip
    recording.step(record, loader.epochs(), batch.seq_len)
    flops = flops_per_token(spec.model, 16 if skip else 32)
    assert values["mfu_ratio"] == pytest.approx(flops * 1000.0 / 2e12)
    recording.close()
