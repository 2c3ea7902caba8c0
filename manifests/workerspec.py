"""Fields of `cluster` about the workers' pods beyond CPUs, memory and GPUs: variables, labels, devices, placement."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from manifests.variables import is_secret, is_set
from trainer.kinds.base import Count
from trainer.specbase import Spec

UNLIMITED = -1
MOST_OF_A_LIMIT = 2**63 - 1
HUB_SECRET = "huggingface"  # optional; its key `token` is an access token of the Hugging Face Hub
# Optional; their keys are the names of the variables (trainer/trackerspec.py).
LANGFUSE_SECRET, WANDB_SECRET, MLFLOW_SECRET = "langfuse-secrets", "wandb", "mlflow"
JUDGE_SECRET = "judge"  # its key `token` is the key of the API of train.evaluate.judge
_PART = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_WORD = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_DOMAIN = rf"{_WORD}(\.{_WORD})*"
_LONGEST_DOMAIN, _LONGEST_LABEL = 253, 63
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY = re.compile(rf"({_DOMAIN}/)?{_PART}")
_EXTENDED = re.compile(rf"{_DOMAIN}/{_PART}")
_PAGES = re.compile(r"hugepages-([1-9][0-9]*)(Mi|Gi)")
_AMOUNT = re.compile(r"([1-9][0-9]*)(Mi|Gi)")
_COUNT = re.compile(r"[1-9][0-9]{0,8}")
MOST_DEVICES = 32  # of a claim; the API server takes more, and the scheduler never finds them
# Labels and annotations that we, the operators, JobSet, Kueue or Kubernetes set and read.
_OWN = re.compile(
    r"yaongi/.*|app\.kubernetes\.io/(name|instance|component|part-of|managed-by)|sidecar\.istio\.io/inject|"
    r"(training\.kubeflow\.org|trainer\.kubeflow\.org|jobset\.sigs\.k8s\.io|batch\.kubernetes\.io|kueue\.x-k8s\.io)/.*"
)
_FIELDS = {"cpu": "cpus_per_node", "memory": "memory_gib_per_node", "nvidia.com/gpu": "gpus_per_node"}
_MIB = {"Mi": 1, "Gi": 1024}
_SMALL = "small letters a-z, digits and hyphens, with dots between such words"


def _is_domain(text: str) -> bool:
    return bool(re.fullmatch(_DOMAIN, text)) and len(text) <= _LONGEST_DOMAIN


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
        if amount and int(amount[1]) * _MIB[amount[2]] % size == 0:
            return None
        return f"{name}: '{value}' is no multiple of its page size; write an amount as 512Mi or 2Gi"
    of_kubernetes = name.split("/")[0].endswith("kubernetes.io") and "deviceclass" not in name
    if not _EXTENDED.fullmatch(name) or of_kubernetes or name.startswith("requests."):
        return f"'{name}' is no device's resource; write domain/name as rdma/hca_shared, or hugepages-2Mi"
    if not _COUNT.fullmatch(value):
        return f"{name}: '{value}' is no number of devices; write a whole number from 1"
    return None


def _device_class(name: str, _: str) -> str | None:
    return None if _is_domain(name) else f"'{name}' cannot name a device class; write {_SMALL}"


def _limit(name: str, value: str) -> str | None:
    if name == "nofile" and int(value) == UNLIMITED:
        return "nofile: the kernel refuses -1, and no worker would start; write a number, such as 1048576"
    return None


def _together(devices: Mapping[str, int]) -> Mapping[str, int]:
    if (count := sum(devices.values())) > MOST_DEVICES:
        raise ValueError(f"{count} devices; a pod's claim can hold {MOST_DEVICES}, ask for no more")
    return devices


def _as_text(amounts: object) -> object:
    """What is neither a number nor a text gets one answer, not one for each of the two."""
    if not isinstance(amounts, Mapping):
        return amounts
    return {name: value if isinstance(value, int | str) else str(value) for name, value in amounts.items()}


def _name(longest: int) -> BeforeValidator:
    """State the rule of an object's name in words; patterns and lengths of fields are for the schema."""

    def validate(value: object) -> object:
        if isinstance(value, str) and (not _is_domain(value) or len(value) > longest):
            raise ValueError(f"'{value}' cannot be a name here; write {_SMALL}, at most {longest} characters")
        return value

    return BeforeValidator(validate)


def _label_key(value: object) -> object:
    if isinstance(value, str) and not _KEY.fullmatch(value):
        raise ValueError(f"'{value}' cannot be a node's label; write name or domain/name, as in kubernetes.io/hostname")
    return value


Environment = Annotated[dict[str, str], _each(_variable)]
Labels = Annotated[dict[str, str], _each(_label)]
Annotations = Annotated[dict[str, str], _each(_metadata)]
Resources = Annotated[dict[str, int | str], _each(_resource), BeforeValidator(_as_text)]
Devices = Annotated[
    dict[str, Annotated[int, Field(ge=1, le=MOST_DEVICES)]], _each(_device_class), AfterValidator(_together)
]
Ulimits = Annotated[
    dict[
        Literal["memlock", "nofile", "nproc", "stack", "core"], Annotated[int, Field(ge=UNLIMITED, le=MOST_OF_A_LIMIT)]
    ],
    _each(_limit),
]
SecretName = Annotated[str, Field(pattern=rf"^{_DOMAIN}$", max_length=_LONGEST_DOMAIN), _name(_LONGEST_DOMAIN)]
# Names that the job carries as values of labels.
LabelledName = Annotated[str, Field(pattern=rf"^{_DOMAIN}$", max_length=_LONGEST_LABEL), _name(_LONGEST_LABEL)]
NodeLabel = Annotated[str, Field(pattern=rf"^{_KEY.pattern}$"), BeforeValidator(_label_key)]


class SpreadSpec(Spec):
    """How the workers are spread over the values of a node label, such as hosts, racks or zones.

    Between two of these values the numbers of workers differ by `max_skew` at most; `required: false` only prefers it.
    """

    topology_key: NodeLabel = "kubernetes.io/hostname"
    max_skew: Count = 1
    required: bool = False
