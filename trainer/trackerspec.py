"""Where a run's numbers are also sent: the section `train.trackers`. It holds no keys. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from trainer.specbase import Spec

TrackerName = Literal["wandb", "mlflow", "langfuse"]
# The variables from which each client reads its keys; a set of them that is complete suffices.
KEYS: dict[TrackerName, tuple[tuple[str, ...], ...]] = {
    "wandb": (("WANDB_API_KEY",),),
    "mlflow": (("MLFLOW_TRACKING_TOKEN",), ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")),
    "langfuse": (("LANGFUSE_PUBLIC_KEY", "LANGFUSE_SECRET_KEY"),),
}
LANGFUSE_HOST = "LANGFUSE_HOST"  # may stand beside the keys


def variables_of(name: TrackerName) -> list[str]:
    """All variables that a tracker's Secret may have."""
    names = [variable for complete in KEYS[name] for variable in complete]
    return [*names, LANGFUSE_HOST] if name == "langfuse" else names


def _is_address(text: str) -> str:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError(f"'{text}' is no address; write http(s)://host or http(s)://host:port") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "an address with a user's name or password in it; who may read the job reads it: remove it, and put the "
            "keys into the variables that docs/trackers.md lists"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"'{text}' is no address; write http(s)://host or http(s)://host:port")
    if parts.query or parts.fragment:
        raise ValueError("an address with ? or # in it, which may hold a key; write only http(s)://host/path")
    return text.rstrip("/")


def _is_word(text: str) -> str:
    if bad := next((each for each in text if each in "/\\#?%:" or not each.isprintable()), None):
        raise ValueError(f"'{text}' cannot be a name there, because of {bad!r}; write letters, digits, - _ .")
    return text


Address = Annotated[str, Field(min_length=1), AfterValidator(_is_address)]
Word = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_is_word)]


class WandbSpec(Spec):
    """Weights & Biases: its `project`, the `entity` (user or team; None: the key's own), a server other than its cloud.

    Without WANDB_API_KEY the run is recorded offline, in its directory, for `wandb sync`.
    """

    project: Word
    entity: Word | None = None
    host: Address | None = None


class MlflowSpec(Spec):
    """MLflow: the address of its tracking server, and the experiment there, which is made if it does not exist.

    A server with access control takes MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD.
    """

    tracking_uri: Address
    experiment: Annotated[str, Field(min_length=1, max_length=250)] = "yaongi"


class LangfuseSpec(Spec):
    """Langfuse, which gets only events; None is the address in LANGFUSE_HOST, else its cloud.

    Its keys are LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY.
    """

    host: Address | None = None


class TrackersSpec(Spec):
    """Trackers of experiments besides TensorBoard's files; each that has a section is used. See docs/trackers.md."""

    wandb: WandbSpec | None = None
    mlflow: MlflowSpec | None = None
    langfuse: LangfuseSpec | None = None

    @property
    def ports(self) -> set[int]:
        """The ports of their servers, by the spec."""
        hosts = (
            self.wandb.host if self.wandb else None,
            self.mlflow.tracking_uri if self.mlflow else None,
            self.langfuse.host if self.langfuse else None,
        )
        parts = [urlsplit(host) for host in hosts if host]
        return {part.port or (443 if part.scheme == "https" else 80) for part in parts}

    @property
    def names(self) -> list[TrackerName]:
        """Those that are used."""
        return [name for name in KEYS if getattr(self, name) is not None]
