"""The Helm chart, rendered by Helm itself for every supported configuration (charts/yaongi/ci)."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from tools import tool

from manifests import chart, dashboards, serving
from manifests.alerts import prometheus_rule
from manifests.chartvalues import ChartValues, defaults
from manifests.lint.check import lint
from manifests.network import default_deny, network_policies
from manifests.rbac import QUEUE_RULES, ROLE, RULES, rbac
from manifests.render import pvcs
from manifests.spec import job_from

CHART = chart.CHART
CONFIGURATIONS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").iterdir())
KUBERNETES = "1.34"
# Values that depend on a kind of another project, and that kind.
SWITCHES = {
    "monitoring.podMonitor.enabled": "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.rules.enabled": "monitoring.coreos.com/v1/PrometheusRule",
    "queue.enabled": "kueue.x-k8s.io/v1beta2/LocalQueue",
}
OPTIONAL = {
    "prometheus-operator": ["monitoring.coreos.com/v1/PodMonitor", "monitoring.coreos.com/v1/PrometheusRule"],
    "kueue": ["kueue.x-k8s.io/v1beta2/LocalQueue"],
}
CUSTOM = ("monitoring.coreos.com/", "kueue.x-k8s.io/")
Object = dict[str, Any]


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("helm"), *map(str, arguments)], capture_output=True, text=True, timeout=280)


def template(*arguments: str | Path, apis: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    flags = [f"--api-versions={api}" for api in apis or []]
    return helm("template", "rel", CHART, "--namespace=here", f"--kube-version={KUBERNETES}", *flags, *arguments)


def rendered(*arguments: str | Path, apis: list[str] | None = None) -> list[Object]:
    done = template(*arguments, apis=apis)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


@pytest.fixture(scope="module")
def configured() -> Callable[[str], list[Object]]:
    """Objects of a supported configuration by (kind, name), which identify them in the API."""
    known: dict[str, list[Object]] = {}

    def objects(name: str) -> list[Object]:
        if name not in known:
            known[name] = rendered("--values", CHART / "ci" / f"{name}-values.yaml", apis=OPTIONAL.get(name))
        return known[name]

    return objects


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)


@every_configuration
def test_helm_lint_is_content(name: str) -> None:
    """Helm's lint knows only Kubernetes' own kinds, so values that need others are `auto`."""
    values = ["--values", CHART / "ci" / f"{name}-values.yaml"]
    auto = [f"--set={switch}=auto" for switch in SWITCHES]
    done = helm("lint", "--strict", CHART, f"--kube-version={KUBERNETES}", *values, *auto)
    assert done.returncode == 0, done.stdout + done.stderr


@every_configuration
def test_objects_are_what_kubernetes_takes(name: str, configured: Callable[[str], list[Object]]) -> None:
    """Built-in kinds against Kubernetes' own schemas; the end-to-end tests check the others with an API server."""
    objects = configured(name)
    built_in = [item for item in objects if not item["apiVersion"].startswith(CUSTOM)]
    assert len(built_in) >= 3
    for item in built_in:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    identities = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(identities) == len(set(identities))


