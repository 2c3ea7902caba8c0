"""The model: embedding → layers of sublayers → norm → head. Read this file first.

A layer is a few sublayers in order (`ModelSpec.layers`), each x ← x + mixer(norm(x)): Mamba-2 (M), experts (E),
attention (*), MLP (-). Engram (N) normalises the hidden state inside its gate and so has no pre-norm. Every mixer
respects the document boundaries of a packed row. With `spec.mtp`, modules after the last layer are trained to predict
further ahead (trainer/model/mtp.py).

The initialisation of each parameter is defined in its kind's file in trainer/kinds; `init_weights` draws it.

Legend: B rows, T positions, D hidden, V vocabulary, L MoE sublayers, E experts, K depths of multi-token prediction.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pkgutil import resolve_name
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trainer import mup, ops
from trainer.errors import SpecError
from trainer.kinds.base import Kind
from trainer.kinds.ngrams import PAD_TOKEN
from trainer.lora import DOWN
from trainer.model.initial import draw
from trainer.model.linear import Linear, product
from trainer.model.lora import attach
from trainer.model.mixer import Functions, Mixed, Mixer
from trainer.model.moe import Moe
from trainer.model.mtp import MtpModule, ahead
from trainer.model.norm import RMSNorm
from trainer.model.quantised import QuantisedWeight
from trainer.model.recompute import Recomputed, recomputed
from trainer.model.rows import own_rows
from trainer.modelspec import ModelSpec
from trainer.ops import Documents
from trainer.ops.cross_entropy import IGNORE, MakeProducts, cross_entropy_sum
from trainer.ops.experts import compute_dtype
from trainer.ops.narrow import Copy
from trainer.ops.wide import computed_in
from trainer.parameters import parameters, unknown_parameter
from trainer.spec import BackendsSpec

Run = Callable[[Tensor, Tensor, Documents], tuple[Tensor, Tensor, list[Tensor]]]  # of a layer, see Layer.forward
INIT_BLOCK_ELEMENTS = 2**20  # elements drawn at once; bounds the extra memory of initialisation (4 MiB)


class Graphs(Protocol):
    def of(
        self, x_BTD: Tensor, ids_BT: Tensor, seq_idx_BT: Tensor, num_documents: int | None
    ) -> tuple[Documents, Sequence[Run]] | None:
        """Prepared documents, and what to call instead of each layer; None if this pass has to call the layers."""


class ModelOutput(NamedTuple):
    ce_sum: Tensor | None  # 0-d fp32, Σ cross-entropy over labels other than -100
    aux_sum: Tensor  # 0-d fp32, Σ over rows and MoE sublayers of the weighted sequence loss
    mtp_ce_sum_K: Tensor  # fp32, Σ cross-entropy of each depth; empty without multi-token prediction and in eval mode
    mtp_labels_K: Tensor  # int64, the labels behind those sums
    expert_load_LE: Tensor  # int64, tokens that chose each expert
    logits_BTV: Tensor | None  # only without labels


class Sublayer(nn.Module):
    """Pre-norm and mixer."""

    def __init__(self, spec: ModelSpec, section: Kind, functions: Functions) -> None:
        super().__init__()
        if section.pre_norm:
            self.norm = RMSNorm(spec.hidden, spec.norm_eps)
        else:
            self.norm = nn.Identity()
        self.mixer: Mixer = resolve_name(section.mixer)(spec, section, functions)
        self._add_norm = functions["add_norm"]
        attach(spec, section, self.mixer)

    def forward(
        self, x_BTD: Tensor, y_BTD: Tensor | None, ids_BT: Tensor, documents: Documents
    ) -> tuple[Tensor, Mixed]:
        """x + y, where y is what the sublayer before this one adds to the stream, and what the mixer makes of it."""
        if isinstance(self.norm, RMSNorm) and self.mixer.policy != "selective":
            x_BTD, normed_BTD = self._add_norm(x_BTD, y_BTD, self.norm.weight, self.norm.eps)
            return x_BTD, self.mixer(x_BTD, lambda _: normed_BTD, ids_BT, documents)
        # A norm that is recomputed from the sum alone is not part of the addition.
        x_BTD = x_BTD if y_BTD is None else x_BTD + y_BTD
        return x_BTD, self.mixer(x_BTD, self._alone, ids_BT, documents)

    def _alone(self, x_BTD: Tensor) -> Tensor:
        return self._add_norm(x_BTD, None, self.norm.weight, self.norm.eps)[1]


class Layer(nn.Sequential, Recomputed):
    """A few sublayers that run in order, each x ← x + mixer(norm(x)). The addition is left to the next one's norm."""

    def forward(self, x_BTD: Tensor, ids_BT: Tensor, documents: Documents) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The residual stream after the layer, the sum of its sequence losses, and a load_E for each of its MoE."""
        return self.region("full", lambda x_BTD: self._run(x_BTD, ids_BT, documents), x_BTD)

    def _run(self, x_BTD: Tensor, ids_BT: Tensor, documents: Documents) -> tuple[Tensor, Tensor, list[Tensor]]:
        aux_sum = torch.zeros((), dtype=torch.float32, device=x_BTD.device)
        y_BTD, loads = None, []
        for sublayer in self:
            x_BTD, (y_BTD, aux_loss, load_E) = sublayer(x_BTD, y_BTD, ids_BT, documents)
            if aux_loss is not None:
                aux_sum = aux_sum + aux_loss
            if load_E is not None:
                loads.append(load_E)
        return x_BTD + y_BTD, aux_sum, loads


class HybridModel(nn.Module):
    def __init__(self, spec: ModelSpec, functions: Functions) -> None:
        super().__init__()
        self.spec = spec
        self._sections = spec.used()  # asked at every pass
        self.choices: dict[str, ops.Choice] = {}
        self.fp8_head: MakeProducts | None = None  # the head's products while training (trainer/fp8/convert.py)
        self.copies: list[Copy] = []  # of experts, see `keep_copies`
        self.groups: list[tuple[int, int]] = []  # of layers [first, last), each recomputed from its input as a whole
        self.graphs: Graphs | None = None  # by which the layers run while training (trainer/model/graphs.py)
        # from_pretrained: torch would otherwise draw random rows, which on "meta" imports its compiler (seconds).
        self.embedding = nn.Embedding.from_pretrained(torch.empty(spec.vocab_size, spec.hidden), freeze=False)
        self.layers = nn.ModuleList(
            Layer(*(Sublayer(spec, spec.section(symbol, index), functions) for symbol in layer))
            for index, layer in enumerate(spec.layers)
        )
        self.final_norm = RMSNorm(spec.hidden, spec.norm_eps)
        if not spec.tied_embedding:
            self.head = Linear(spec.hidden, spec.vocab_size)
        self.mtp = nn.ModuleList()
        for symbols in [spec.mtp.layer] * spec.mtp.depth if spec.mtp else []:
            layer = Layer(*(Sublayer(spec, spec.section(symbol), functions) for symbol in symbols))
            self.mtp.append(MtpModule(spec.hidden, spec.norm_eps, layer))
        for parameter in parameters(spec) if spec.lora else []:
            self.get_parameter(parameter.name).requires_grad_(not parameter.frozen)

    def forward(
        self, ids_BT: Tensor, seq_idx_BT: Tensor, labels_BT: Tensor | None = None, num_documents: int | None = None
    ) -> ModelOutput:
        """One pass over packed rows.

        Args:
            ids_BT: int64 token ids.
            seq_idx_BT: int document ids; positions with different ids in a row do not see each other.
            labels_BT: int64 next tokens, -100 where nothing is to be predicted; None asks for logits instead.
            num_documents: in all rows; where it is None and wanted, the host waits for the device to count them.
        """
        x_BTD = self.embedding(ids_BT)
        if compute_dtype(x_BTD) == torch.bfloat16:
            x_BTD = x_BTD.bfloat16()  # as Megatron does; FP16 keeps an FP32 stream, its range is too narrow for one
        if (dtype := compute_dtype(x_BTD)) != torch.float32:
            for copy in self.copies:
                copy.refresh(dtype)
        layers: Sequence[Run] = list(self.layers)
        if self.graphs and (replayed := self.graphs.of(x_BTD, ids_BT, seq_idx_BT, num_documents)):
            documents, layers = replayed
        else:
            documents = self.prepared(Documents(seq_idx_BT, num_documents), compute_dtype(x_BTD))
        aux_sum = torch.zeros((), dtype=torch.float32, device=ids_BT.device)
        loads: list[Tensor] = []
        for part, again in self._parts(layers):
            run = partial(_through, part, ids_BT=ids_BT, documents=documents)
            x_BTD, aux_sum, layer_loads = recomputed(run, x_BTD, aux_sum) if again else run(x_BTD, aux_sum)
            loads += layer_loads
        ce_sum = logits_BTV = None
        mtp_ce_sums, mtp_labels = [], []
        if labels_BT is None:
            logits_BTV = self.logits(self.readout(self.final_norm, x_BTD))
        else:
            ce_sum = self._cross_entropy(self.readout(self.final_norm, x_BTD), labels_BT)
            for places, module in enumerate(self.mtp if self.training else [], start=1):
                token_BTD = self.embedding(ahead(ids_BT, places, documents, PAD_TOKEN))
                x_BTD, sequence_loss, layer_loads = module(x_BTD, token_BTD, ids_BT, documents)
                aux_sum = aux_sum + self.spec.mtp_factor * sequence_loss
                loads += layer_loads
                ahead_BT = ahead(labels_BT, places, documents, IGNORE)
                mtp_ce_sums.append(self._cross_entropy(self.readout(module.head_norm, x_BTD), ahead_BT))
                mtp_labels.append((ahead_BT != IGNORE).sum())
        return ModelOutput(
            ce_sum,
            aux_sum,
            torch.stack(mtp_ce_sums) if mtp_ce_sums else aux_sum.new_zeros(0),
            torch.stack(mtp_labels) if mtp_labels else ids_BT.new_zeros(0),
            torch.stack(loads) if loads else ids_BT.new_zeros(0, self.spec.moe.num_experts if self.spec.moe else 0),
            logits_BTV,
        )

    def _parts(self, layers: Sequence[Run]) -> Iterator[tuple[Sequence[Run], bool]]:
        """The layers in order, and whether the backward pass recomputes them as a whole."""
        done = 0
        for first, last in self.groups if torch.is_grad_enabled() else []:
            if done < first:
                yield layers[done:first], False
            yield layers[first:last], True
            done = last
        yield layers[done:], False

    def readout(self, norm: Callable[[Tensor], Tensor], x_BTD: Tensor) -> Tensor:
        """What the head multiplies."""
        return norm(x_BTD) * mup.output_factor(self.spec) if self.spec.mup else norm(x_BTD)

    def logits(self, h_BTD: Tensor) -> Tensor:
        """Of the next token, for what `readout` returned."""
        head = self.embedding if self.spec.tied_embedding else self.head
        return head.product(h_BTD) if isinstance(head, QuantisedWeight) else product(h_BTD, head.weight)

    @property
    def no_tokens(self) -> Tensor:
        """Embeddings [0, D] of no tokens: they have the dtype and device of the residual stream."""
        return self.embedding(torch.empty(0, dtype=torch.int64, device=self.final_norm.weight.device))

    def prepared(self, documents: Documents, dtype: torch.dtype) -> Documents:
        """With everything that the layers will ask for, before the first of them does.

        Args:
            dtype: of matrix products.
        """
        sections, device = self._sections, documents.seq_idx_BT.device
        shifts = set().union(*(section.shifts(self.spec.hidden) for section in sections))
        attends = any(section.attends for section in sections)
        by_document = bool(self.choices) and self.choices["attention"].name not in ("sdpa", "reference")
        documents.prepare(
            sorted(shifts),
            mask=computed_in(dtype, device) if attends and not by_document else None,
            rotation=next((section.rotation for section in sections if section.rotation), None),
            starts=attends and by_document,
        )
        return documents

    def _cross_entropy(self, h_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        found = h_BTD.flatten(0, 1), self.head_weight, labels_BT.flatten()
        if self.fp8_head is None or not self.training:
            return cross_entropy_sum(*found)
        return cross_entropy_sum(*found, products=self.fp8_head)

    @property
    def head_weight(self) -> Tensor:
        head = self.embedding if self.spec.tied_embedding else self.head
        return head.dequantised() if isinstance(head, QuantisedWeight) else head.weight

    def moe_sublayers(self) -> list[Moe]:
        """In the order of the rows of `expert_load_LE`."""
        return [module for module in self.modules() if isinstance(module, Moe)]

    def keep_copies(self, names: Collection[str], adding: Collection[str] = ()) -> None:
        """From now on multiply by copies of these parameters in the dtype of products (trainer/ops/narrow.py), of those
        that are experts without adapters and whose product does not cast in a way of its own (FP8).

        Args:
            adding: those of them whose gradients nobody waits for: the copies add them.
        """
        backends = {backend.function: backend for backend in ops.OPS["experts"].backends.values()}
        for place, moe in self.named_modules():
            if isinstance(moe, Moe) and moe.run_experts in backends:
                stacks = [name for name in (moe.spec.first, "down_EDF") if f"{place}.{name}" in names]
                stacks = [name for name in stacks if not hasattr(moe, f"{name}_{DOWN}")]
                adds = [f"{place}.{name}" in adding and getattr(moe, name).requires_grad for name in stacks]
                self.copies += [Copy(moe, name, adds=each) for name, each in zip(stacks, adds, strict=True)]
                moe.product_adds = backends[moe.run_experts].adds and adds == [True, True]

    def update_router_bias(self, expert_load_LE: Tensor) -> None:
        """Move the router biases after an optimizer step; the counts are those of the whole global step. With LoRA the
        biases do not change."""
        if self.spec.lora is not None:
            return
        for moe, load_E in zip(self.moe_sublayers(), expert_load_LE, strict=True):
            moe.update_bias(load_E)

    @torch.no_grad()
    def init_weights(self, seed: int, token_classes: list[int] | None) -> None:
        """Fill parameters and buffers, of cut parameters what this rank holds.

        Each block of rows draws from a generator seeded by its name and number. So the order is free, a rank draws
        only what it holds, and what it holds does not depend on how many ranks there are.
        """
        known = {parameter.name: parameter for parameter in parameters(self.spec)}
        for name, parameter in self.named_parameters():
            if name not in known:
                raise ValueError(unknown_parameter(name))
            own, first = own_rows(parameter)
            rows = max(1, INIT_BLOCK_ELEMENTS // max(1, math.prod(parameter.shape[1:])))
            for number, start in enumerate(range(0, parameter.shape[0], rows)):
                end = min(start + rows, parameter.shape[0])
                low, high = max(start, first), min(end, first + own.shape[0])
                if low >= high:
                    continue
                inside = (low, high) == (start, end)
                block = own[low - first : high - first] if inside else own.new_empty(end - start, *own.shape[1:])
                # A checksum of all, because torch's CPU generator looks at the low 32 bits of a seed only.
                key = f"{seed} {name}" if number == 0 else f"{seed} {name} {number}"
                draw(self.spec, known[name], block, torch.Generator(own.device).manual_seed(zlib.crc32(key.encode())))
                if not inside:
                    own[low - first : high - first] = block[low - start : high - start]
        for module in self.modules():
            if isinstance(module, Mixer):
                module.reset_buffers(token_classes)


def _through(
    layers: Sequence[Run], x_BTD: Tensor, aux_sum: Tensor, ids_BT: Tensor, documents: Documents
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The stream after some layers, the sum of sequence losses so far, and these layers' loads."""
    loads: list[Tensor] = []
    for layer in layers:
        x_BTD, sequence_loss, layer_loads = layer(x_BTD, ids_BT, documents)
        aux_sum = aux_sum + sequence_loss
        loads += layer_loads
    return x_BTD, aux_sum, loads


