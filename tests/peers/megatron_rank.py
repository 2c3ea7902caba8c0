"""One rank of megatron-core on a CPU, over gloo: logits of checkpoints, and trainings on our shards.

Of Megatron this is core 0.12: its model (the layers of its own, without Transformer Engine), data sets, gradient
buckets, optimizer, schedule of micro-batches and checkpoints. What it asks of a GPU by name is given the CPU.

    python megatron_rank.py TASKS.json     (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them)

Tasks are run one after the other, because importing core takes longer than all of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.overrides import TorchFunctionMode

TORCH_SAVE = SerializationFormat.TORCH_SAVE
CPU = torch.device("cpu")


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        if func is Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


def prepare() -> None:
    """CPUs in place of GPUs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: CPU
    torch.cuda.synchronize = lambda *_: None
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Of the two trackers that core has, this one keeps no state of a GPU's generator; nothing is dropped out here.
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    # Made for an earlier torch, it calls a function of DCP that has one more argument since.
    filesystem_async._write_item = partial(filesystem_async._write_item, serialization_format=TORCH_SAVE)


def split(settings: Namespace) -> None:
    """The groups of ranks of one task."""
    from megatron.core import num_microbatches_calculator, parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(settings.tensor, 1, expert_model_parallel_size=settings.expert)
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    data = parallel_state.get_data_parallel_world_size()
    num_microbatches_calculator.init_num_microbatches_calculator(dist.get_rank(), None, settings.rows, 1, data)


def gpt(settings: Namespace) -> nn.Module:
    """Megatron's GPT of a ModelSpec (JSON)."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    model, attention = settings.model, settings.model["attention"]
    moe, mlp = model.get("moe"), model.get("mlp") or {}
    experts = moe and {
        "num_moe_experts": moe["num_experts"],
        "moe_ffn_hidden_size": moe["expert_width"],
        "moe_router_topk": moe["top_k"],
        "moe_router_score_function": moe["scores"],
        "moe_router_topk_scaling_factor": moe["score_scale"] if moe["score_scale"] != 1 else None,
        "moe_router_enable_expert_bias": bool(moe["bias_update_rate"]),
        "moe_router_load_balancing_type": "aux_loss" if settings.balance else "none",
        "moe_aux_loss_coeff": settings.balance,
        "moe_shared_expert_intermediate_size": moe["shared_width"] or None,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_dtype": "fp32",
        "moe_layer_freq": [int("E" in layer) for layer in model["layers"]] if settings.numbered else 1,
    }
    config = TransformerConfig(
        num_layers=len(model["layers"]),
        hidden_size=model["hidden"],
        ffn_hidden_size=mlp["width"] if mlp else moe["expert_width"],
        num_attention_heads=attention["num_heads"],
        num_query_groups=attention["num_kv_heads"],
        kv_channels=attention["head_dim"],
        qk_layernorm=attention["qk_norm"],
        normalization="RMSNorm",
        layernorm_epsilon=model["norm_eps"],
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=attention["bias"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=settings.tensor,
        expert_model_parallel_size=settings.expert,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        pipeline_dtype=torch.float32,
        **(experts or {}),
    )
    torch.manual_seed(settings.seed)
    layers = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    return GPTModel(
        config,
        layers,
        vocab_size=settings.padded,
        max_sequence_length=settings.seq_len,
        share_embeddings_and_output_weights=model["tied_embedding"],
        position_embedding_type="rope",
        rotary_base=attention["rope_theta"],
    )


def hidden_positions(length: int) -> Tensor:
    return torch.ones(1, 1, length, length).tril() < 0.5


def load(model: nn.Module, folder: Path) -> None:
    """As Megatron-LM loads the checkpoint that --pretrained-checkpoint names: weights only."""
    from megatron.core import dist_checkpointing

    assert dist_checkpointing.check_is_distributed_checkpoint(str(folder))
    common = dist_checkpointing.load_common_state_dict(str(folder))
    assert common["args"].tensor_model_parallel_size in (1, 2)  # read by Megatron-LM's load_checkpoint
    found = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))
    model.load_state_dict(found["model"])


def logits(settings: Namespace) -> None:
    model = gpt(settings)
    load(model, Path(settings.load))
    ids_BT = torch.tensor(settings.ids)
    positions = torch.arange(ids_BT.shape[1])[None].expand_as(ids_BT)
    with torch.no_grad():
        found = model.eval()(ids_BT, positions, hidden_positions(ids_BT.shape[1]), runtime_gather_output=True)
    if dist.get_rank() == 0:
        torch.save(found, settings.out)


def states(settings: Namespace) -> None:
    """Ask a checkpoint for what Transformer Engine's layers ask for besides weights: their FP8 states."""
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

    wanted = {
        f"{key} {places}": make_sharded_object_for_checkpoint(None, f"{key}._extra_state", [tuple(at) for at in places])
        for key, places in settings.states
    }
    names = [*wanted]
    found = dist_checkpointing.load(wanted, settings.load)
    Path(settings.out).write_text(json.dumps({name: list(found[name].shape) for name in names}))


