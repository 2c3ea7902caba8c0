"""The child process of a proof with an attention that leaves the GPU unusable for its process."""

from __future__ import annotations

import torch

from trainer.ops import OPS, Backend
from trainer.ops.attention import attention_sdpa
from trainer.proof import child


def asserts(q: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
    beyond = torch.full((1,), q.shape[0] + 99, device=q.device)
    return attention_sdpa(q, *arguments) + q[beyond].sum()


BROKEN = {"asserts": Backend(asserts, "an index beyond the end", portable=False)}

if __name__ == "__main__":
    OPS["attention"].backends.update(BROKEN)
    child.main()
