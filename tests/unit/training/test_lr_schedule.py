"""The learning rate: linear warm-up, linear to zero, number by number as Hugging Face's scheduler."""

import pytest

from trainer.training.lr_schedule import learning_rate

CARD = {"peak_lr": 3e-5, "warmup_steps": 0, "total_steps": 19_863}  # the card's rate and its 3 x 6,621 steps


def test_without_warmup_the_lr_falls_from_the_peak_to_one_decay_step_above_zero() -> None:
    assert learning_rate(0, **CARD) == 3e-5
    assert learning_rate(19_862, **CARD) == pytest.approx(3e-5 / 19_863, rel=1e-12)
    assert learning_rate(19_863, **CARD) == 0.0


def test_the_learning_rate_falls_by_the_same_amount_every_step() -> None:
    rates = [learning_rate(step, peak_lr=1.0, warmup_steps=0, total_steps=8) for step in range(9)]
    assert rates == [1 - step / 8 for step in range(9)]


def test_lr_warmup_rises_from_zero_to_the_peak_and_then_the_decay_begins() -> None:
    rates = [learning_rate(step, peak_lr=1.0, warmup_steps=4, total_steps=8) for step in range(9)]
    assert rates == [0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_learning_rate_never_goes_below_zero_after_the_end() -> None:
    assert learning_rate(12, peak_lr=1.0, warmup_steps=0, total_steps=8) == 0.0
    assert learning_rate(9, peak_lr=1.0, warmup_steps=8, total_steps=8) == 0.0


@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 11), (5, 5), (0, 1)])
def test_the_learning_rate_is_that_of_hugging_faces_linear_scheduler(warmup: int, total: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total):
        assert learning_rate(step, peak_lr=0.3, warmup_steps=warmup, total_steps=total) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
