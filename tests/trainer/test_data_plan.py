"""The order of the token stream against a naive definition of it, and its ledger, caps, resumption and skips."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.manifest import DataError
from trainer.data.order import KEPT, Permutation, SourceOrder
from trainer.data.plan import Cursor, Segment, TokenStream
from trainer.spec import MixSpec, StageSpec

WEIGHTS = {"ko": 0.4, "en": 0.35, "code": 0.25}
LENGTHS = {
    "ko": np.array([5, 1, 9, 3, 3, 17], np.int32),
    "en": np.array([2, 2, 40], np.int32),
    "code": np.array([7, 11, 1, 1], np.int32),
}


def stream(cursor: Cursor | None = None, caps: float = 1000, seed: int = 3, **fields: object) -> TokenStream:
    mix = {name: MixSpec(weight=weight, max_epochs=caps) for name, weight in WEIGHTS.items()}
    return TokenStream(LENGTHS, mix, seed, "digest", cursor=cursor, **fields)


def tokens_of(segments: list[Segment]) -> list[tuple[int, int, int]]:
    """Every token as (source, document, position in it)."""
    return [(s.source, s.document, at) for s in segments for at in range(s.start, s.stop)]


def naive_order(
    count: int, seed: int = 3, stages: dict[int, dict[str, str]] | None = None, pays_debts: bool = False
) -> list[tuple]:
    """The definition, token by token: whenever a document ends, the source with the largest deficit is next.

    Args:
        stages: weights by source, as decimal texts, by the position from which they hold.
    """
    names = list(WEIGHTS)
    weights = {0: {name: str(w) for name, w in WEIGHTS.items()}} | (stages or {})
    owed = [Fraction(0) for _ in names]
    orders = [SourceOrder(name, LENGTHS[name], seed) for name in names]
    queues: list[list[int]] = [[] for _ in names]
    epochs = [0] * len(names)
    given_by = [0] * len(names)
    out: list[tuple[int, int, int]] = []
    while len(out) < count:
        shares = [Fraction(weights[max(w for w in weights if w <= len(out))].get(name, "0")) for name in names]
        deficits = [due - have for due, have in zip(owed, given_by, strict=True)]
        allowed = [s for s in range(len(names)) if shares[s] > 0 or pays_debts]
        source = max(allowed, key=lambda s: (deficits[s], shares[s] > 0, -s))
        if not queues[source]:
            queues[source] = orders[source].permutation(epochs[source])(0, len(LENGTHS[names[source]])).tolist()
            epochs[source] += 1
        document = queues[source].pop(0)
        length = int(LENGTHS[names[source]][document])
        for at in range(length):
            shares = [Fraction(weights[max(w for w in weights if w <= len(out))].get(name, "0")) for name in names]
            owed = [due + share for due, share in zip(owed, shares, strict=True)]
            out.append((source, document, at))
        given_by[source] += length
    return out[:count]


def test_order_is_the_definition() -> None:
    assert tokens_of(stream().take(3000)) == naive_order(3000)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_cuts_do_not_change_the_order(cuts: list[int]) -> None:
    one = stream()
    pieces = [segment for count in cuts for segment in one.take(count)]
    assert tokens_of(pieces) == naive_order(sum(cuts))


def test_resume_at_every_token_gives_the_same_stream() -> None:
    whole = tokens_of(stream().take(600))
    running = stream()
    for at in range(400):
        resumed = stream(Cursor.from_dict(running.cursor().to_dict()))
        assert tokens_of(resumed.take(200)) == whole[at : at + 200]
        running.take(1)


def test_ledger_is_exact_and_no_source_runs_ahead_by_a_document() -> None:
    running, counts = stream(), dict.fromkeys(WEIGHTS, 0)
    for at in range(1, 4000):
        for source, _, _ in tokens_of(running.take(1)):
            counts[list(WEIGHTS)[source]] += 1
        assert running.cursor().drawn == running.cursor().trained == counts
        assert running.position == sum(counts.values()) == at
        for name, weight in WEIGHTS.items():
            ahead = counts[name] - weight * at
            others = sum(int(LENGTHS[n].max()) for n in WEIGHTS if n != name)
            assert -others < ahead < LENGTHS[name].max()


def test_each_epoch_holds_each_document_once_in_its_own_order() -> None:
    order = SourceOrder("ko", np.ones(5000, np.int32), seed=0)
    epochs = [[order.next()[0] for _ in range(5000)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(5000)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert abs(np.corrcoef(epochs[0], range(5000))[0, 1]) < 0.05


@pytest.mark.parametrize("size", [1, 2, KEPT, KEPT + 1, 2**17, 2**17 + 1, 300_000])
def test_a_permutation_is_one_and_can_be_read_anywhere(size: int) -> None:
    permutation = Permutation(size, bytes(range(32)))
    whole = permutation(0, size)
    assert np.array_equal(np.sort(whole), np.arange(size))
    middle = size // 3
    assert np.array_equal(permutation(middle, size), whole[middle:])


def test_a_computed_permutation_is_as_even_as_a_drawn_one() -> None:
    """Where documents come from against where they go, in 32 × 32 fields: χ² within 5 standard deviations."""
    size, fields = 131_073, 32
    for seed in range(6):
        images = SourceOrder("web", np.ones(size, np.int32), seed).permutation(0)(0, size)
        for origin, image in ((np.arange(size), images), (np.arange(size) % fields, images % fields)):
            counts = np.histogram2d(origin, image, bins=fields)[0]
            chi2, freedom = ((counts - size / fields**2) ** 2 / (size / fields**2)).sum(), (fields - 1) ** 2
            assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_position_deep_in_a_large_source_is_found() -> None:
    lengths = np.random.default_rng(0).integers(1, 9, KEPT * 3).astype(np.int32)
    order = SourceOrder("web", lengths, seed=1)
    in_order = np.concatenate([order.permutation(epoch)(0, len(lengths)) for epoch in (0, 1)])
    ends = np.cumsum(lengths[in_order])
    for consumed in (1, int(ends[2]), int(ends[KEPT]) + 1, int(ends[KEPT * 2 - 1]), order.tokens, int(ends[-1]) - 1):
        document, offset = order.seek(consumed)
        following = order.next()[0]
        index = int(np.searchsorted(ends, consumed, side="right"))
        start = int(ends[index - 1]) if index else 0
        if consumed == start:
            assert (document, offset) == (-1, 0) and following == in_order[index]
        else:
            assert (document, offset) == (in_order[index], consumed - start)


def test_the_order_is_frozen() -> None:
    """A change here is a change of every run's data: raise ORDER_VERSION with it."""
    assert SourceOrder("ko", np.ones(10, np.int32), seed=0).permutation(0)(0, 10).tolist() == [
        7,
        2,
        6,
        3,
        1,
        8,
        5,
        0,
        4,
        9,
    ]
    large = Permutation(2**31 - 5, bytes(range(32)))
    assert large(2**30, 2**30 + 3).tolist() == [2056652217, 745344010, 717612000]
    documents = [document for (_, document), _ in groupby((s.source, s.document) for s in stream().take(100))]
    assert documents == [1, 1, 0, 5, 2, 3, 4, 2, 1, 0, 2, 1]