@every_configuration
def test_every_object_belongs_to_the_release(name: str, configured: Callable[[str], list[Object]]) -> None:
    for item in configured(name):
        labels = item["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "rel"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        of_the_cluster = item["kind"] in ("ClusterQueue", "ResourceFlavor")
        assert item["metadata"].get("namespace") == (None if of_the_cluster else "here")


@every_configuration
def test_rights_are_those_of_the_launcher(name: str, configured: Callable[[str], list[Object]]) -> None:
    objects = configured(name)
    (role,), (binding,), (account,) = (of_kind(objects, kind) for kind in ("Role", "RoleBinding", "ServiceAccount"))
    assert role["rules"] == RULES + QUEUE_RULES
    assert account["metadata"]["name"] == ROLE
    _, _, expected = rbac("here")
    assert sorted(map(str, binding["subjects"])) == sorted(map(str, expected["subjects"]))
    assert binding["roleRef"] == expected["roleRef"]
    assert not [item for item in objects if item["kind"].startswith("ClusterRole")]


def test_accounts_that_may_launch_are_chosen() -> None:
    (binding,) = of_kind(rendered("--set", "launcher.accounts={default-editor}"), "RoleBinding")
    assert {subject["name"] for subject in binding["subjects"]} == {ROLE, "default-editor"}
    assert not of_kind(rendered("--set", "launcher.create=false"), "RoleBinding")


def test_claims_are_those_of_the_manifests_and_outlive_the_release() -> None:
    claims = of_kind(rendered(), "PersistentVolumeClaim")
    assert [(claim["metadata"]["name"], claim["spec"]) for claim in claims] == [
        (claim["metadata"]["name"], claim["spec"]) for claim in pvcs(job_from({"preset": "tiny"}))
    ]
    assert all(claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"} for claim in claims)


def test_claims_take_size_class_and_mode(configured: Callable[[str], list[Object]]) -> None:
    claims = of_kind(configured("minimal"), "PersistentVolumeClaim")
    assert [claim["spec"] for claim in claims] == [
        {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "standard",
            "resources": {"requests": {"storage": size}},
        }
        for size in ("10Gi", "20Gi")
    ]
    assert not any("annotations" in claim["metadata"] for claim in claims), "keep is off"
    assert not of_kind(configured("existing-claims"), "PersistentVolumeClaim")


def test_two_claims_of_one_name_are_refused() -> None:
    one_name = "storage.datasets.name=shared,storage.checkpoints.name=shared"
    refused = template("--set", one_name)
    assert refused.returncode and not refused.stdout
    assert "storage.datasets.name and storage.checkpoints.name are both shared; give each claim a name of its own" in (
        refused.stderr
    )
    for existing in ("datasets", "checkpoints"):
        objects = rendered("--set", f"{one_name},storage.{existing}.existingClaim=other")
        assert [claim["metadata"]["name"] for claim in of_kind(objects, "PersistentVolumeClaim")] == ["shared"]


def test_policies_are_those_of_the_manifests(configured: Callable[[str], list[Object]]) -> None:
    def specs(objects: list[Object]) -> dict[str, Object]:
        return {item["metadata"]["name"]: item["spec"] for item in of_kind(objects, "NetworkPolicy")}

    assert specs(configured("default")) == specs(network_policies())
    assert specs(configured("locked-down-network")) == specs([*network_policies(["10.20.0.0/16"]), default_deny()])
    assert not specs(configured("minimal"))


def test_monitors_scrape_every_rank_with_the_labels_that_prometheus_selects(
    configured: Callable[[str], list[Object]],
) -> None:
    ours = configured("prometheus-operator")
    monitor, of_steps, of_servers = of_kind(ours, "PodMonitor")
    endpoints = monitor["spec"]["podMetricsEndpoints"]
    assert [endpoint["port"] for endpoint in endpoints] == [f"metrics-{rank}" for rank in range(16)]
    assert {endpoint["interval"] for endpoint in endpoints} == {"5s"}
    (rule,) = of_kind(ours, "PrometheusRule")
    assert {each["metadata"]["labels"]["prometheus"] for each in (monitor, of_steps, of_servers, rule)} == {"main"}
    assert monitor["spec"]["selector"] == chart.objects()["podmonitor"][0]["spec"]["selector"]
    (endpoint,) = of_servers["spec"]["podMetricsEndpoints"]
    (relabeling,) = endpoint["relabelings"]
    assert relabeling["sourceLabels"] == ["__meta_kubernetes_pod_label_app_kubernetes_io_instance"]


def test_a_server_is_that_of_the_manifests(configured: Callable[[str], list[Object]]) -> None:
    """The template sets the values where the manifests would."""
    assert not of_kind(configured("default"), "Deployment") and not of_kind(configured("default"), "Service")
    values = yaml.safe_load((CHART / "ci" / "serving-values.yaml").read_text(encoding="utf-8"))["serve"]
    given = {re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", name): value for name, value in values.items()}
    assert given.pop("enabled") is True
    selector, secret = given.pop("node_selector"), given.pop("api_key_secret")
    deployment, service, policy = serving.objects(serving.Server(secret=secret, **given))
    template = deployment["spec"]["template"]
    template["spec"]["nodeSelector"] = selector
    template["metadata"]["labels"]["app.kubernetes.io/instance"] = "rel"
    found = {(item["kind"], item["metadata"]["name"]): item for item in configured("serving")}
    assert not lint({"chart": yaml.safe_dump_all(configured("serving"))}).findings
    for item in (deployment, service, policy):
        assert found[item["kind"], item["metadata"]["name"]]["spec"] == item["spec"]


def test_a_server_follows_the_volume_the_secret_and_the_network_policy() -> None:
    on = "serve.enabled=true,serve.export=runs/a/export"
    objects = rendered(
        "--set", f"{on},serve.apiKeySecret=,storage.checkpoints.existingClaim=team,networkPolicy.enabled=false"
    )
    (deployment,) = of_kind(objects, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "team"}
    assert "YAONGI_API_KEY" not in {each["name"] for each in pod["containers"][0]["env"]}
    assert not of_kind(objects, "NetworkPolicy")
    refused = template("--set", "serve.enabled=true")
    assert refused.returncode and "serve.export is empty; set it to the folder of an export" in refused.stderr


def test_the_servers_arguments_are_what_it_takes() -> None:
    from trainer.serving.__main__ import parser

    *_, directory = (arguments := serving.arguments(serving.Server("runs/a/export")))[:4]
    assert arguments[:3] == ["python", "-m", "trainer.serving"] and directory == "/mnt/checkpoints/runs/a/export"
    options = parser().parse_args(arguments[3:])
    assert (options.host, options.port, options.metrics_port) == ("0.0.0.0", serving.PORT, serving.METRICS_PORT)
    spec = serving.objects(serving.Server("x"))[0]["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] > options.grace + serving.FORGETTING_SECONDS


def test_alerts_are_those_of_the_manifests_and_link_to_the_runbooks_given() -> None:
    apis = OPTIONAL["prometheus-operator"]
    (plain,) = of_kind(rendered(apis=apis), "PrometheusRule")
    assert plain["spec"] == prometheus_rule({})["spec"]
    (linked,) = of_kind(
        rendered("--set", "monitoring.rules.runbooks=https://example.org/r/", apis=apis), "PrometheusRule"
    )
    assert linked["spec"] == prometheus_rule({}, "https://example.org/r")["spec"]


def test_dashboards_are_those_of_the_manifests_and_link_to_the_runbooks_given() -> None:
    def shown(*arguments: str) -> dict[str, str]:
        maps = of_kind(rendered(*arguments), "ConfigMap")
        return {name: text for each in maps for name, text in each["data"].items() if name.endswith(".json")}

    assert shown() == dashboards.files()
    linked = shown("--set", "monitoring.rules.runbooks=https://example.org/r/")
    assert linked == {
        name: text.replace('"docs/runbooks/', '"https://example.org/r/') for name, text in dashboards.files().items()
    }
    assert linked != dashboards.files()


def test_dashboards_are_what_grafanas_sidecar_looks_for(configured: Callable[[str], list[Object]]) -> None:
    found = of_kind(configured("prometheus-operator"), "ConfigMap")
    assert len(found) == len(dashboards.files())
    assert all(each["metadata"]["labels"]["grafana_dashboard"] == "1" for each in found)
    assert all(each["metadata"]["annotations"] == {"grafana_folder": "Training"} for each in found)
    assert not of_kind(configured("minimal"), "ConfigMap")


def test_kueue_gets_a_queue_and_what_it_draws_from(configured: Callable[[str], list[Object]]) -> None:
    objects = configured("kueue")
    (local,), (behind,), (flavor,) = (
        of_kind(objects, kind) for kind in ("LocalQueue", "ClusterQueue", "ResourceFlavor")
    )
    assert (local["metadata"]["name"], local["spec"]) == ("team-a", {"clusterQueue": "gpus"})
    assert flavor["spec"] == {"nodeLabels": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}}
    (group,) = behind["spec"]["resourceGroups"]
    quotas = {item["name"]: item["nominalQuota"] for item in group["flavors"][0]["resources"]}
    assert quotas == {"cpu": 192, "memory": "1920Gi", "nvidia.com/gpu": 16}
    assert sorted(quotas) == group["coveredResources"] and group["flavors"][0]["name"] == "h100"
    only_local = rendered("--set", "queue.enabled=auto", apis=OPTIONAL["kueue"])
    assert of_kind(only_local, "LocalQueue") and not of_kind(only_local, "ClusterQueue")


@pytest.mark.parametrize(("switch", "api"), SWITCHES.items())
def test_optional_kinds_follow_the_cluster(switch: str, api: str) -> None:
    kind = api.rpartition("/")[2]
    assert not of_kind(rendered("--set", f"{switch}=auto"), kind)
    assert of_kind(rendered("--set", f"{switch}=auto", apis=[api]), kind)
    assert of_kind(rendered("--set", f"{switch}=true", apis=[api]), kind)
    assert not of_kind(rendered("--set", f"{switch}=false", apis=[api]), kind)
    refused = template("--set", f"{switch}=true")
    assert refused.returncode and not refused.stdout
    assert f"{switch} is true, but the cluster has no {api}" in refused.stderr
    assert "set it to auto or false" in refused.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("storage.datasets.size=lots", "at '/storage/datasets/size': 'lots' does not match pattern"),
        ("storage.datasets.acessModes={ReadWriteMany}", "additional properties 'acessModes' not allowed"),
        ("storage.checkpoints.accessModes={ReadOnce}", "at '/storage/checkpoints/accessModes/0'"),
        (
            "monitoring.podMonitor.enabled=maybe",
            "at '/monitoring/podMonitor/enabled': value must be one of 'auto', true",
        ),
        ("monitoring.podMonitor.interval=often", "at '/monitoring/podMonitor/interval'"),
        ("networkPolicy.clusterRanges={10.0.0.1}", "at '/networkPolicy/clusterRanges/0'"),
        ("launcher.accounts={Pipeline Runner}", "at '/launcher/accounts/0'"),
        ("huggingfaceToken=secret", "additional properties 'huggingfaceToken' not allowed"),
        ("queue.name=Team_A", "at '/queue/name'"),
        ("serve.export=../secrets", "at '/serve/export'"),
        ("serve.export=/mnt", "at '/serve/export'"),
    ],
)
def test_a_wrong_value_is_named(wrong: str, message: str) -> None:
    done = template("--set", wrong)
    assert done.returncode != 0 and not done.stdout
    assert message in done.stderr


def test_an_older_kueue_gets_its_own_version() -> None:
    objects = rendered("--values", CHART / "ci" / "kueue-values.yaml", apis=["kueue.x-k8s.io/v1beta1/LocalQueue"])
    versions = {item["apiVersion"] for item in objects if item["apiVersion"].startswith("kueue")}
    assert versions == {"kueue.x-k8s.io/v1beta1"}


def test_a_queue_without_quotas_is_refused() -> None:
    done = template("--set", "queue.enabled=auto,queue.clusterQueue.create=true", apis=OPTIONAL["kueue"])
    assert done.returncode and "queue.clusterQueue.quotas is empty; set cpu" in done.stderr


def test_the_chart_may_be_a_dependency_of_another(tmp_path: Path) -> None:
    """Helm then adds `global` to its values."""
    parent = {
        "apiVersion": "v2",
        "name": "parent",
        "version": "1.0.0",
        "dependencies": [{"name": "yaongi", "version": chart.about()["version"]}],
    }
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "yaongi").symlink_to(CHART)
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(parent))
    (tmp_path / "values.yaml").write_text("global: {region: here}\nyaongi: {storage: {datasets: {size: 1Gi}}}\n")
    done = helm("template", "rel", tmp_path, f"--kube-version={KUBERNETES}")
    assert done.returncode == 0, done.stderr
    assert "storage: 1Gi" in done.stdout


@pytest.mark.parametrize("path", sorted(chart.files()))
def test_committed_files_are_the_generated_ones(path: str) -> None:
    committed = (CHART / path).read_text(encoding="utf-8")
    assert committed == chart.files()[path], "run python -m manifests.generate and commit what it wrote"


def test_no_generated_file_is_left_over() -> None:
    kept = {str(path.relative_to(CHART)) for path in (CHART / "files").rglob("*") if path.is_file()}
    assert kept == {path for path in chart.files() if path.startswith("files/")}


def test_values_are_the_models_defaults() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert values == defaults()
    assert ChartValues.model_validate(values) == ChartValues()


def test_the_schema_is_closed_and_says_what_each_field_is() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert "$defs" not in json.dumps(schema)
    for table in (schema, *schema["definitions"].values()):
        assert table["additionalProperties"] is False
        assert all("description" in field for name, field in table["properties"].items() if name != "global")
