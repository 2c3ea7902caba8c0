"""The Helm chart's values: the model behind its values.yaml, values.schema.json and README table.

In these files field names are in Helm's camelCase. No value may be null: Helm drops nulls when it merges.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from manifests.alerts import RUNBOOKS
from manifests.clusterspec import ObservabilitySpec, StorageSpec
from manifests.network import PRIVATE
from manifests.objects import gibibytes
from manifests.rbac import ACCOUNTS, ROLE
from manifests.render import CHECKPOINTS_GIB, DATASETS_GIB
from manifests.serving import PullPolicy, Server
from manifests.yamltext import to_yaml
from trainer.serving.options import Device, Weights
from trainer.specbase import Spec

Switch = Literal["auto", True, False]
DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
NameOrEmpty = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", max_length=253)]
Quantity = (
    Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")] | Annotated[int, Field(ge=0)]
)
Duration = Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m|h)$")]
Cidr = Annotated[str, Field(pattern=r"^[0-9a-fA-F.:]+/[0-9]{1,3}$")]
Texts = dict[str, str]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
SERVER = Server("")
DEFAULT_STORAGE = StorageSpec()
DEFAULT_OBSERVABILITY = ObservabilitySpec()


class Values(Spec):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class Launcher(Values):
    create: bool = Field(True, description="Create the launcher's role, its service account and their binding.")
    accounts: list[DnsName] = Field(
        [name for name in ACCOUNTS if name != ROLE],
        description=f"Service accounts of this namespace, besides {ROLE}, that may launch jobs: those of KFP's steps.",
    )


class Claim(Values):
    existing_claim: NameOrEmpty = Field("", description="Use this existing claim instead of creating one.")
    name: DnsName = Field(description="Name of the created claim; jobs expect the default.")
    size: Quantity = Field(description="Requested size.")
    storage_class_name: NameOrEmpty = Field("", description="Storage class; empty is the cluster's default class.")
    access_modes: list[Literal["ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"]] = Field(
        ["ReadWriteMany"],
        min_length=1,
        description="ReadWriteMany shares the volume between nodes; ReadWriteOnce suffices for jobs on one node.",
    )
    keep: bool = Field(True, description="Keep the claim, and so its data, on `helm uninstall`.")


class Storage(Values):
    datasets: Claim = Field(
        Claim(name=DEFAULT_STORAGE.datasets_pvc, size=gibibytes(DATASETS_GIB)),
        description="Raw text, tokenizers and token shards.",
    )
    checkpoints: Claim = Field(
        Claim(name=DEFAULT_STORAGE.checkpoints_pvc, size=gibibytes(CHECKPOINTS_GIB)),
        description="Runs: checkpoints, logs, reports, exported models.",
    )


class NetworkPolicy(Values):
    enabled: bool = Field(
        True, description="Workers reach only each other; steps reach the cluster, some also the Hub."
    )
    cluster_ranges: list[Cidr] = Field(
        list(PRIVATE),
        description="Addresses that steps may reach: the API server, and for example an object store.",
    )
    default_deny: bool = Field(False, description="Isolate the namespace's other pods too, including KFP's own.")


class PodMonitor(Values):
    enabled: Switch = Field(
        "auto", description="Create the PodMonitors; auto: if the Prometheus operator is installed."
    )
    interval: Duration = Field(
        f"{DEFAULT_OBSERVABILITY.scrape_interval_seconds:g}s", description="Time between scrapes."
    )


class Rules(Values):
    enabled: Switch = Field("auto", description="Create the alerts; auto: if the Prometheus operator is installed.")
    runbooks: str = Field(RUNBOOKS, description="URL of a copy of docs/runbooks, which the alerts link to.")


class Dashboards(Values):
    enabled: bool = Field(True, description="Create Grafana dashboards as ConfigMaps, which Grafana's sidecar loads.")
    labels: Texts = Field({"grafana_dashboard": "1"}, description="Labels by which the sidecar finds them.")
    annotations: Texts = Field(
        {"grafana_folder": "yaongi"}, description="Annotations, from which the sidecar reads the folder."
    )


class Monitoring(Values):
    labels: Texts = Field(
        DEFAULT_OBSERVABILITY.monitor_labels, description="Labels by which Prometheus selects monitors and rules."
    )
    pod_monitor: PodMonitor = Field(PodMonitor(), description="PodMonitors of training pods and pipeline steps.")
    rules: Rules = Field(Rules(), description="PrometheusRule.")
    dashboards: Dashboards = Field(Dashboards(), description="Dashboards.")


class ClusterQueue(Values):
    create: bool = Field(False, description="Create the ClusterQueue and its flavor; they are cluster-wide.")
    name: DnsName = Field("yaongi", description="The ClusterQueue of the LocalQueue, created here or existing.")
    flavor: DnsName = Field("yaongi", description="Name of the ResourceFlavor that is created with it.")
    node_labels: Texts = Field({}, description="Labels of the flavor's nodes; empty means every node.")
    quotas: dict[str, Quantity] = Field(
        {}, description="Total that running jobs may request, by resource; every requested resource needs an entry."
    )


class Queue(Values):
    enabled: Switch = Field(
        False, description="Create a Kueue LocalQueue for the jobs' `cluster.queue`; auto: if Kueue is installed."
    )
    name: DnsName = Field("yaongi", description="Name of the LocalQueue.")
    cluster_queue: ClusterQueue = Field(ClusterQueue(), description="The ClusterQueue behind it.")


class Serve(Values):
    enabled: bool = Field(False, description="Serve an exported model with OpenAI's API; see docs/serving.md.")
    export: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*)?$")] = Field(
        "", description="Folder of the export on the volume of checkpoints: runs/NAME/export."
    )
    image: str = Field(SERVER.image, min_length=1, description="The trainer's image.")
    image_pull_policy: PullPolicy = Field(SERVER.image_pull_policy, description="When the image is pulled.")
    replicas: Count = Field(SERVER.replicas, description="Servers, each with the whole model.")
    api_key_secret: NameOrEmpty = Field(
        SERVER.secret,
        description="Secret whose key `key` is the API key; empty: whoever reaches the server may use it.",
    )
    rows: Positive = Field(SERVER.rows, description="Texts at the same time, for each server.")
    length: Count = Field(
        SERVER.length, description="Tokens of the longest text, prompt included; 0: as long as in training."
    )
    max_waiting: Count = Field(SERVER.max_waiting, description="Texts that may wait beside them; more get status 429.")
    device: Device = Field(SERVER.device, description="Where the model computes.")
    weights: Weights = Field(
        SERVER.weights, description="How weights are held; auto: as stored, FP32 as BF16 on a GPU that has it."
    )
    cpus: Quantity = Field(SERVER.cpus, description="Requested CPUs of each server.")
    memory: Quantity = Field(SERVER.memory, description="Requested and largest memory of each server.")
    gpus: Count = Field(SERVER.gpus, description="GPUs of each server; it uses one.")
    node_selector: Texts = Field({}, description="Labels of the nodes for servers; empty: any node.")
    grace_seconds: Count = Field(
        SERVER.grace_seconds, description="For running answers when a server ends, for example in a roll-out."
    )
    start_seconds: Positive = Field(SERVER.start_seconds, description="For loading the model.")


class ChartValues(Values):
    """Values of the chart yaongi."""

    common_labels: Texts = Field({}, description="Labels added to every object.")
    launcher: Launcher = Field(Launcher(), description="Who may launch jobs.")
    storage: Storage = Field(Storage(), description="The two volumes.")
    network_policy: NetworkPolicy = Field(NetworkPolicy(), description="Allowed connections.")
    monitoring: Monitoring = Field(Monitoring(), description="Prometheus and Grafana.")
    queue: Queue = Field(Queue(), description="Kueue.")
    serve: Serve = Field(Serve(), description="A server of an exported model.")


def schema() -> str:
    """values.schema.json, draft-07, which every Helm 3 reads."""
    found = _without_titles(ChartValues.model_json_schema(ref_template="#/definitions/{model}"))
    definitions = found.pop("$defs")
    # Helm hands `global` to a chart that another depends on.
    properties = {**found.pop("properties"), "global": {"type": "object"}}
    whole = {"$schema": "http://json-schema.org/draft-07/schema#", **found, "properties": properties}
    return json.dumps({**whole, "definitions": definitions}, indent=1) + "\n"


def _without_titles(value: Any) -> Any:
    """pydantic's titles repeat the names of the fields."""
    if isinstance(value, dict):
        return {k: _without_titles(v) for k, v in value.items() if not (k == "title" and isinstance(v, str))}
    return [_without_titles(item) for item in value] if isinstance(value, list) else value


def defaults() -> dict[str, Any]:
    return ChartValues().model_dump(mode="json", by_alias=True)


def values_yaml(values: Values | None = None, indent: str = "") -> str:
    """values.yaml with every field's description above it."""
    lines = []
    for name, field in type(values := values or ChartValues()).model_fields.items():
        value = getattr(values, name)
        lines.append(f"{indent}# {field.description}\n")
        if isinstance(value, Values):
            lines.append(f"{indent}{field.alias}:\n{values_yaml(value, indent + '  ')}")
        else:
            text = to_yaml({field.alias: value})
            lines += [f"{indent}{line}\n" for line in text.splitlines()]
    return "".join(lines)


def table() -> str:
    """Markdown: every value, its default, what it is."""
    rows = [f"| `{path}` | `{json.dumps(value)}` | {text} |" for path, value, text in _rows(ChartValues())]
    return "\n".join(["| value | default | |", "|---|---|---|", *rows]) + "\n"


def _rows(values: Values, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    for name, field in type(values).model_fields.items():
        value, path = getattr(values, name), f"{prefix}{field.alias}"
        if isinstance(value, Values):
            yield from _rows(value, f"{path}.")
        else:
            yield path, value, field.description or ""