def test_seed_and_weights_change_the_order() -> None:
    assert tokens_of(stream(seed=4).take(100)) != tokens_of(stream().take(100))
    assert stream(seed=4).digest() != stream().digest()
    assert stream(caps=2).digest() == stream().digest(), "caps may be raised on the way"


def test_an_impossible_cap_is_refused_with_the_way_out() -> None:
    # ko: 38 tokens × 2 epochs = 76 at most; 1000 tokens need 400 and, at worst, one document of 17 less a token more.
    with pytest.raises(
        DataError, match=r"'ko' would need 416 tokens, but 38 × max_epochs 2 = 76; .*max_epochs to 10\.95"
    ):
        stream(caps=2).check_caps(1000)


@settings(deadline=None)
@given(st.integers(1, 3000), st.sampled_from([1, 1.5, 4, 10, 40]))
def test_a_run_that_passes_the_check_keeps_every_cap(tokens: int, caps: float) -> None:
    running = stream(caps=caps)
    try:
        running.check_caps(tokens)
    except DataError:
        return
    running.take(tokens)
    assert all(epochs <= caps for epochs in running.epochs(running.cursor()).values())


def test_caps_count_what_is_left_and_skips() -> None:
    limit = max(t for t in range(1, 500) if _passes(stream(caps=4), t))
    half = stream(caps=4)
    half.take(limit // 2)
    assert _passes(half, limit - limit // 2) and not _passes(half, limit - limit // 2 + 1)
    assert not _passes(stream(caps=4, skip=[(3, 5)]), limit - 1) and _passes(stream(caps=4, skip=[(3, 5)]), limit - 2)


def _passes(running: TokenStream, tokens: int) -> bool:
    try:
        running.check_caps(tokens)
    except DataError:
        return False
    return True


def test_skipped_ranges_are_passed_over_and_accounted() -> None:
    whole = naive_order(1000)
    kept = whole[:50] + whole[57:300] + whole[420:900]
    running = stream(skip=[(50, 57), (300, 420)])
    segments = running.take(len(kept))
    assert tokens_of(segments) == kept
    cursor = running.cursor()
    assert sum(cursor.trained.values()) == len(kept) and sum(cursor.drawn.values()) == 900
    resumed = stream(cursor, skip=[(50, 57), (300, 420)])
    assert tokens_of(resumed.take(100)) == whole[900:1000]


def test_no_label_reaches_into_a_skipped_range() -> None:
    whole = naive_order(1000)
    kept = [at for at in range(900) if not (50 <= at < 57 or 300 <= at < 420)]
    running = stream(skip=[(50, 57), (300, 420)])
    taken = 0
    for _ in range(70):
        for segment in running.take(10):
            taken += segment.stop - segment.start
            following = kept[taken - 1] + 1
            same_document = whole[following] == (segment.source, segment.document, segment.stop)
            assert segment.continues == (same_document and following in kept)


def test_a_cursor_of_another_plan_is_refused() -> None:
    cursor = stream().cursor()
    with pytest.raises(DataError, match="other shards, mix weights, curriculum or data seed"):
        stream(cursor, seed=4)
    with pytest.raises(DataError, match="data order has version 0"):
        stream(Cursor(0, cursor.plan_digest, cursor.drawn, cursor.skipped))
    with pytest.raises(DataError, match="cursor cannot be read"):
        Cursor.from_dict({"drawn": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"skipped": {"ko": 0}},
        {"skipped": None},
        {"drawn": {}},
        {"drawn": {"ko": -1, "en": 0, "code": 0}},
        {"skipped": {"ko": 10**9, "en": 0, "code": 0}},
        {"drawn": {"ko": "many", "en": 0, "code": 0}},
    ],
)
def test_a_cursor_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    running = stream()
    running.take(500)
    good = running.cursor().to_dict()
    assert set(good["drawn"]) == {"ko", "en", "code"} and Cursor.from_dict(good) == running.cursor()
    with pytest.raises(DataError, match="the checkpoint's data cursor cannot be read; resume from another checkpoint"):
        Cursor.from_dict(good | change)


def test_a_source_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="source 'ko' has no training tokens"):
        TokenStream({"ko": np.empty(0, np.int32)}, {"ko": MixSpec(weight=1)}, 0, "digest")


