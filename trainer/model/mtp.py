"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437 §2.2): modules in a chain, each looking one token further.

Module k takes the hidden state of module k - 1 (for k = 1 the model's, before its final norm) and the token k places
ahead, and predicts the next token after that:

    h^k_t = layer(W [norm(h^{k-1}_t) ; norm(embedding(x_{t+k}))])        p(x_{t+k+1}) = softmax(head(norm(h^k_t)))

Embedding and head are the model's own. The modules only train: evaluation and generation do not run them. Nothing is
taken from another document: where t + k lies in one, token 0 stands in and there is no label.

Legend: B rows, T positions, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.linear import Linear
from trainer.model.norm import RMSNorm
from trainer.ops import Documents


class MtpModule(nn.Module):
    def __init__(self, hidden: int, norm_eps: float, layer: nn.Module) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(hidden, norm_eps)
        self.token_norm = RMSNorm(hidden, norm_eps)
        self.proj = Linear(2 * hidden, hidden)
        self.layer = layer
        self.head_norm = RMSNorm(hidden, norm_eps)

    def forward(
        self, h_BTD: Tensor, token_BTD: Tensor, ids_BT: Tensor, documents: Documents
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns its layer's output: the hidden state (for the next module and the head's norm), router loss,
        loads."""
        both_BT2D = torch.cat([self.hidden_norm(h_BTD), self.token_norm(token_BTD)], dim=-1)
        return self.layer(self.proj(both_BT2D), ids_BT, documents)


def ahead(values_BT: Tensor, places: int, documents: Documents, fill: int) -> Tensor:
    """values[t + places] where that position exists and belongs to the document of t, else `fill`."""
    same_BT = documents.same_BT(places).roll(-places, dims=1)
    return torch.where(same_BT, values_BT.roll(-places, dims=1), fill)
