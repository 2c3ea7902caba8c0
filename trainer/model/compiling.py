"""torch.compile by layer: layers of one kind share their code, so that a model of any depth compiles a few of them.

Embedding, final norm and the cross-entropy stay as they are; so do what depends on the data in number, documents and
their masks, which are made before the first layer (`HybridModel._documents`).
"""

from __future__ import annotations

import torch
from torch import nn

from trainer.model.hybrid import HybridModel, Layer


def compile_layers(model: HybridModel, *, whole: bool = False, backend: str = "inductor") -> None:
    """Compile each layer at its first call.

    Args:
        whole: refuse a layer that cannot be compiled as one graph, instead of running parts of it as they are.
        backend: of torch.compile.
    """
    for layer in layers_of(model):
        # Not layer.compile(), which would take hooks of the layer, such as FSDP's, into the graph.
        layer.forward = torch.compile(layer.forward, fullgraph=whole, backend=backend)


def layers_of(model: nn.Module) -> list[Layer]:
    """All layers, those of multi-token prediction included."""
    return [module for module in model.modules() if isinstance(module, Layer)]