STAGES = {400: {"ko": "0.1", "code": "0.9"}, 777: {"ko": "0.2", "en": "0.8"}}


def curriculum(stages: dict[int, dict[str, str]] = STAGES) -> list[StageSpec]:
    return [StageSpec(from_tokens=at, weights={n: float(w) for n, w in s.items()}) for at, s in stages.items()]


def test_a_curriculum_is_the_definition_and_resumes_anywhere() -> None:
    expected = naive_order(1500, stages=STAGES)
    running = stream(curriculum=curriculum())
    assert tokens_of(running.take(1500)) == expected
    running = stream(curriculum=curriculum())
    for at in range(0, 1200, 7):
        resumed = stream(running.cursor(), curriculum=curriculum())
        assert tokens_of(resumed.take(60)) == expected[at : at + 60]
        running.take(7)


def test_a_source_of_weight_zero_gives_nothing_even_when_nobody_is_owed() -> None:
    equal = [StageSpec(from_tokens=1, weights={"en": 0.5, "code": 0.5})]
    lengths = {name: np.ones(50, np.int32) for name in WEIGHTS}
    mix = {name: MixSpec(weight=w, max_epochs=100) for name, w in WEIGHTS.items()}
    running = TokenStream(lengths, mix, 0, "digest", curriculum=equal)
    running.take(1001)
    assert running.cursor().drawn["ko"] == 1


# At 384 en is owed two documents.
OWED = {384: STAGES[400], 777: STAGES[777]}


def test_a_source_that_a_stage_leaves_out_gives_no_further_document() -> None:
    order = naive_order(777, stages=OWED)
    drawn = tokens_of(stream(curriculum=curriculum(OWED)).take(777))
    first = next(at for at in range(384, 777) if order[at][2] == 0)  # the document that is open at 384 is ended
    assert drawn == order
    assert all(source != 1 for source, _, _ in drawn[first:]), "en has no weight from 384 on"
    paid = naive_order(777, stages=OWED, pays_debts=True)
    assert any(source == 1 for source, _, _ in paid[first:]), "though it was owed some"


