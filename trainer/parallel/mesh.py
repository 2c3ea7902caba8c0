"""The ranks of a run as device meshes, and a model cut over them: experts, FSDP2 or DDP.

FSDP2 groups: the matrices and experts of a layer, gathered in the dtype that autocast would cast them to (the cast is
the same, half the bytes travel, and no cast copy outlives its layer); Engram tables alone, in FP32, since their
gradients add up many small terms; embedding and head, in FP32, once a step at the root. Small parameters that stay FP32
in a step are not sharded. The optimizer always updates FP32 parameters, and gradients are
summed in FP32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from trainer.model.hybrid import HybridModel
from trainer.model.moe import Moe
from trainer.parallel.experts import run_everywhere
from trainer.parallel.gradients import average
from trainer.parallel.layout import Layout
from trainer.parameters import mixer_parameters, parameters


class Mesh:
    """A Layout with its process groups; a collective of all ranks.

    Attributes:
        optimizer: the ranks that share the optimizer's state between them; None where each has all of it, or FSDP2 has
            cut it.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self._device = layout, device
        self._dense = self._experts = None
        self.optimizer: DeviceMesh | None = None
        # Parameters that neither FSDP2 nor DDP manages: sharded experts, and those excluded from FSDP2.
        self._cut: list[nn.Parameter] = []
        self._whole: list[nn.Parameter] = []
        if layout.shard_optimizer and layout.world > 1:
            self.optimizer = init_device_mesh(device.type, (layout.world,), mesh_dim_names=("rank",))
        if layout.data == "fsdp":
            dims = {"replicate": layout.replicate, "shard": layout.shard}
            if layout.replicate == 1:
                dims.pop("replicate")
            self._dense = init_device_mesh(device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))
        if layout.expert > 1:
            shape = (layout.replicas, layout.expert)
            self._experts = init_device_mesh(device.type, shape, mesh_dim_names=("replica", "expert"))

    def share(self, model: HybridModel, dtype: torch.dtype | None) -> None:
        """Cut a model that has shapes only; `dtype` is that of autocast, None without."""
        self.share_experts(model)
        if self._dense is not None:
            self._fully_shard(model, dtype)

    def share_experts(self, model: HybridModel) -> None:
        """Cut the experts of a model that has shapes only, and nothing else."""
        if self._experts is not None:
            for moe in model.moe_sublayers():
                names = [p.name for p in mixer_parameters(model.spec, moe.spec) if p.per_expert]
                self._share_experts(moe, names, self._experts)

    def _share_experts(self, moe: Moe, names: list[str], mesh: DeviceMesh) -> None:
        for name in names:
            given: nn.Parameter = getattr(moe, name)
            whole = given.detach()
            own = whole[: whole.shape[0] // self.layout.expert]
            placements = (Replicate(), Shard(0))
            cut = DTensor.from_local(own, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
            setattr(moe, name, nn.Parameter(cut, requires_grad=given.requires_grad))
        moe.exchange = partial(run_everywhere, group=mesh.get_group("expert"))

    def _fully_shard(self, model: HybridModel, dtype: torch.dtype | None) -> None:
        def group(module: nn.Module, **policy: torch.dtype | None) -> None:
            mixed = MixedPrecisionPolicy(cast_forward_inputs=False, **policy)
            fully_shard(module, mesh=self._dense, mp_policy=mixed, ignored_params={*cut, *whole})

        cut, whole = self._our_own(model)
        for layer in (*model.layers, *(module.layer for module in model.mtp)):
            for module in layer.modules():
                if isinstance(module, nn.Embedding):
                    group(module)
            group(layer, param_dtype=dtype, reduce_dtype=torch.float32)
        group(model)
        for module in model.modules():
            if isinstance(module, FSDPModule) and self._device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no mean

    def _our_own(self, model: HybridModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Sharded experts, and parameters outside FSDP2. Call it after `to_empty`, which replaces the parameters."""
        known = parameters(model.spec)
        cut = [model.get_parameter(p.name) for p in known if self._experts is not None and p.per_expert]
        whole = [model.get_parameter(p.name) for p in known if self._dense is not None and p.whole]
        return cut, whole

    def wrap(self, model: HybridModel) -> nn.Module:
        """The finished model as it is called: itself, or in DDP."""
        self._cut, self._whole = ([p for p in own if p.requires_grad] for own in self._our_own(model))
        if self.layout.world == 1 or self._dense is not None:
            return model
        if not any(p.requires_grad and not isinstance(p, DTensor) for p in model.parameters()):
            return model  # only adapters of split experts are trained; DDP would refuse the model
        cut = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, cut)
        on_cpu = self._device.type == "cpu"
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; the name that replaces it is unknown to 2.11.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=None if on_cpu else [self._device.index],
                # Equal on all ranks by construction: router biases follow from summed loads, hashes from the seed.
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                # Without it DDP rearranges its buckets after the first step, so that a resumed run would sum in another
                # order than an undisturbed one; on a CPU that order is promised.
                find_unused_parameters=on_cpu,
            )

    @contextmanager
    def summing_gradients(self, step_model: nn.Module, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; after that of the `last` one, gradients are the mean over
        ranks.

        DDP reduces after the last one. FSDP2 reduce-scatters gradients at every micro-batch, because whole gradients
        would not fit, and sums the shards over nodes at the last one.
        """
        if isinstance(step_model, DistributedDataParallel) and not last:
            with step_model.no_sync():
                yield
            return
        if isinstance(step_model, FSDPModule):
            step_model.set_requires_all_reduce(last)
        yield
        if not last:
            return
        if self._whole:
            average(self._whole, dist.group.WORLD, self.layout.world)
        if self._experts is not None:
            average(self._cut, self._experts.get_group("replica"), self.layout.world)


def keep_copies(model: HybridModel, layout: Layout, device: torch.device, dtype: torch.dtype | None) -> None:
    """Experts keep copies in `dtype`, that of autocast, where they are ours to cast: on a GPU, outside of FSDP2. Where
    DDP does not sum their gradients either, the copies add them up."""
    if device.type == "cuda" and dtype is not None:
        copied = [parameter for parameter in parameters(model.spec) if layout.copied(parameter)]
        adding = {p.name for p in copied if layout.world == 1 or layout.cuts_experts(p)}
        model.keep_copies({p.name for p in copied}, adding)
