"""What μP (trainer/mup.py) achieves, on a CPU: the effect of a step at several widths, and the best rate of each width.

    OMP_NUM_THREADS=1 python benchmarks/mup.py [--widths 64 128 256] [--steps 40] [--plot docs/mup.png]

Left, the coordinate check: how far five steps move the last hidden state and the logits (root mean square). With μP the
lines are flat; without it they rise with the width, so a rate that works for a narrow model is too high for a wide one.
Right, the loss after `--steps` steps on Python sources of the standard library, by learning rate: with μP the best rate
stays the same. Wider models have more heads and wider experts and MLPs. Takes some minutes on an idle core.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.optim import build_optimizers, clip_gradients
from trainer.spec import OptimizerSpec

BASE = 64
RATES = [2.0**-exponent for exponent in (10, 9, 8, 7, 6, 5)]


def model_spec(width: int, *, with_mup: bool, base: int = BASE) -> ModelSpec:
    """Mamba-2, experts, attention and MLP; at width `base` both parametrisations are nearly the same."""
    times = width // 32
    return ModelSpec(
        vocab_size=256,
        hidden=width,
        layers=["ME", "*-"],
        mamba={"num_heads": 2 * times, "head_dim": 16, "d_state": 16, "chunk_size": 32},
        attention={"num_heads": 2 * times, "num_kv_heads": times, "head_dim": 16},
        moe={"num_experts": 8, "top_k": 2, "expert_width": width // 2},
        mlp={"width": 2 * width},
        mup={"base_hidden": base} if with_mup else None,
    )


def optimizer_spec(rate: float, name: str = "muon") -> OptimizerSpec:
    return OptimizerSpec.model_validate(
        {"name": name, "muon": {"learning_rate": rate}, "adamw": {"learning_rate": rate}, "clip_norm": None}
    )


def corpus(tokens: int) -> Tensor:
    """Sources of the standard library, as bytes."""
    text = b"\n".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40])
    return torch.frombuffer(bytearray(text[:tokens]), dtype=torch.uint8).long()


def batches(ids_N: Tensor, rows: int, length: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(ids_N) - length - 1, (rows, 1), generator=generator)
        window_BT = ids_N[starts + torch.arange(length + 1)]
        yield window_BT[:, :-1], window_BT[:, 1:]


def train(model: HybridModel, optimizer: OptimizerSpec, steps: int, rows: int = 4, length: int = 64) -> list[float]:
    """The loss of each step, at a constant learning rate."""
    optimizers = build_optimizers(model, optimizer, model.spec)
    losses = []
    for _, (ids_BT, labels_BT) in zip(range(steps), batches(corpus(200_000), rows, length, seed=0), strict=False):
        output = model(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32), labels_BT)
        (output.ce_sum / labels_BT.numel() + output.aux_sum / rows).backward()
        clip_gradients(optimizers.parameters, None)
        optimizers.step()
        optimizers.zero_grad()
        losses.append(output.ce_sum.item() / labels_BT.numel())
    return losses


@torch.no_grad()
def outputs(model: HybridModel) -> dict[str, Tensor]:
    """The last hidden state and the logits for a fixed text."""
    kept = {}
    handle = model.final_norm.register_forward_pre_hook(lambda _, inputs: kept.update(hidden=inputs[0].clone()))
    ids_BT = corpus(256).view(4, 64)
    logits_BTV = model(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32)).logits_BTV
    handle.remove()
    return kept | {"logits": logits_BTV}


def coordinate_check(
    widths: list[int], *, with_mup: bool, rate: float, name: str = "muon", steps: int = 5
) -> dict[str, list[float]]:
    """For each width, the root-mean-square change of hidden state and logits over `steps` steps."""
    moved: dict[str, list[float]] = {"hidden": [], "logits": []}
    for width in widths:
        model = build_model(model_spec(width, with_mup=with_mup), seed=0)
        before = outputs(model)
        train(model, optimizer_spec(rate, name), steps)
        after = outputs(model)
        for what, values in moved.items():
            values.append((after[what] - before[what]).square().mean().sqrt().item())
    return moved


def slope(widths: list[int], values: list[float]) -> float:
    """The exponent with which the values grow with the width: a least-squares fit of logarithms."""
    x = torch.tensor([math.log(width) for width in widths])
    y = torch.tensor([math.log(value) for value in values])
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=2.0**-8, help="of the coordinate check")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    arguments = parser.parse_args()

    widths, checks, sweeps = arguments.widths, {}, {}
    for with_mup in (False, True):
        name = "μP" if with_mup else "plain"
        checks[name] = coordinate_check(widths, with_mup=with_mup, rate=arguments.rate)
        for what, values in checks[name].items():
            exponent = slope(widths, values)
            print(
                f"{name:6}{what:8}moved {'  '.join(f'{v:8.4f}' for v in values)}   ~ width^{exponent:+.2f}", flush=True
            )
    for with_mup in (False, True):
        name = "μP" if with_mup else "plain"
        for width in widths:
            spec = model_spec(width, with_mup=with_mup)
            losses = []
            for rate in RATES:
                last = train(build_model(spec, seed=0), optimizer_spec(rate), arguments.steps)[-10:]
                losses.append(sum(last) / len(last))
            sweeps[name, width] = losses
            best = min(range(len(RATES)), key=losses.__getitem__)
            found = "  ".join(f"{loss:.3f}" for loss in losses)
            print(f"{name:6}width {width:4}  loss {found}   best rate 2^{math.log2(RATES[best]):.0f}", flush=True)
    if arguments.plot:
        plot(arguments.plot, widths, checks, sweeps)


def plot(
    file: Path,
    widths: list[int],
    checks: dict[str, dict[str, list[float]]],
    sweeps: dict[tuple[str, int], list[float]],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, *right) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, colour in (("plain", "#c2410c"), ("μP", "#2f6fb2")):
        for what, style in (("hidden", "o-"), ("logits", "s--")):
            left.loglog(widths, checks[name][what], style, color=colour, label=f"{name}, {what}")
    left.set(title="change over 5 steps (RMS)", xlabel="width", xticks=widths, xticklabels=widths)
    left.minorticks_off()
    left.legend(frameon=False)
    shades = matplotlib.colormaps["viridis"]
    for axes, name in zip(right, ("plain", "μP"), strict=True):
        for number, width in enumerate(widths):
            colour = shades(0.1 + 0.8 * number / max(1, len(widths) - 1))
            losses = sweeps[name, width]
            axes.semilogx(RATES, losses, "o-", base=2, color=colour, label=f"width {width}")
            best = min(range(len(RATES)), key=losses.__getitem__)
            axes.plot(RATES[best], losses[best], "*", color=colour, markersize=14)
        axes.set(title=f"loss by learning rate, {name}", xlabel="learning rate")
        axes.legend(frameon=False)
    low = min(min(losses) for losses in sweeps.values())
    for axes in right:
        axes.set_ylim(low - 0.1, low + 2)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
