"""Environment variables of workers: those that are set by us or an operator, and those that hold a secret."""

from __future__ import annotations

import re

from trainer.process.failures import NODE_VARIABLE

# The training operator 1.9 appends these after the user's, or leaves them to torchrun, which sets them per rank.
OPERATORS = re.compile(
    r"PET_(MASTER_ADDR|MASTER_PORT|NODE_RANK|NPROC_PER_NODE|NNODES|RDZV_BACKEND|RDZV_ENDPOINT|RDZV_ID|RDZV_CONF|"
    r"MAX_RESTARTS|STANDALONE)|MASTER_ADDR|MASTER_PORT|WORLD_SIZE|RANK"
)
# What else torchrun and Kubeflow Trainer set, and what our pods are rendered with: manifests/objects.py.
_SET = re.compile(
    r"PET_\w+|(LOCAL|GROUP|ROLE)_(RANK|WORLD_SIZE|NAME)|GROUP_WORLD_SIZE|TORCHELASTIC_\w+|KUBEFLOW_\w+|"
    r"JOB_COMPLETION_INDEX|YAONGI_\w+|OMP_NUM_THREADS|HOME|TMPDIR|XDG_CACHE_HOME|TORCHINDUCTOR_CACHE_DIR|"
    rf"TRITON_CACHE_DIR|HF_HOME|HF_TOKEN|LANGFUSE_(PUBLIC_KEY|SECRET_KEY|HOST)|"
    rf"MLFLOW_TRACKING_USERNAME|{NODE_VARIABLE}"
)
_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|SECRETS|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?)$"
)
# Names about tokenizer tokens and token counts, which are not secrets.
_NO_SECRET = re.compile(
    r"(^|_)(BOS|EOS|PAD|UNK|SEP|CLS|MASK|MAX|MIN|NUM|NEW|PER|SPECIAL|START|END|STOP|BEGIN|IMAGE|AUDIO|VIDEO|PREFIX|SUFFIX|"
    r"MIDDLE|EOD|EOT|EOM|SYSTEM|USER|ASSISTANT|INPUT|OUTPUT|ADD|USE|NO)_TOKEN$"
)
_NO_SECRET_VALUE = re.compile(r"[0-9.]{1,9}|true|false|yes|no|none|null|<[^>]*>|\[[^]]*\]|\*+|x{3,}", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|glpat-[\w-]{20,}|"
    r"sk-[A-Za-z0-9_-]{20,}|xox[abp]-[\w-]{10,})|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def is_set(name: str) -> bool:
    """Whether a worker has the variable already, from us, torchrun or an operator."""
    return bool(OPERATORS.fullmatch(name) or _SET.fullmatch(name))


def is_secret(name: str, value: str) -> bool:
    """Whether name or value tell that the value is a secret in plain text, not a path or a reference to one."""
    by_name = _SECRET_NAME.search(name.upper()) and not _NO_SECRET.search(name.upper())
    literal = value and not value.startswith(("/", "$", "{{", "file:")) and not _NO_SECRET_VALUE.fullmatch(value)
    return bool(literal and (by_name or looks_secret(value)))


def looks_secret(text: str) -> bool:
    """Whether a text contains a token of a known form."""
    return bool(_SECRET_VALUE.search(text))