def test_a_run_that_has_paid_debts_goes_on_so() -> None:
    """A cursor of order version 2: until a source is left out it is that of today; from then on the old rule holds."""
    old = naive_order(900, stages=OWED, pays_debts=True)
    running = stream(curriculum=curriculum(OWED))
    running.take(384)
    assert running.cursor().order_version == 2
    running.take(100)
    assert running.cursor().order_version == 3
    counts = {name: sum(source == at for source, _, _ in old[:500]) for at, name in enumerate(WEIGHTS)}
    first = [[name, repr(weight)] for name, weight in WEIGHTS.items()]
    then = [[name, repr(float(OWED[384][name])) if name in OWED[384] else "0"] for name in WEIGHTS]
    begun = [[0, first], [384, then]]
    plan = hashlib.sha256(json.dumps([2, "digest", 3, begun]).encode()).hexdigest()
    resumed = stream(Cursor(2, plan, counts, dict.fromkeys(WEIGHTS, 0)), curriculum=curriculum(OWED))
    assert tokens_of(resumed.take(400)) == old[500:]
    assert resumed.cursor().order_version == 2


def test_stages_after_the_checkpoint_may_change_and_those_before_may_not() -> None:
    running = stream(curriculum=curriculum())
    running.take(500)
    later = curriculum({400: STAGES[400], 500: {"en": "1"}})
    assert tokens_of(stream(running.cursor(), curriculum=later).take(5))
    with pytest.raises(DataError, match="stages after the checkpoint may change"):
        stream(running.cursor(), curriculum=curriculum({499: STAGES[400]}))


def test_caps_follow_the_curriculum() -> None:
    # en: 44 tokens. By the mix 400 × 0.35 = 140; nothing from 400 to 777; then 0.8 of the rest: 140 + 0.8 × 223.
    with pytest.raises(DataError, match=r"'en' would need 358 tokens, but 44 × max_epochs 8 = 352"):
        stream(caps=8.0, curriculum=curriculum(), seed=3).check_caps(1000)


GROWN = {
    "ko": np.array([*LENGTHS["ko"], 4, 4, 8], np.int32),
    "en": np.array([*LENGTHS["en"], 30, 1], np.int32),
    "code": LENGTHS["code"],
}
BEFORE = ("digest", {name: len(lengths) for name, lengths in LENGTHS.items()})


def grown(cursor: Cursor | None = None) -> TokenStream:
    mix = {name: MixSpec(weight=weight, max_epochs=1000) for name, weight in WEIGHTS.items()}
    return TokenStream(GROWN, mix, 3, "later", earlier=[BEFORE], cursor=cursor)


def test_a_stream_goes_on_into_what_was_appended_as_if_that_had_been_there() -> None:
    whole = tokens_of(grown().take(600))
    first_epoch = min(LENGTHS[name].sum() / WEIGHTS[name] for name in ("ko", "en"))
    for cut in range(int(first_epoch) - 17):
        running = stream()
        assert tokens_of(running.take(cut)) == whole[:cut]
        resumed = grown(running.cursor())
        assert (resumed.left_out, tokens_of(resumed.take(600 - cut))) == (0, whole[cut:])
        assert grown(resumed.cursor()).position == 600, "and the next cursor is of the later data"


def test_every_document_of_an_epoch_is_given_once_those_of_before_first() -> None:
    order = SourceOrder("ko", GROWN["ko"], 3, [6, 3])
    for epoch in range(3):
        documents = order.permutation(epoch)(0, 9).tolist()
        assert sorted(documents[:6]) == list(range(6)) and sorted(documents[6:]) == [6, 7, 8]
        assert [order.permutation(epoch)(n, n + 4).tolist() for n in range(6)] == [
            documents[n : n + 4] for n in range(6)
        ]
    walked = [order.next()[0] for _ in range(20)]
    for consumed in range(sum(order.lengths[n] for n in walked[:15])):
        document, offset = order.seek(consumed)
        ends = np.cumsum(order.lengths[walked])
        at = int(np.searchsorted(ends, consumed, side="right"))
        if document < 0:
            assert consumed == (ends[at - 1] if at else 0) and order.next()[0] == walked[at]
        else:
            assert (document, offset) == (walked[at], consumed - (ends[at - 1] if at else 0))


def test_a_stream_beyond_what_was_there_stays_with_it() -> None:
    running = stream()
    running.take(400)
    resumed = grown(running.cursor())
    assert resumed.left_out == 5
    assert tokens_of(resumed.take(300)) == naive_order(700)[400:]
    assert grown(resumed.cursor()).left_out == 5, "also the next time"
    with pytest.raises(DataError, match="other shards"):
        stream(grown().cursor())
