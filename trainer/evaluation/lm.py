"""Our model as a model of lm-evaluation-harness: log-likelihoods of texts, and generation.

Texts become ids as in the harness's own `--model hf` on an export of the same model, so the scores are the same:
special tokens written in a text count as such, the tokenizer's prefix precedes every context, too long contexts lose
their beginning, and generation ends at the end of the document or of a turn.

Requests run longest first, so that memory is at its highest at once. Rows with the same input, such as the choices of
one question that differ in their last token, are computed once.

Legend: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from trainer.data.chattemplate import Asking
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError
from trainer.evaluation.write import Autocast, Teller, Writer, stops
from trainer.files import read_object
from trainer.model.hybrid import HybridModel

DEFAULT_NEW_TOKENS = 256  # of the harness, where a task says nothing
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")  # of the next token, as transformers names them
MOST_LOGITS = 2**28  # of a batch: 1 GiB in FP32
Pair = tuple[Any, list[int], list[int]]  # a key of the harness, the ids of a context, those of its continuation
Answer = tuple[float, bool]


class _Wanted(NamedTuple):
    """A continuation at the end of an input, and the number of its request."""

    request: int
    ids: list[int]


class HarnessModel(TemplateLM):
    """
    Args:
        folder: of the tokenizer.
        max_length: the longest input, in tokens.
        batch_tokens: positions of one forward pass, at most, unless a single row is longer.
        autocast: makes the context of every forward pass.
        asking: writes conversations, if the harness is to use the chat template.
        seed: of draws.
    """

    def __init__(
        self,
        model: HybridModel,
        tokenizer: Tokenizer,
        folder: str | Path,
        *,
        max_length: int,
        batch_tokens: int,
        autocast: Autocast = nullcontext,
        asking: Asking | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._model, self._own, self._asking, self._seed = model, tokenizer, asking, seed
        self._autocast, self.max_length = autocast, max_length
        self._batch_tokens = min(batch_tokens, max(MOST_LOGITS // model.spec.vocab_size, 1))
        named = _named(Path(folder), tokenizer)
        self._last = named.get("eos_token", tokenizer.eod_id)
        self._first = named.get("bos_token", self._last)
        ends = stops(Path(folder), tokenizer, asking)
        self._write = Writer(model, tokenizer, ends, autocast)

    @property
    def chats(self) -> bool:
        """Whether the harness is to write questions as conversations."""
        return self._asking is not None

    @property
    def eot_token_id(self) -> int:
        return self._last

    @property
    def prefix_token_id(self) -> int:
        return self._first

    @property
    def tokenizer_name(self) -> str:
        return self._own.digest

    def chat_template(self, chat_template: bool | str = False) -> str:
        """For the harness's records only."""
        return "" if self._asking is None else f"that of tokenizer {self._own.digest[:12]}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without `add_generation_prompt`, its last message is an answer to continue."""
        assert self._asking is not None
        if add_generation_prompt:
            return self._asking.text(chat_history)
        return self._asking.text(chat_history[:-1]) + chat_history[-1]["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self._own.encode(string, specials=True)
        return ids if add_special_tokens is False else self._own.begun(ids)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text in windows of `max_length`; every token is scored once."""
        owners, pairs = [], list[Pair]()
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self._first, self.max_length, 1)
            for context, scored in map(make_disjoint_window, windows):
                owners.append(number)
                pairs.append((None, context, scored))
        sums = [0.0] * len(requests)
        for number, (score, _greedy) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            sums[number] += score
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[Answer]:
        """Of each continuation: the sum of its tokens' log-probabilities, and whether each was the likeliest."""
        rows: dict[tuple[int, ...], list[_Wanted]] = {}
        answers: list[Answer] = [(0.0, True)] * len(requests)
        for number, (_key, context, scored) in enumerate(requests):
            if not scored:  # nothing is certain
                continue
            if len(scored) > self.max_length:
                raise DataError(
                    f"an answer has {len(scored)} tokens, the model reads at most {self.max_length}; leave the task "
                    "out, or train with longer rows (train.seq_len)"
                )
            ids = (context + scored)[-(self.max_length + 1) : -1]
            rows.setdefault(tuple(ids), []).append(_Wanted(number, scored))
        inputs, told = list(rows), Teller(len(rows))
        for batch in batches([len(row) for row in inputs], self._batch_tokens):
            for row, logits_TV in zip(some := [inputs[n] for n in batch], self._logits(some), strict=True):
                longest = max(len(wanted.ids) for wanted in rows[row])
                scores_TV = logits_TV[len(row) - longest : len(row)].float().log_softmax(-1)
                likeliest_T = scores_TV.argmax(-1).tolist()
                for number, wanted in rows[row]:
                    ids_T = torch.tensor(wanted, device=scores_TV.device)
                    taken_T = scores_TV[-len(wanted) :].gather(1, ids_T[:, None])[:, 0]
                    answers[number] = float(taken_T.double().sum()), likeliest_T[-len(wanted) :] == wanted
            told.done(len(batch))
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop strings, or the end of the document or turn."""
        texts = [""] * len(requests)
        alike: dict[str, dict[tuple[int, ...], list[int]]] = {}
        for number, request in enumerate(requests):
            ids, options = self._to_write(*request.args)
            draw = () if json.loads(options)["temperature"] == 0 else (number,)  # each is one of its own
            alike.setdefault(options, {}).setdefault((*ids, *draw), []).append(number)
        for options, rows in alike.items():
            given: dict[str, Any] = json.loads(options)
            prompts = [row if given["temperature"] == 0 else row[:-1] for row in rows]
            for numbers, text in zip(rows.values(), self._write(prompts, seed=self._seed, **given), strict=True):
                for number in numbers:
                    texts[number] = text
        return texts

    def _to_write(self, context: str, options: dict[str, Any]) -> tuple[list[int], str]:
        """The ids of a context, cut so that there is room for the answer, and its normalised options as JSON."""
        used = normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS)
        until = handle_stop_sequences(used["until"], eos=self._own.decode([self._last]))
        amount = used["max_gen_toks"]
        kept = {"until": until, "max_tokens": amount, "temperature": float(used.get("temperature", 0.0))}
        kept |= {name: used[name] for name in FILTERS if used.get(name) is not None}
        room = self.max_length - amount
        if room <= 0:
            raise DataError(
                f"an answer may have {amount} tokens, the model reads only {self.max_length} with its question; leave "
                "the task out, or train with longer rows (train.seq_len)"
            )
        return self.tok_encode(context)[-room:] or [self._first], json.dumps(kept, sort_keys=True)

    @torch.inference_mode()
    def _logits(self, rows: Sequence[Sequence[int]]) -> Iterable[Tensor]:
        """Logits [T, V] of each row, padded on the right, which causal layers do not see."""
        ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for number, ids in enumerate(rows):
            ids_BT[number, : len(ids)] = torch.tensor(ids)
        ids_BT = ids_BT.to(self._device)
        with self._autocast():
            logits_BTV = self._model(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32)).logits_BTV
        assert logits_BTV is not None
        return logits_BTV


def _named(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of bos_token and eos_token, where the tokenizer's configuration names them; others use only that file."""
    config, ids, found = read_object(folder / "tokenizer_config.json"), tokenizer.ids(), dict[str, int]()
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content in ids:
            found[name] = ids[content]
    return found


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """The numbers of rows with these lengths, longest first, in batches whose padded size is at most `most`; a longer
    row is alone."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: lengths[n], reverse=True):
        if batch and lengths[batch[0]] * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