def build_model(
    spec: ModelSpec,
    backends: BackendsSpec | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int | None,
    token_classes: list[int] | None = None,
    share: Callable[[HybridModel], None] | None = None,
    choices: dict[str, ops.Choice] | None = None,
) -> HybridModel:
    """The initialised model on `device`; on "meta" it has shapes only and costs no memory.

    Args:
        dtype: what autocast will give to matrix products, by which kernels are chosen; None without autocast.
        seed: seed of the weights; None leaves only shapes, if all weights and buffers come from a file.
        token_classes: compression table of the tokenizer (`trainer.kinds.ngrams.token_classes`), needed by Engram
            layers with compress_tokens.
        share: cuts the parameters between ranks while they have shapes only; no rank ever holds the whole model.
        choices: backends that were already chosen and logged; replaces `backends`.

    Raises:
        SpecError: a named backend cannot run on this device, or the token classes do not fit.
    """
    device = torch.device(device)
    chosen = choices or ops.resolve(backends or BackendsSpec(), device, dtype or torch.float32, spec)
    if device.type != "meta" and seed is not None:
        _check_classes(spec, token_classes)
    with torch.device("meta"):
        model = HybridModel(spec, ops.functions(chosen))
    model.choices = chosen
    if device.type == "meta":
        return model
    if share is not None:
        share(model)
    if seed is not None:
        model.to_empty(device=device)
        model.init_weights(seed, token_classes)
    else:  # whoever fills it goes by the state dict
        assert model.state_dict().keys() >= dict([*model.named_parameters(), *model.named_buffers()]).keys()
    if choices is None:
        ops.say(chosen)
    return model


def _check_classes(spec: ModelSpec, token_classes: list[int] | None) -> None:
    if not any(engram.compress_tokens for engram in spec.engram):
        return
    if token_classes is None:
        raise ValueError(
            "train.model.engram: compress_tokens needs the token classes of a tokenizer; "
            "pass trainer.kinds.ngrams.token_classes(tokenizer.json) or set compress_tokens: false"
        )
    if len(token_classes) > spec.vocab_size:
        raise SpecError(
            f"train.model.vocab_size {spec.vocab_size} is smaller than the tokenizer's {len(token_classes)} "
            "entries; raise it"
        )
