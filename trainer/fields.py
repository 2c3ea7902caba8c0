"""The fields of specs by the version that introduced them: the basis of digests, names and stored files.

A field of version 1 is always written. A later field is left out if it has its neutral value, which is the behaviour
before it existed. So a new optional field changes no digest and no name, a changed default of an old one does, and a
file without new features is readable by every version. A file's `spec_version` is the lowest version that knows all its
fields.

A new field needs no entry for this; it needs one in LATER before its default is ever changed, which a test checks.
Imports no torch.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

log = logging.getLogger(__name__)

SPEC_VERSION = 9  # the version of this code; version 1 wrote no number


class Later(NamedTuple):
    """The version that introduced a field, and the value at which it is left out."""

    version: int
    neutral: Any


FIELDS_1 = {
    name: frozenset(fields.split())
    for name, fields in {
        "MambaSpec": "num_heads head_dim d_state num_groups conv_kernel chunk_size",
        "AttentionSpec": "num_heads num_kv_heads head_dim rope_theta",
        "MoeSpec": "num_experts top_k expert_width shared_width score_scale bias_update_rate sequence_loss_weight",
        "MlpSpec": "width",
        "EngramSpec": "layer max_order rows_per_head width_per_order num_heads conv_kernel compress_tokens",
        "MtpSpec": "depth weight layer",
        "MupSpec": "base_hidden base_head_dim",
        "ModelSpec": "vocab_size hidden layers mamba attention moe mlp engram mtp mup norm_eps init_std",
        "MixSpec": "weight max_epochs",
        "StageSpec": "from_tokens weights seq_len",
        "TokensSpec": "shards tokenizer mix seq_len seed packing curriculum skip",
        "BatchSpec": "tokens_per_step micro_batch_rows",
        "MuonSpec": "learning_rate momentum nesterov weight_decay coefficients steps teon_layers",
        "AdamWSpec": "learning_rate beta1 beta2 eps weight_decay engram_rate_factor",
        "SpikeGuardSpec": "sigmas window",
        "OptimizerSpec": "name muon adamw state_dtype clip_norm spike_guard",
        "ScheduleSpec": "name warmup_fraction warmup_shape decay_fraction decay_shape final_learning_rate",
        "Fp8Spec": "recipe format implementation amax_history_steps margin bf16_end_layers",
        "PrecisionSpec": "dtype fp8",
        "CheckpointSpec": "every_steps keep_last asynchronous",
        "BackendsSpec": "ssd conv attention experts",
        "ParallelSpec": "data shard expert shard_optimizer",
        "PreflightSpec": "enabled min_read_mb_per_second min_write_mb_per_second min_link_gb_per_second "
        "min_shared_memory_gib max_clock_skew_seconds",
        "RuntimeSpec": "device compile activation_checkpointing log_every_steps metrics_port max_restarts preflight "
        "communication_timeout_seconds hang_timeout_seconds deadline_seconds",
        "ExportSpec": "dtype",  # since 5, always written
        "RecomputeSpec": "",  # came with version 9
        "EvaluateSpec": "max_tokens prompts sample_tokens temperature",
        "TrainSpec": "run run_dir steps seed model tokens batch optimizer schedule precision checkpoint backends "
        "parallel runtime evaluate",
        "FilesSource": "kind paths",
        "HubSource": "kind dataset config split revision files",
        "BlobsSpec": "url encoding_column workers",
        "TextSpec": "origin text_column template blobs",
        "SourceSpec": "origin text_column template blobs domain licence weight max_epochs synthetic available_tokens",
        "DataSpec": "sources heldout_fraction max_bytes_per_source max_synthetic_share",
        "HygieneSpec": "exact_duplicates evaluation ngram",
        "TokenizerSpec": "vocab_size sample_bytes",
        "ShardsSpec": "unit_bytes max_shard_bytes workers pods",
        "JobTrainSpec": "steps seq_len seed packing curriculum skip model batch optimizer schedule precision "
        "checkpoint backends parallel runtime evaluate",
        "StorageSpec": "datasets_dir checkpoints_dir datasets_pvc checkpoints_pvc",
        "TolerationSpec": "key operator value effect tolerationSeconds",
        "ClusterSpec": "target job nodes gpus_per_node gpu_memory_gib cpus_per_node memory_gib_per_node "
        "shared_memory_gib image image_pull_policy namespace queue priority_class node_selector tolerations "
        "queue_timeout_seconds start_timeout_seconds run_timeout_seconds ttl_seconds_after_finished grace_seconds",
        "ObservabilitySpec": "monitor_labels scrape_interval_seconds",
        "JobSpec": "name data hygiene tokenizer shards train storage cluster observability",
    }.items()
}
LATER: dict[str, dict[str, Later]] = {
    "JobTrainSpec": {
        "begun_with_steps": Later(2, None),
        "init_from": Later(5, None),
        "export": Later(5, None),
        "engine": Later(7, "yaongi"),
        "megatron": Later(7, None),
        "document_mask": Later(9, True),
        "trackers": Later(9, None),
    },
    "TokensSpec": {"document_mask": Later(9, True)},
    "TrainSpec": {
        "begun_with_steps": Later(2, None),
        "init_from": Later(5, None),
        "export": Later(5, None),
        "engine": Later(7, "yaongi"),
        "megatron": Later(7, None),
        "trackers": Later(9, None),
    },
    "JobSpec": {"tune": Later(5, None)},
    "StorageSpec": {"sources_dir": Later(2, None)},
    "ClusterSpec": {
        "queue_priority": Later(7, None),
        "topology": Later(7, None),
        "env": Later(7, {}),
        "labels": Later(7, {}),
        "annotations": Later(7, {}),
        "resources": Later(7, {}),
        "devices": Later(7, {}),
        "ulimits": Later(7, {}),
        "fabric": Later(7, "none"),
        "spread": Later(7, None),
        "hub_secret": Later(7, "huggingface"),
        "judge_secret": Later(7, "judge"),
        "langfuse_secret": Later(7, "langfuse-secrets"),
        "wandb_secret": Later(9, "wandb"),
        "mlflow_secret": Later(9, "mlflow"),
    },
    "PreflightSpec": {"fabric": Later(7, None)},
    "RuntimeSpec": {"prove": Later(8, True), "graphs": Later(8, "auto")},
    "RecomputeSpec": {"every": Later(9, None), "layers": Later(9, None), "budget_gib": Later(9, None)},
    "Fp8Spec": {"head": Later(8, None), "experts_from": Later(8, None)},
    "BackendsSpec": {
        "add_norm": Later(8, "auto"),
        "orthogonalise": Later(8, "auto"),
        "router": Later(8, "auto"),
        "engram": Later(8, "auto"),
    },
    "ExportSpec": {"initial": Later(9, False), "checkpoints": Later(9, False), "folder": Later(9, None)},
    "EvaluateSpec": {
        "chat": Later(5, False),
        "every_steps": Later(6, None),
        "every_max_tokens": Later(6, 20_000),
        "gate": Later(6, []),
        "suites": Later(6, []),
        "tasks": Later(6, []),
        "task_files": Later(6, None),
        "limit": Later(6, None),
        "allow_code_execution": Later(6, False),
        "judge": Later(6, None),
    },
    "TuneSpec": {"gate": Later(6, [])},
    "TokenizerSpec": {"from": Later(5, None)},
    "DataSpec": {"begun_with_max_bytes": Later(3, None)},
    "AttentionSpec": {"rope_scaling": Later(4, None), "qk_norm": Later(4, False), "bias": Later(4, False)},
    "MlpSpec": {"activation": Later(4, "relu2"), "bias": Later(4, False)},
    "MoeSpec": {
        "balance_loss_weight": Later(4, 0.0),
        "scores": Later(4, "sigmoid"),
        "renormalise": Later(4, True),
        "activation": Later(4, "relu2"),
    },
    "ModelSpec": {"tied_embedding": Later(4, False), "lora": Later(5, None)},
    "SourceSpec": {"loss": Later(5, "all"), "order": Later(9, None)},
    "MixSpec": {"order": Later(9, None)},
    "HygieneSpec": {"near_duplicates": Later(9, None), "quality": Later(9, None)},
}
# The digest of raw text leaves out these fields of version 1 too, at these values.
RAW_DEFAULTS_1: dict[str, dict[str, Any]] = {
    "FilesSource": {"kind": "files"},
    "HubSource": {"kind": "hub", "config": None, "split": "train", "revision": "main", "files": []},
    "BlobsSpec": {
        "url": "https://softwareheritage.s3.amazonaws.com/content/{id}",
        "encoding_column": "src_encoding",
        "workers": 32,
    },
    "SourceSpec": {"text_column": None, "template": None, "blobs": None},
}


def stored(value: Any, without: frozenset[str] | set[str] = frozenset(), *, raw: bool = False) -> Any:
    """A spec as plain JSON values, without later fields at their neutral values.

    Args:
        without: fields of the outermost spec to leave out.
        raw: leave out RAW_DEFAULTS_1 as well.
    """
    if isinstance(value, BaseModel):
        return {
            name: stored(inner, raw=raw)
            for name, inner, since in _fields(value)
            if name not in without and not (inner == since.neutral if since else raw and _is_raw_default(value, name))
        }
    if isinstance(value, dict):
        return {key: stored(inner, raw=raw) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [stored(inner, raw=raw) for inner in value]
    return value


def version_of(value: Any) -> int:
    """The lowest version that knows all fields in `stored` of a spec."""
    if isinstance(value, BaseModel):
        written = [(inner, since) for _, inner, since in _fields(value) if not since or inner != since.neutral]
        return max([1, *(since.version for _, since in written if since), *(version_of(inner) for inner, _ in written)])
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return max([1, *map(version_of, inside)])


class Stored(BaseModel):
    """Base of stored records other than specs. Unknown fields of a later version are kept, so that a digest over all
    fields stays valid, but have no effect; `tell_unknown` warns about them."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)


