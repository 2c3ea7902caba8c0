import pytest

from trainer.recording.results import headline_loss, loss_of


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], (None, 0)),
        ([8.0], (8.0, 1)),
        ([8.0] * 18 + [4.0, 2.0], (3.0, 2)),
        ([8.0] * 950 + [2.0] * 50, (2.0, 50)),
        ([8.0] * 18 + [None, 2.0], (2.0, 1)),
        ([8.0] * 18 + [None, None], (None, 0)),
    ],
    ids=["none", "one", "a tenth", "at most 50", "one skipped", "all skipped"],
)
def test_the_loss_to_tell_is_the_mean_of_the_last_steps(losses, expected):
    assert headline_loss([{"step": n, "loss": loss} for n, loss in enumerate(losses, start=1)]) == expected


def test_a_person_is_told_of_how_many():
    assert (loss_of(30), loss_of(1)) == ("mean of the last 30 steps", "of the last step")
