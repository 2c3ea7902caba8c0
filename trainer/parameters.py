"""All parameters of a model in order: name, shape and properties. Imports no torch.

`trainer.model.hybrid` builds exactly these (a test compares them). A parameter that is not described here is an error,
because a silent default would initialise or train it wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from trainer.kinds.base import Kind, Parameter, matrix, table, vector
from trainer.lora import adapters, plain
from trainer.modelspec import ModelSpec

LM_HEAD = "LM head: its logits are the loss"


def parameters(spec: ModelSpec) -> list[Parameter]:
    """Embedding, sublayers, final norm, head, and the modules of multi-token prediction."""
    frozen = spec.lora is not None
    embedding = head(spec) if spec.tied_embedding else table("embedding.weight", spec.vocab_size, spec.hidden)
    found = [replace(embedding, frozen=frozen)]
    for place, section in spec.trunk():
        found += sublayer_parameters(spec, section, f"layers.{place}.")
    found.append(replace(vector("final_norm.weight", spec.hidden), frozen=frozen))
    if not spec.tied_embedding:
        found.append(head(spec))
    for number in range(spec.mtp.depth if spec.mtp else 0):
        found += mtp_parameters(spec, number)
    return found


def unknown_parameter(name: str) -> str:
    """What to say of a parameter that no kind names."""
    return f"no kind of layer has the parameter {name}; describe it in its file in trainer/kinds"


def head(spec: ModelSpec) -> Parameter:
    """The LM head. Its rows are embeddings of the next tokens, so AdamW trains it like the embedding; if the two are
    tied it has the embedding's name."""
    name = "embedding.weight" if spec.tied_embedding else "head.weight"
    shown = replace(table(name, spec.vocab_size, spec.hidden), multiplies=True)
    frozen = spec.lora is not None
    return replace(shown, active=math.prod(shown.shape), high_precision=LM_HEAD, frozen=frozen)


def sublayer_parameters(spec: ModelSpec, section: Kind, prefix: str) -> Iterator[Parameter]:
    """Norm and mixer of one sublayer."""
    if section.pre_norm:
        yield replace(vector(f"{prefix}norm.weight", spec.hidden), frozen=spec.lora is not None)
    for parameter in mixer_parameters(spec, section):
        yield replace(parameter, name=f"{prefix}mixer.{parameter.name}")


def mixer_parameters(spec: ModelSpec, section: Kind) -> Iterator[Parameter]:
    """The parameters of a mixer, with their names in it, each followed by its adapters."""
    if spec.lora is None:
        yield from section.parameters(spec)
        return
    field = spec.section_names[section.symbol]
    adapted = {p.name for p in section.adaptable(spec) if spec.lora.takes(field, plain(p.name))}
    for parameter in section.parameters(spec):
        yield replace(parameter, frozen=True)
        if parameter.name in adapted:
            yield from adapters(parameter, spec.lora.rank)


def mtp_parameters(spec: ModelSpec, number: int) -> Iterator[Parameter]:
    """Module `number` of multi-token prediction: its norms, its projection and its layer; the head is the model's."""
    assert spec.mtp is not None
    at = f"mtp.{number}."
    for name in ("hidden_norm", "token_norm", "head_norm"):
        yield vector(f"{at}{name}.weight", spec.hidden)
    yield matrix(f"{at}proj.weight", spec.hidden, 2 * spec.hidden)
    for place, symbol in enumerate(spec.mtp.layer):
        # Modules follow no layer of their kind, so their matrices are not stacked with those of another layer.
        for parameter in sublayer_parameters(spec, spec.section(symbol), f"{at}layer.{place}."):
            yield replace(parameter, teon=False)
