"""Operations with more than one implementation, and the one place that chooses among them.

Every operation has a `reference` backend, plain torch that reads like its definition, portable ones in plain torch, and
kernels: packages, or parts of torch, whose code on a GPU is not what runs on a CPU. All are compared with the reference
(forward, backward, ragged documents, an empty expert) and the outcome is kept as records (`trainer.parity`).

`resolve` chooses once, at build time, and gives a reason. `auto` takes the fastest backend that a record proves for
this device class, number format and version; without one the fastest portable backend, called unproven. A backend
that was named explicitly and cannot run is an error, never a silent fallback.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from trainer import parity
from trainer.errors import SpecError
from trainer.modelspec import ModelSpec
from trainer.ops import (
    add_norm_triton,
    attention_flash_attn_3,
    attention_flash_attn_4,
    attention_varlen,
    conv_causal_conv1d,
    engram_triton,
    experts_quack,
    experts_te,
    experts_triton,
    orthogonalise_quack,
    router_triton,
    ssd_mamba_ssm,
)
from trainer.ops.add_norm import add_norm_reference, add_norm_torch
from trainer.ops.attention import attention_reference, attention_sdpa
from trainer.ops.conv import conv_reference, conv_torch
from trainer.ops.documents import Documents
from trainer.ops.engram import engram_reference, engram_torch
from trainer.ops.experts import experts_reference
from trainer.ops.experts_grouped import experts_grouped
from trainer.ops.experts_grouped import unsupported as grouped_unsupported
from trainer.ops.orthogonalise import orthogonalise_
from trainer.ops.router import router_reference, router_torch
from trainer.ops.setting import Setting
from trainer.ops.ssd import ssd_chunked, ssd_reference
from trainer.spec import BackendsSpec

__all__ = [
    "OPS",
    "Backend",
    "Choice",
    "Documents",
    "Op",
    "Setting",
    "Verdict",
    "best",
    "functions",
    "resolve",
    "say",
    "survey",
]

log = logging.getLogger(__name__)


def _runs_anywhere(setting: Setting) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        unsupported: None when it can run in a setting, else the reason why not.
        package: the distribution whose version a parity record names.
        portable: plain torch, which may run unproven if nothing is proven.
        adds: whether experts have the argument `adds`, by which gradients of weights are added in the product.
        offered: whether the extra `cuda` has the package; one that has to be built by hand is not missed.
    """

    function: Callable[..., Any]
    why: str
    unsupported: Callable[[Setting], str | None] = _runs_anywhere
    package: str = "torch"
    portable: bool = True
    adds: bool = False
    offered: bool = True


@dataclass(frozen=True)
class Op:
    """Implementations of one operation by name, the fastest first, `reference` last."""

    name: str
    backends: dict[str, Backend]


class Choice(NamedTuple):
    name: str
    reason: str
    proven: bool

    @property
    def label(self) -> str:
        """For metrics: the name, marked when no parity record stands behind it."""
        return self.name if self.proven else f"{self.name} (unproven)"


class Verdict(NamedTuple):
    """The verdict on a backend: why it cannot run, and why it is unproven; None for no problem."""

    problem: str | None
    doubt: str | None


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "ssd",
            {
                "mamba_ssm": Backend(
                    ssd_mamba_ssm.ssd_mamba_ssm,
                    "Triton kernels of mamba_ssm",
                    ssd_mamba_ssm.unsupported,
                    package="mamba_ssm",
                    portable=False,
                ),
                "chunked": Backend(ssd_chunked, "matrix products within chunks, one state per chunk"),
                "reference": Backend(ssd_reference, "recurrence over positions"),
            },
        ),
        Op(
            "conv",
            {
                "causal_conv1d": Backend(
                    conv_causal_conv1d.conv_causal_conv1d,
                    "CUDA kernels of causal_conv1d",
                    conv_causal_conv1d.unsupported,
                    package="causal_conv1d",
                    portable=False,
                ),
                "torch": Backend(conv_torch, "shifted multiply-adds with a hand-written backward"),
                "reference": Backend(conv_reference, "loop over positions"),
            },
        ),
        Op(
            "attention",
            {
                "flash_attn_3": Backend(
                    attention_flash_attn_3.attention_flash_attn_3,
                    "FlashAttention by document, package flash_attn_3",
                    attention_flash_attn_3.unsupported,
                    package=attention_flash_attn_3.PACKAGE,
                    portable=False,
                    offered=False,
                ),
                "flash_attn_4": Backend(
                    attention_flash_attn_4.attention_flash_attn_4,
                    "FlashAttention by document, package flash-attn-4",
                    attention_flash_attn_4.unsupported,
                    package=attention_flash_attn_4.PACKAGE,
                    portable=False,
                ),
                "flash_attn": Backend(
                    attention_varlen.attention_flash_attn,
                    "FlashAttention by document, package flash_attn",
                    attention_varlen.flash_attn_unsupported,
                    package="flash_attn",
                    portable=False,
                ),
                "varlen": Backend(
                    attention_varlen.attention_varlen,
                    "FlashAttention by document, torch's own",
                    attention_varlen.varlen_unsupported,
                    portable=False,
                ),
                "sdpa": Backend(attention_sdpa, "torch scaled_dot_product_attention with a document mask"),
                "reference": Backend(attention_reference, "explicit softmax"),
            },
        ),
        Op(
            "experts",
            {
                "quack": Backend(
                    experts_quack.experts_quack,
                    "products of quack-kernels: tokens gathered, squared ReLU in the epilogue",
                    experts_quack.unsupported,
                    package="quack-kernels",
                    portable=False,
                ),
                "triton": Backend(
                    experts_triton.experts_triton,
                    "Triton kernels of our own: tokens gathered, activated and weighted inside grouped products",
                    experts_triton.unsupported,
                    package="triton",
                    portable=False,
                    adds=True,
                ),
                "grouped": Backend(
                    experts_grouped, "tokens sorted by expert, grouped matrix products", grouped_unsupported
                ),
                "te": Backend(
                    experts_te.experts_te,
                    "GroupedLinear of Transformer Engine",
                    experts_te.unsupported,
                    package="transformer_engine",
                    portable=False,
                ),
                "reference": Backend(experts_reference, "loop over experts"),
            },
        ),
        Op(
            "add_norm",
            {
                "triton": Backend(
                    add_norm_triton.add_norm_triton,
                    "residual addition and norm in one Triton kernel",
                    add_norm_triton.unsupported,
                    package="triton",
                    portable=False,
                ),
                "torch": Backend(add_norm_torch, "an addition, then a norm with a hand-written backward"),
                "reference": Backend(add_norm_reference, "the definition"),
            },
        ),
        Op(
            "orthogonalise",
            {
                "quack": Backend(
                    orthogonalise_quack.orthogonalise_quack,
                    "symmetric products of quack, for shapes for which they are the faster ones",
                    orthogonalise_quack.unsupported,
                    package="quack-kernels",
                    portable=False,
                ),
                "reference": Backend(orthogonalise_, "batched products of torch"),
            },
        ),
        Op(
            "router",
            {
                "triton": Backend(
                    router_triton.router_triton,
                    "scores, choice, weights and load in one Triton kernel",
                    router_triton.unsupported,
                    package="triton",
                    portable=False,
                ),
                "torch": Backend(router_torch, "torch's top-k, and a dozen small operations"),
                "reference": Backend(router_reference, "one expert after the other"),
            },
        ),
        Op(
            "engram",
            {
                "triton": Backend(
                    engram_triton.engram_triton,
                    "n-grams hashed, their rows found and cast in one Triton kernel",
                    engram_triton.unsupported,
                    package="triton",
                    portable=False,
                ),
                "torch": Backend(engram_torch, "the hash in single operations, torch's embedding"),
                "reference": Backend(engram_reference, "one table after the other"),
            },
        ),
    )
}