class Ids:
    """What core's data sets ask of a tokenizer."""

    def __init__(self, eod: int) -> None:
        self.eod = eod  # no `pad`, as Megatron-LM's NullTokenizer has none: its masks would add up over the rows
        self.unique_identifiers = {"class": "Ids", "eod": eod}


def rows(settings: Namespace, step: int) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches of one step, of the blend that Megatron draws from the shards."""
    from megatron.core import parallel_state
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=settings.seed,
        sequence_length=settings.seq_len,
        blend_per_split=[(settings.shards, settings.weights), None, None],
        path_to_cache=settings.cache,
        tokenizer=Ids(0),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    wanted = [settings.rows * settings.steps, 0, 0]
    blend = BlendedMegatronDatasetBuilder(GPTDataset, wanted, lambda: True, config).build()[0]
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    while True:
        for row in range(step * settings.rows + rank, (step + 1) * settings.rows, size):
            yield {key: torch.as_tensor(value)[None] for key, value in blend[row].items()}
        step += 1


def forward(batches: Iterator[dict[str, Tensor]], model: nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    per_token = model(
        batch["tokens"],
        batch["position_ids"],
        hidden_positions(batch["tokens"].shape[1]),
        labels=batch["labels"],
    )
    return per_token, partial(mean, batch["loss_mask"])


def mean(mask: Tensor, per_token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = (per_token.float() * mask).sum() / mask.sum()
    return loss, {"loss": loss.detach().clone()}


def train(settings: Namespace, told: Callable[[int, float], object] = lambda *_: None) -> None:
    """Steps up to `stop`, with a checkpoint at the end; goes on from the newest, or begins with `load`.

    Args:
        told: called after each step with its number and loss, and after the checkpoint with NaN.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    model = gpt(settings)
    if settings.load:
        load(model, Path(settings.load))
    config = get_model_config(model)
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(overlap_grad_reduce=False), model)
    # Core clips tensors of a GPU only.
    recipe = {"optimizer": "adam", "lr": settings.rate, "min_lr": settings.rate, "weight_decay": 0.1, "clip_grad": 0.0}
    optimizer = get_megatron_optimizer(OptimizerConfig(**recipe, params_dtype=torch.float32), [wrapped])
    run = Path(settings.run)
    first = resume(run, model, optimizer)
    batches, losses = rows(settings, first), []
    for step in range(first, settings.stop):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=batches,
            model=wrapped,
            num_microbatches=settings.rows // parallel_state.get_data_parallel_world_size(),
            seq_length=settings.seq_len,
            micro_batch_size=1,
            forward_only=False,
        )
        assert optimizer.step()[0]
        loss = torch.stack([each["loss"] for each in found]).mean()
        dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        losses.append(float(loss) / parallel_state.get_data_parallel_world_size())
        told(step + 1, losses[-1])
    save(run, settings.stop, model, optimizer, settings)
    told(settings.stop, math.nan)
    if settings.out and dist.get_rank() == 0:
        Path(settings.out).write_text(json.dumps(losses))


def tracker(run: Path) -> Path:
    return run / "latest_checkpointed_iteration.txt"


def resume(run: Path, model: nn.Module, optimizer: Any) -> int:
    from megatron.core import dist_checkpointing

    if not tracker(run).is_file():
        return 0
    step = int(tracker(run).read_text())
    weights = model.sharded_state_dict()
    wanted = {"model": weights, "optimizer": optimizer.sharded_state_dict({"model": weights}, is_loading=True)}
    found = dist_checkpointing.load(wanted, str(run / f"iter_{step:07d}"))
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    return step


def save(run: Path, step: int, model: nn.Module, optimizer: Any, settings: Namespace) -> None:
    """In the folders and under the names that Megatron-LM's save_checkpoint gives."""
    from megatron.core import dist_checkpointing

    folder = run / f"iter_{step:07d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    weights = model.sharded_state_dict()
    kept = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict({"model": weights}),
        "args": Namespace(tensor_model_parallel_size=settings.tensor, pipeline_model_parallel_size=1),
        "iteration": step,
    }
    dist_checkpointing.save(kept, str(folder))
    if dist.get_rank() == 0:
        tracker(run).write_text(str(step))


def main(file: str) -> None:
    with OnCpu(), contextlib.redirect_stdout(sys.stderr):
        prepare()
        dist.init_process_group("gloo")
        for task in json.loads(Path(file).read_text()):
            settings = Namespace(**task)
            split(settings)
            {"logits": logits, "states": states, "train": train}[settings.task](settings)
            dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
