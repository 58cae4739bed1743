"""The learning rate: linear warm-up, linear to zero, number by number as Hugging Face's scheduler."""

import pytest

from trainer.training.lr_schedule import learning_rate

CARD = {"peak": 3e-5, "warmup": 0, "total": 19_863}  # the card's rate and its 3 x 6,621 steps


def test_without_warmup_the_first_update_has_the_full_rate_and_the_last_one_step_less_than_all() -> None:
    assert learning_rate(0, **CARD) == 3e-5
    assert learning_rate(19_862, **CARD) == pytest.approx(3e-5 / 19_863, rel=1e-12)
    assert learning_rate(19_863, **CARD) == 0.0


def test_the_rate_falls_by_the_same_amount_every_step() -> None:
    rates = [learning_rate(step, peak=1.0, warmup=0, total=8) for step in range(9)]
    assert rates == [1 - step / 8 for step in range(9)]


def test_warmup_rises_from_zero_to_the_peak_and_then_the_decay_begins() -> None:
    rates = [learning_rate(step, peak=1.0, warmup=4, total=8) for step in range(9)]
    assert rates == [0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_rate_never_goes_below_zero_after_the_end() -> None:
    assert learning_rate(12, peak=1.0, warmup=0, total=8) == 0.0
    assert learning_rate(9, peak=1.0, warmup=8, total=8) == 0.0


@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 11), (5, 5), (0, 1)])
def test_it_is_the_scheduler_of_hugging_face(warmup: int, total: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total):
        assert learning_rate(step, peak=0.3, warmup=warmup, total=total) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
