"""torch.compile by layer: layers of one kind share compiled code, so a model of any depth compiles only a few.

Embedding, final norm and the cross-entropy stay as they are; so do what depends on the data in number, documents and
their masks, which are made before the first layer (`HybridModel.prepared`).
"""

from __future__ import annotations

from functools import cache

import torch
import torch._functorch.config
from torch import nn

from trainer.model.hybrid import HybridModel, Layer


def compile_layers(model: HybridModel, *, whole: bool = False, backend: str = "inductor") -> None:
    """Compile each layer at its first call.

    Args:
        whole: refuse a layer that cannot be compiled as one graph, instead of running parts of it as they are.
        backend: of torch.compile.
    """
    # Gradients are computed outside of autocast, as without a compiler: FP32 products have FP32 gradients.
    torch._functorch.config.backward_pass_autocast = "off"
    if torch.are_deterministic_algorithms_enabled():  # perhaps not known to the compiler, see trainer/distributed.py
        torch.use_deterministic_algorithms(True, warn_only=torch.is_deterministic_algorithms_warn_only_enabled())
    if backend == "inductor":
        _keep_mutations_in_order()
    for layer in layers_of(model):
        # Not layer.compile(), which would take hooks of the layer, such as FSDP's, into the graph.
        compiled = torch.compile(layer.forward, fullgraph=whole, backend=backend)
        layer.forward = compiled  # type: ignore[method-assign]  # of this layer alone


def layers_of(model: nn.Module) -> list[Layer]:
    """All layers, those of multi-token prediction included."""
    return [module for module in model.modules() if isinstance(module, Layer)]


@cache
def _keep_mutations_in_order() -> None:
    """Fix torch's C++ code generator, which may read a buffer before a scatter into it.

    When torch (up to at least 2.13; pull request 185873 of pytorch/pytorch) fuses loops of different rank, it derives
    again what a node reads, and loses that a read must see the buffer after a mutation. The node is then fused with the
    one that fills the buffer with zeros, before the scatter: this lost the gradient of the chosen scores, and so that
    of the router. GPU code is generated differently. Applying the fix twice is harmless.
    """
    from torch._inductor.scheduler import SchedulerNode

    derive_anew = SchedulerNode.recompute_size_and_body

    def recompute_size_and_body(node: SchedulerNode, *args: object, **kwargs: object) -> None:
        derive_anew(node, *args, **kwargs)
        node.set_read_writes(node.read_writes.rename(node.mutation_renames))

    SchedulerNode.recompute_size_and_body = recompute_size_and_body
    # Caches on disk may have code from before the fix; the tag is part of their keys.
    torch.compiler.config.cache_key_tag += "mutations-in-order"
