"""Claims and leases: each trial is run once and counted once, whoever dies."""

import math
import multiprocessing
import os
import threading
from pathlib import Path

import pytest
from helpers.process_groups import wait_until
from helpers.study_rules import make_candidate, make_trial

from trainer.config.errors import UserError
from trainer.tools.study.search import TrialSpec
from trainer.tools.study.trial_queue import JOURNAL_FILE, LEASE_SECONDS, TrialQueue
from trainer.tools.study.worker import Slot, train_environ
from trainer.tracking.wandb_environment import RUN_VARIABLES


def make_specs(count: int) -> list[TrialSpec]:
    return [make_trial(make_candidate(rate_index=-n)) for n in range(count)]


@pytest.mark.parametrize("is_at_one_moment", [False, True])
def test_a_trial_that_two_workers_enqueue_counts_once(is_at_one_moment, tmp_path, monkeypatch):
    first, second = (TrialQueue(tmp_path, name) for name in ("a", "b"))
    specs = make_specs(3)
    first.enqueue(specs)
    with monkeypatch.context() as patch:
        if is_at_one_moment:
            patch.setattr(second, "trials", dict)  # as it was when the other had not yet written
        second.enqueue(specs)
    assert list(first.trials()) == [spec.name for spec in specs]
    claim, _ = first.claim(specs[:1])
    assert second.claim(specs[:1]) is None
    assert first.finish(claim, loss=1.5)
    assert second.results() == {specs[0].name: 1.5}
    assert second.claim(specs[:1]) is None


def test_a_live_workers_trial_is_left_to_it_and_a_dead_ones_is_taken_up_again(tmp_path):
    """Each worker by its own clock, which stands somewhere else on every machine."""
    now = [1000.0]
    offsets = {"a": 0.0, "b": 1e6, "c": -1e6}
    queues = {name: TrialQueue(tmp_path, name, clock=lambda name=name: now[0] + offsets[name]) for name in offsets}
    specs = make_specs(1)
    queues["a"].enqueue(specs)
    claim, _ = queues["a"].claim(specs)
    assert queues["b"].claim(specs) is None, "whoever comes watches it for a lease's length"
    now[0] += LEASE_SECONDS - 1
    assert queues["b"].claim(specs) is None
    assert queues["a"].renew(claim)
    assert queues["b"].claim(specs) is None
    now[0] += LEASE_SECONDS - 1
    assert queues["b"].claim(specs) is None, "the lease was renewed"
    now[0] += 2
    own_trial, _ = queues["b"].claim(specs)
    assert (own_trial.attempt, own_trial.num_failures) == (2, 1)
    assert queues["c"].claim(specs) is None
    assert not queues["a"].renew(claim), "the one that was taken for dead must stop"
    assert not queues["a"].finish(claim, loss=9.0)
    assert queues["b"].finish(own_trial, loss=2.0)
    trial = queues["c"].trials()[specs[0].name]
    assert (trial.loss, trial.is_finished) == (2.0, True)


def test_a_released_trial_can_be_taken_up_at_once(tmp_path):
    queues = [TrialQueue(tmp_path, name) for name in ("a", "b")]
    queues[0].enqueue(make_specs(1))
    claim, _ = queues[0].claim(make_specs(1))
    for has_failed in (False, False, True, False, True):
        queues[0].release(claim, has_failed=has_failed)
        claim, _ = queues[1].claim(make_specs(1))
    assert (claim.attempt, claim.num_failures) == (6, 2), "a study that was stopped is no failure of its trial"


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_a_trial_that_failed_is_a_result_with_its_reason(tmp_path, loss):
    queue = TrialQueue(tmp_path, "a")
    queue.enqueue(make_specs(1))
    claim, spec = queue.claim(make_specs(1))
    queue.finish(claim, loss=loss, failure="out of memory" if loss is None else "loss inf", has_diverged=bool(loss))
    trial = queue.trials()[spec.name]
    assert (trial.is_finished, trial.failure) == (True, "loss inf" if loss else "out of memory")
    assert math.isinf(trial.loss) if loss else math.isnan(trial.loss), "what failed otherwise says nothing of a rate"
    assert queue.claim([spec]) is None, "it is not run again"


def test_workers_that_race_claim_each_trial_once(tmp_path):
    specs = make_specs(6)
    TrialQueue(tmp_path, "start").enqueue(specs)
    claimed: list[str] = []
    barrier = threading.Barrier(4)

    def work(name: str) -> None:
        queue = TrialQueue(tmp_path, name)
        barrier.wait()
        while claim := queue.claim(specs):
            claimed.append(claim[1].name)
            queue.finish(claim[0], loss=1.0)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(claimed) == sorted(spec.name for spec in specs)


def claim_and_finish_for_ever(folder: str) -> None:
    queue = TrialQueue(Path(folder), str(os.getpid()))
    for number in range(10**6):
        spec = make_trial(make_candidate(), num_steps=number, seed=os.getpid())
        queue.enqueue([spec])
        claim, _ = queue.claim([spec])
        queue.finish(claim, loss=1.0)


def test_a_worker_killed_while_it_writes_leaves_a_journal_that_the_others_go_on_with(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=claim_and_finish_for_ever, args=(str(tmp_path),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    journal = tmp_path / JOURNAL_FILE
    wait_until(lambda: journal.exists() and journal.stat().st_size >= 20_000, 60)
    for worker in workers:
        worker.kill()
        worker.join(30)
    with open(journal, "ab") as file:
        file.write(b'{"op_code": 4, "worker_id": "cut o')
    queue = TrialQueue(tmp_path, "after")
    num_finished = len(queue.results())
    assert num_finished > 5
    queue.enqueue(make_specs(1))
    claim, spec = queue.claim(make_specs(1))
    assert queue.finish(claim, loss=0.5)
    assert TrialQueue(tmp_path, "later").results()[spec.name] == 0.5
    assert len(queue.results()) == num_finished + 1


def test_a_journal_of_another_rule_is_refused(tmp_path):
    TrialQueue(tmp_path, "a").bind("1" * 64)
    TrialQueue(tmp_path, "b").bind("1" * 64)
    with pytest.raises(UserError, match=r"run by the rule 111111111111, rule.json is 222222222222: it was changed"):
        TrialQueue(tmp_path, "c").bind("2" * 64)


OTHER_LINES = [b"[]", b"3", b"null", b"{}", b'{"op_code": 99}', b'{"op_code": "x"}', b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("line", [*OTHER_LINES, b"9" * 5000, None])
def test_a_journal_that_holds_something_else_or_is_a_folder_is_one_line(line, tmp_path):
    path = tmp_path / JOURNAL_FILE
    path.mkdir() if line is None else path.write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"journal.log: cannot be used as the study's journal \(.*\); check") as caught:
        TrialQueue(tmp_path, "a")
    assert "\n" not in str(caught.value)


def test_variables_that_name_one_wandb_run_do_not_reach_a_studys_trials(monkeypatch):
    for name in RUN_VARIABLES:
        monkeypatch.setenv(name, "mine")
    slot = Slot(name="a", gpus=(), num_threads=1)
    environ = train_environ(slot, "study-f")
    assert not set(RUN_VARIABLES) & set(environ)
    assert environ["WANDB_RUN_GROUP"] == "study-f"
