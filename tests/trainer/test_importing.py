"""Imports without the garbage collector."""

from __future__ import annotations

import gc

from trainer.process.importing import uncollected


def test_the_collector_rests_and_then_works_on_what_comes_later():
    try:
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > 1000
        gc.disable()
        with uncollected():
            pass
        assert not gc.isenabled(), "as it was"
    finally:
        gc.enable()
        gc.unfreeze()
