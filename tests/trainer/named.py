"""Bare parameters with the names of a model with every kind of layer, and the expected optimizer of each."""

import torch
from torch import nn

from trainer.modelspec import ModelSpec

MODEL = ModelSpec.model_validate(
    {
        "vocab_size": 32,
        "hidden": 16,
        "layers": ["ME", "*-", "N"],
        "mamba": {"num_heads": 2, "head_dim": 8, "d_state": 4},
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
        "moe": {"num_experts": 3, "top_k": 2, "expert_width": 8, "shared_width": 8},
        "mlp": {"width": 24},
        "engram": [{"layer": 2, "rows_per_head": 10, "width_per_order": 8, "num_heads": 2}],
    }
)

DECODER = ModelSpec.model_validate(
    {
        "vocab_size": 32,
        "hidden": 16,
        "layers": ["*-", "*E"],
        "attention": {
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "rope_theta": 1e4,
            "qk_norm": True,
            "bias": True,
        },
        "mlp": {"width": 24, "activation": "swiglu", "bias": True},
        "moe": {"num_experts": 4, "top_k": 2, "expert_width": 12, "shared_width": 8, "activation": "swiglu"}
        | {"scores": "softmax", "score_scale": 1.0, "balance_loss_weight": 0.01},
        "tied_embedding": True,
    }
)

# name → (shape, optimizer, number of Muon blocks, rate factor, decay), written by hand.
EXPECTED = {
    "embedding.weight": ((32, 16), "adamw", 0, 1, True),
    "head.weight": ((32, 16), "adamw", 0, 1, True),
    "final_norm.weight": ((16,), "adamw", 0, 1, False),
    "layers.0.0.norm.weight": ((16,), "adamw", 0, 1, False),
    "layers.0.0.mixer.zxbc_proj.weight": ((40, 16), "muon", 4, 1, True),
    "layers.0.0.mixer.dt_proj.weight": ((2, 16), "muon", 1, 1, True),
    "layers.0.0.mixer.conv.weight": ((24, 4), "adamw", 0, 1, True),
    "layers.0.0.mixer.conv.bias": ((24,), "adamw", 0, 1, False),
    "layers.0.0.mixer.A_log": ((2,), "adamw", 0, 1, False),
    "layers.0.0.mixer.D": ((2,), "adamw", 0, 1, False),
    "layers.0.0.mixer.dt_bias": ((2,), "adamw", 0, 1, False),
    "layers.0.0.mixer.norm.weight": ((16,), "adamw", 0, 1, False),
    "layers.0.0.mixer.out_proj.weight": ((16, 16), "muon", 1, 1, True),
    "layers.0.1.norm.weight": ((16,), "adamw", 0, 1, False),
    "layers.0.1.mixer.router.weight": ((3, 16), "muon", 1, 1, True),
    "layers.0.1.mixer.up_EFD": ((3, 8, 16), "muon", 3, 1, True),
    "layers.0.1.mixer.down_EDF": ((3, 16, 8), "muon", 3, 1, True),
    "layers.0.1.mixer.shared_up.weight": ((8, 16), "muon", 1, 1, True),
    "layers.0.1.mixer.shared_down.weight": ((16, 8), "muon", 1, 1, True),
    "layers.1.0.mixer.q_proj.weight": ((16, 16), "muon", 4, 1, True),
    "layers.1.0.mixer.k_proj.weight": ((8, 16), "muon", 2, 1, True),
    "layers.1.0.mixer.v_proj.weight": ((8, 16), "muon", 2, 1, True),
    "layers.1.0.mixer.o_proj.weight": ((16, 16), "muon", 1, 1, True),
    "layers.1.1.mixer.up.weight": ((24, 16), "muon", 1, 1, True),
    "layers.1.1.mixer.down.weight": ((16, 24), "muon", 1, 1, True),
    "layers.2.0.mixer.tables.weight": ((44, 4), "adamw", 0, 5, False),
    "layers.2.0.mixer.key_proj.weight": ((16, 16), "muon", 1, 1, True),
    "layers.2.0.mixer.value_proj.weight": ((16, 16), "muon", 1, 1, True),
    "layers.2.0.mixer.key_norm.weight": ((16,), "adamw", 0, 1, False),
    "layers.2.0.mixer.query_norm.weight": ((16,), "adamw", 0, 1, False),
    "layers.2.0.mixer.conv_norm.weight": ((16,), "adamw", 0, 1, False),
    "layers.2.0.mixer.conv.weight": ((16, 4), "adamw", 0, 1, True),
}

OF_DECODER = {
    "embedding.weight": ((32, 16), "adamw", 0, 1, True),
    "final_norm.weight": ((16,), "adamw", 0, 1, False),
    "layers.0.0.norm.weight": ((16,), "adamw", 0, 1, False),
    "layers.0.0.mixer.q_proj.weight": ((32, 16), "muon", 4, 1, True),
    "layers.0.0.mixer.q_proj.bias": ((32,), "adamw", 0, 1, False),
    "layers.0.0.mixer.k_proj.weight": ((16, 16), "muon", 2, 1, True),
    "layers.0.0.mixer.k_proj.bias": ((16,), "adamw", 0, 1, False),
    "layers.0.0.mixer.v_proj.weight": ((16, 16), "muon", 2, 1, True),
    "layers.0.0.mixer.v_proj.bias": ((16,), "adamw", 0, 1, False),
    "layers.0.0.mixer.o_proj.weight": ((16, 32), "muon", 1, 1, True),
    "layers.0.0.mixer.o_proj.bias": ((16,), "adamw", 0, 1, False),
    "layers.0.0.mixer.q_norm.weight": ((8,), "adamw", 0, 1, False),
    "layers.0.0.mixer.k_norm.weight": ((8,), "adamw", 0, 1, False),
    "layers.0.1.norm.weight": ((16,), "adamw", 0, 1, False),
    "layers.0.1.mixer.gate_up.weight": ((48, 16), "muon", 2, 1, True),
    "layers.0.1.mixer.gate_up.bias": ((48,), "adamw", 0, 1, False),
    "layers.0.1.mixer.down.weight": ((16, 24), "muon", 1, 1, True),
    "layers.0.1.mixer.down.bias": ((16,), "adamw", 0, 1, False),
    "layers.1.1.norm.weight": ((16,), "adamw", 0, 1, False),
    "layers.1.1.mixer.router.weight": ((4, 16), "muon", 1, 1, True),
    "layers.1.1.mixer.gate_up_EGD": ((4, 24, 16), "muon", 8, 1, True),
    "layers.1.1.mixer.down_EDF": ((4, 16, 12), "muon", 4, 1, True),
    "layers.1.1.mixer.shared_gate_up.weight": ((16, 16), "muon", 2, 1, True),
    "layers.1.1.mixer.shared_down.weight": ((16, 8), "muon", 1, 1, True),
}


class Named(nn.Module):
    """Bare parameters under dotted names, with gradients."""

    def __init__(self, shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, nn.Parameter(torch.randn(shape, generator=generator)))

    def fill_gradients(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
