"""Fields of `cluster` about the workers' pods beyond CPUs, memory and GPUs: variables, labels, devices, placement."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from manifests.variables import is_secret, is_set
from trainer.kinds.base import Count
from trainer.specbase import Spec

UNLIMITED = -1
HUB_SECRET = "huggingface"  # optional; its key `token` is an access token of the Hugging Face Hub
LANGFUSE_SECRET = "langfuse-secrets"  # optional; its keys are the names of the variables
JUDGE_SECRET = "judge"  # its key `token` is the key of the API of train.evaluate.judge
_PART = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_DOMAIN = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY = re.compile(rf"({_DOMAIN}/)?{_PART}")
_EXTENDED = re.compile(rf"{_DOMAIN}/{_PART}")
_PAGES = re.compile(r"hugepages-(\d+)(Mi|Gi)")
_AMOUNT = re.compile(r"(\d+)(Mi|Gi)")
# Labels and annotations that we, the operators, JobSet, Kueue or Kubernetes set and read.
_OWN = re.compile(
    r"yaongi/.*|app\.kubernetes\.io/(name|instance|component|part-of|managed-by)|sidecar\.istio\.io/inject|"
    r"(training\.kubeflow\.org|trainer\.kubeflow\.org|jobset\.sigs\.k8s\.io|batch\.kubernetes\.io|kueue\.x-k8s\.io)/.*"
)
_FIELDS = {"cpu": "cpus_per_node", "memory": "memory_gib_per_node", "nvidia.com/gpu": "gpus_per_node"}
_MIB = {"Mi": 1, "Gi": 1024}


def _each(check: Callable[[str, str], str | None]) -> AfterValidator:
    """A validator that raises the first complaint that `check` has of a name and its value."""

    def validate(values: Mapping[str, str | int]) -> Mapping[str, str | int]:
        for name, value in values.items():
            if problem := check(name, str(value)):
                raise ValueError(problem)
        return values

    return AfterValidator(validate)


def _variable(name: str, value: str) -> str | None:
    if not _VARIABLE.fullmatch(name):
        return f"'{name}' cannot name a variable; write letters, digits and _, no digit first"
    if is_set(name):
        return f"{name} is set by yaongi, torchrun or the operator; remove it"
    if is_secret(name, value):
        return f"{name} looks like a secret, and who may read the job reads it; put it into a Secret"
    return None


def _metadata(name: str, value: str) -> str | None:
    if not _KEY.fullmatch(name):
        return f"'{name}' cannot be a key; write name or domain/name, a name of at most 63 letters, digits, - _ ."
    if _OWN.fullmatch(name):
        return f"{name} is set by yaongi, an operator or Kueue; remove it (cluster.queue names a queue)"
    return None


def _label(name: str, value: str) -> str | None:
    if value and not re.fullmatch(_PART, value):
        return f"{name}: '{value}' cannot be a label's value; write at most 63 letters, digits, - _ . or an annotation"
    return _metadata(name, value)


def _resource(name: str, value: str) -> str | None:
    if name in _FIELDS:
        return f"{name} is cluster.{_FIELDS[name]}; write it there"
    if pages := _PAGES.fullmatch(name):
        amount = _AMOUNT.fullmatch(value)
        size = int(pages[1]) * _MIB[pages[2]]
        if amount and int(amount[1]) and int(amount[1]) * _MIB[amount[2]] % size == 0:
            return None
        return f"{name}: '{value}' is no multiple of its page size; write an amount as 512Mi or 2Gi"
    if not _EXTENDED.fullmatch(name) or (name.split("/")[0].endswith("kubernetes.io") and "deviceclass" not in name):
        return f"'{name}' is no device's resource; write domain/name as rdma/hca_shared, or hugepages-2Mi"
    if not value.isdecimal() or not int(value):
        return f"{name}: '{value}' is no number of devices; write a whole number from 1"
    return None


Environment = Annotated[dict[str, str], _each(_variable)]
Labels = Annotated[dict[str, str], _each(_label)]
Annotations = Annotated[dict[str, str], _each(_metadata)]
Resources = Annotated[dict[str, int | str], _each(_resource)]
DeviceClass = Annotated[str, Field(pattern=rf"^{_DOMAIN}$")]
Devices = dict[DeviceClass, Annotated[int, Field(ge=1, le=128)]]
Ulimits = dict[Literal["memlock", "nofile", "nproc", "stack", "core"], Annotated[int, Field(ge=UNLIMITED)]]
SecretName = Annotated[str, Field(pattern=rf"^{_DOMAIN}$")]


class SpreadSpec(Spec):
    """How the workers are spread over the values of a node label, such as hosts, racks or zones.

    Between two of these values the numbers of workers differ by `max_skew` at most; `required: false` only prefers it.
    """

    topology_key: str = Field("kubernetes.io/hostname", pattern=_KEY.pattern)
    max_skew: Count = 1
    required: bool = False
