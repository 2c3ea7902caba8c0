"""compose.yaml: Docker Compose itself reads it, and Prometheus and Grafana get files that they accept."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tools import tool

from manifests import compose
from manifests.alerts import ALERTS, RECORDED, rule_groups
from trainer.runtimespec import RuntimeSpec

ROOT = Path(__file__).parents[2]
FOLDER = compose.FOLDER


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The services as Compose understands them, with its defaults; no engine is asked."""
    home = tmp_path_factory.mktemp("home")
    command = [tool("docker-compose"), "-f", ROOT / "compose.yaml", "config", "--format", "json"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)["services"]


def test_generated_files_are_committed_and_nothing_else_is_there() -> None:
    committed = {str(path.relative_to(FOLDER)): path.read_text() for path in FOLDER.rglob("*") if path.is_file()}
    assert committed == compose.files()


def test_the_trainer_gets_the_gpus_and_the_memory_that_its_processes_share(services: dict[str, Any]) -> None:
    trainer = services[compose.SERVICE]
    (device,) = trainer["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": -1, "capabilities": ["gpu"]}
    assert trainer["ipc"] == "host" and trainer["ulimits"] == {"memlock": -1, "stack": 67108864}
    assert trainer["build"]["dockerfile"] == "Dockerfile" and "target" not in trainer["build"]
    assert trainer["command"] == ["yaongi", "run", "h100-4b-interleaved", "--workdir", "/work"]


def test_docker_run_as_documented_is_the_same_container_and_each_option_is_explained(services: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "docker.md").read_text()
    (line,) = re.findall(r"^    (docker run -d .*)$", page, re.MULTILINE)
    options, command = line.removeprefix("docker run -d --name yaongi ").split(" yaongi-h100 ")
    trainer = services[compose.SERVICE]
    assert command.split() == trainer["command"]
    found = re.findall(r"--?[a-z-]+[ =]\S+", options)
    assert " ".join(found) == options and [f"| `{option}` |" in page for option in found] == [True] * len(found)
    limits = {f"--ulimit {name}={value}" for name, value in trainer["ulimits"].items()}
    assert limits | {"--gpus all", "--ipc=host", "--env-file .env", "-v yaongi-work:/work"} == set(found)
    assert [mount["target"] for mount in trainer["volumes"]] == ["/work"]


def test_every_port_is_of_this_machine_alone(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"} and len(ports) == 2
    grafana = services["grafana"]["environment"]
    assert grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer" and grafana["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"


def test_images_of_others_are_pinned_by_tag_and_digest(services: dict[str, Any]) -> None:
    others = [service["image"] for service in services.values() if "build" not in service]
    assert len(others) == 2 and all(re.search(r":v?\d+\.\d+\.\d+@sha256:[0-9a-f]{64}$", image) for image in others)


def test_what_is_mounted_from_here_exists(services: dict[str, Any]) -> None:
    mounts = [mount for service in services.values() for mount in service.get("volumes", [])]
    bound = {mount["target"]: Path(mount["source"]) for mount in mounts if mount["type"] == "bind"}
    assert len(bound) == 5 and all(path.exists() for path in bound.values())
    assert bound[compose.DASHBOARDS] == ROOT / "charts" / "yaongi" / "files" / "dashboards"
    assert bound[f"/etc/prometheus/{compose.RULES}"].parent == bound["/etc/prometheus/prometheus.yml"].parent


def test_prometheus_accepts_configuration_and_rules() -> None:
    command = [tool("promtool"), "check", "config", FOLDER / "prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS) - 1 + len(RECORDED)} rules found" in done.stdout


def test_only_the_alert_about_vanished_targets_is_left_out() -> None:
    def names(groups: dict[str, Any]) -> list[str]:
        return [rule.get("alert") for group in groups["groups"] for rule in group["rules"] if "alert" in rule]

    here = names(yaml.safe_load((FOLDER / "rules.yml").read_text()))
    assert [name for name in names(rule_groups()) if name not in here] == ["YaongiTargetDown"]


def test_prometheus_asks_the_ports_that_the_trainer_has(services: dict[str, Any]) -> None:
    jobs = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    hosts = {target.partition(":")[0] for each in targets.values() for target in each}
    assert hosts == {"trainer"} <= services.keys()
    assert targets["yaongi-trainer"][0] == f"trainer:{RuntimeSpec().metrics_port}"


def test_grafana_finds_data_source_and_dashboards(services: dict[str, Any]) -> None:
    (source,) = yaml.safe_load((FOLDER / "grafana/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    (provider,) = yaml.safe_load((FOLDER / "grafana/dashboards/yaongi.yml").read_text())["providers"]
    targets = {mount["target"] for mount in services["grafana"]["volumes"]}
    assert provider["options"]["path"] in targets
    assert {f"/etc/grafana/provisioning/{kind}" for kind in ("datasources", "dashboards")} <= targets
    for file in (ROOT / "charts/yaongi/files/dashboards").glob("*.json"):
        choices = json.loads(file.read_text())["templating"]["list"]
        assert [choice["query"] for choice in choices if choice["type"] == "datasource"] == [source["type"]]