def resolve(
    backends: BackendsSpec,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    model: ModelSpec | None = None,
) -> dict[str, Choice]:
    """The backend of each operation, with the reason.

    Args:
        dtype: of the activations, that is of autocast where it is on.
        model: its widths rule out some kernels; None skips these checks.

    Raises:
        SpecError: a backend named explicitly cannot run in this setting.
    """
    setting = Setting(torch.device(device), dtype, model)
    choices = {}
    for op in OPS.values():
        wanted = getattr(backends, op.name)
        if wanted == "auto":
            choices[op.name] = best(op.name, setting.device, partial(_verdict, op.name, setting))
            continue
        problem = op.backends[wanted].unsupported(setting)
        if problem is not None:
            raise SpecError(
                f"train.backends.{op.name}: '{wanted}' cannot run on {setting.device.type}: {problem}; use 'auto'"
            )
        proven = _proven(op.name, wanted, setting)
        reason = "named in the spec" if proven else f"named in the spec; {_unproven(op.name, wanted, setting)}"
        choices[op.name] = Choice(wanted, reason, proven)
    return choices


def survey(op: str, setting: Setting) -> dict[str, Verdict]:
    """The verdict on every backend of an operation; imports the packages of all."""
    return {name: _verdict(op, setting, name) for name in OPS[op].backends}


def _verdict(op: str, setting: Setting, name: str) -> Verdict:
    problem = OPS[op].backends[name].unsupported(setting)
    return Verdict(problem, None if problem or _proven(op, name, setting) else _unproven(op, name, setting))


def best(op: str, device: torch.device, verdict: Callable[[str], Verdict]) -> Choice:
    """The fastest proven backend, else the fastest portable one, else the reference."""
    backends, passed_over, portable, doubt = OPS[op].backends, [], None, None
    for name, backend in backends.items():
        if name == "reference" and portable:
            break
        said = verdict(name)
        if said.problem is not None:
            passed_over.append(f"not {name}: {said.problem}")
        elif said.doubt is None:
            return Choice(name, "; ".join([backend.why, *passed_over]), proven=True)
        elif backend.portable and portable is None:
            portable, doubt = name, said.doubt
        elif not backend.portable:
            passed_over.append(f"not {name}: {said.doubt}")
    assert portable is not None, f"operation {op} has no backend that runs on {device.type}"
    return Choice(portable, "; ".join([backends[portable].why, f"portable, {doubt}", *passed_over]), proven=False)


def _proven(op: str, name: str, setting: Setting) -> bool:
    """Whether a record proves a backend; the reference needs none."""
    if name == "reference":
        return True
    version = parity.package_version(OPS[op].backends[name].package)
    return parity.proven(op, name, setting.variant, setting.device_class, version)


def _unproven(op: str, name: str, setting: Setting) -> str:
    package = OPS[op].backends[name].package
    version = parity.package_version(package)
    where = f"in {setting.variant} on {setting.device_class} with {package} {version}"
    if outcome := parity.failure(op, name, setting.variant, setting.device_class, version):
        return f"wrong {where}: {outcome}"
    return f"unproven {where}; run benchmarks/parity.py"


def functions(choices: dict[str, Choice]) -> dict[str, Callable[..., Any]]:
    """The chosen implementations, by operation."""
    return {name: OPS[name].backends[choice.name].function for name, choice in choices.items()}


def say(choices: dict[str, Choice]) -> None:
    """Log the choices and their reasons."""
    for name, choice in choices.items():
        log.info("operation %s: %s (%s)", name, choice.name, choice.reason)