def unknown_fields(record: BaseModel) -> list[str]:
    """Paths of fields unknown to this version; * stands for an index or key."""
    found = list(record.model_extra or ())
    for name in type(record).model_fields:
        value = getattr(record, name)
        if isinstance(value, BaseModel):
            found += [f"{name}.{inner}" for inner in unknown_fields(value)]
        elif isinstance(value, dict | list):
            items = value.values() if isinstance(value, dict) else value
            found += [f"{name}.*.{inner}" for one in items if isinstance(one, Stored) for inner in unknown_fields(one)]
    return list(dict.fromkeys(found))


def tell_unknown(record: BaseModel, where: str) -> None:
    """Warn once per file and process about fields of a later version, which are ignored."""
    if fields := unknown_fields(record):
        _warn_of(where, str(getattr(record, "code_version", "") or ""), ", ".join(fields))


@cache
def _warn_of(where: str, version: str, fields: str) -> None:
    writer = f"a later yaongi ({version})" if version else "a later yaongi"
    log.warning("%s: written by %s: %s unknown here, ignored", where, writer, fields)


def _fields(spec: BaseModel) -> list[tuple[str, Any, Later | None]]:
    """Yield name, value and, for later fields, the `Later` entry of each field."""
    kind = type(spec)
    known = FIELDS_1.get(kind.__name__, frozenset(kind.model_fields))
    later = LATER.get(kind.__name__, {})
    found = []
    for name, field in kind.model_fields.items():
        value = getattr(spec, name)
        # A section may say itself which version brought it, as kinds of layers do.
        version = getattr(value[0] if isinstance(value, list) and value else value, "since", SPEC_VERSION)
        since = later.get(name) or Later(version, field.get_default(call_default_factory=True))
        found.append((name, value, None if name in known else since))
    return found


def _is_raw_default(spec: BaseModel, name: str) -> bool:
    defaults = RAW_DEFAULTS_1.get(type(spec).__name__, {})
    return name in defaults and getattr(spec, name) == defaults[name]
