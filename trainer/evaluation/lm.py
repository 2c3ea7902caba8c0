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
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from trainer.data.chat import CHATML
from trainer.data.chattemplate import Asking
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError
from trainer.evaluation.write import write
from trainer.model.hybrid import HybridModel

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 256  # of the harness, where a task says nothing
MOST_LOGITS = 2**28  # of a batch: 1 GiB in FP32
TELL_SECONDS = 60.0
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
    """

    def __init__(
        self,
        model: HybridModel,
        tokenizer: Tokenizer,
        folder: str | Path,
        *,
        max_length: int,
        batch_tokens: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        asking: Asking | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._model, self._own, self._asking, self._seed = model, tokenizer, asking, seed
        self._autocast = autocast
        self.max_length = max_length
        self._batch_tokens = min(batch_tokens, max(MOST_LOGITS // model.spec.vocab_size, 1))
        self._device = next(model.parameters()).device
        self._first, self._stops = _begin(Path(folder), tokenizer), stops(Path(folder), tokenizer, asking)
        lengths = tokenizer.byte_lengths()
        self._special = {n for n, size in enumerate(lengths) if size == 0}

    @property
    def chats(self) -> bool:
        """Whether the harness is to write questions as conversations."""
        return self._asking is not None

    @property
    def eot_token_id(self) -> int:
        return self._own.eod_id

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
        for number, (_key, context, scored) in enumerate(requests):
            if len(scored) > self.max_length:
                raise DataError(
                    f"an answer has {len(scored)} tokens, the model reads at most {self.max_length}; leave the task "
                    "out, or train with longer rows (train.seq_len)"
                )
            ids = (context + scored)[-(self.max_length + 1) : -1]
            rows.setdefault(tuple(ids), []).append(_Wanted(number, scored))
        answers: list[Answer | None] = [None] * len(requests)
        told = _Teller(len(rows))
        for batch in self._batches(list(rows)):
            for row, logits_TV in zip(batch, self._logits(batch), strict=True):
                longest = max(len(wanted.ids) for wanted in rows[row])
                scores_TV = logits_TV[len(row) - longest : len(row)].float().log_softmax(-1)
                likeliest_T = scores_TV.argmax(-1).tolist()
                for number, wanted in rows[row]:
                    ids_T = torch.tensor(wanted, device=scores_TV.device)
                    taken_T = scores_TV[-len(wanted) :].gather(1, ids_T[:, None])[:, 0]
                    answers[number] = float(taken_T.double().sum()), likeliest_T[-len(wanted) :] == wanted
            told.done(len(batch))
        return [answer for answer in answers if answer is not None]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop strings, or the end of the document or turn."""
        texts, told = [""] * len(requests), _Teller(len(requests))
        asked = [(number, *self._to_write(*request.args)) for number, request in enumerate(requests)]
        by_options: dict[str, dict[tuple[int, ...], list[int]]] = {}
        for number, ids, options in asked:
            place = () if json.loads(options)["temperature"] == 0 else (-1, number)  # each draw is one of its own
            by_options.setdefault(options, {}).setdefault((*ids, *place), []).append(number)
        seed = self._seed
        for options, rows in by_options.items():
            given: dict[str, Any] = json.loads(options)
            drawn = 0 if given["temperature"] == 0 else 2
            for keys in self._batches(list(rows), more=given["max_gen_toks"]):
                with self._autocast():
                    written = write(
                        self._model,
                        [key[: len(key) - drawn] for key in keys],
                        max_tokens=given["max_gen_toks"],
                        temperature=given["temperature"],
                        seed=seed,
                        stops=self._stops,
                        ended=partial(self._is_over, given["until"]),
                    )
                for key, ids in zip(keys, written, strict=True):
                    for number in rows[key]:
                        texts[number] = self._cut(ids, given["until"])
                seed += len(keys)
                told.done(len(keys))
        return texts

    def _to_write(self, context: str, options: dict[str, Any]) -> tuple[list[int], str]:
        """The ids of a context, cut so that there is room for the answer, and its normalised options as JSON."""
        used = normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS)
        until = handle_stop_sequences(used["until"], eos=self._own.eod)
        kept = {
            "until": until,
            "max_gen_toks": used["max_gen_toks"],
            "temperature": float(used.get("temperature", 0.0)),
        }
        room = self.max_length - used["max_gen_toks"]
        if room <= 0:
            raise DataError(
                f"an answer may have {used['max_gen_toks']} tokens, the model reads only {self.max_length} with its "
                "question; leave the task out, or train with longer rows (train.seq_len)"
            )
        return self.tok_encode(context)[-room:] or [self._first], json.dumps(kept, sort_keys=True)

    def _is_over(self, until: list[str], ids: list[int]) -> bool:
        text = self._own.decode(ids)
        return any(stop in text for stop in until if stop)

    def _cut(self, ids: list[int], until: list[str]) -> str:
        text = self._own.decode([n for n in ids if n not in self._special])
        cut: str = postprocess_generated_text(text, until, None)
        return cut

    def _batches(self, rows: Sequence[tuple[int, ...]], more: int = 0) -> Iterator[list[tuple[int, ...]]]:
        """Rows in batches of at most `batch_tokens` positions, `more` of them after each row's end; longest first."""
        batch: list[tuple[int, ...]] = []
        for ids in sorted(rows, key=len, reverse=True):
            if batch and (len(batch[0]) + more) * (len(batch) + 1) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(ids)
        if batch:
            yield batch

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


def stops(folder: Path, tokenizer: Tokenizer, asking: Asking | None = None) -> set[int]:
    """The ids that end a text: as generation_config.json beside the tokenizer says, else the end of a document and of a
    turn in our own markup; with a chat template also the end of its answers."""
    found = _read(folder / "generation_config.json").get("eos_token_id")
    ends = {found} if isinstance(found, int) else set(found) if isinstance(found, list) else set[int]()
    if not ends and (turn := tokenizer.markup.get(CHATML.end)) is not None:
        ends = {turn}
    return ends | {tokenizer.eod_id} | (asking.stops if asking else set())


def _begin(folder: Path, tokenizer: Tokenizer) -> int:
    """The id before a text without context: the token of the tokenizer for the begin of a text, else for its end."""
    if tokenizer.prefix:
        return tokenizer.prefix[0]
    token = _read(folder / "tokenizer_config.json").get("bos_token")
    name = token.get("content") if isinstance(token, dict) else token
    return tokenizer.ids().get(name, tokenizer.eod_id) if isinstance(name, str) else tokenizer.eod_id


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class _Teller:
    """Logs progress once a minute."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._at = total, 0, time.monotonic()

    def done(self, number: int) -> None:
        self._done += number
        if time.monotonic() - self._at > TELL_SECONDS:
            self._at = time.monotonic()
            log.info("  %s of %s rows", f"{self._done:,}", f"{self._total:,}")
