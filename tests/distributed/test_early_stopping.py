"""Early stopping, dropout and the choice of the exported weights: when a run ends, and with which weights."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from helpers.launch_ranks import train
from helpers.matrix import GLOBAL_BATCH
from helpers.process_groups import read_events, read_records, read_reproducible_records
from helpers.tiny_inputs import tiny_argv
from transformers import GPT2Config, LlamaConfig, MambaConfig

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.data.dataset import load
from trainer.distributed.engine import StepResult
from trainer.distributed.process_group import simulated_context
from trainer.model.build import load_config
from trainer.report.run_data import read_folder
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, StepRecord
from trainer.training import checkpoint, loop
from trainer.training.evaluation import Evaluation
from trainer.training.run_plan import make_plan
from trainer.training.schedule import TrainSchedule, TrainState


@pytest.fixture(scope="module")
def argv(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    text = f"--block-size 16 --eval-batch 4 --global-batch {GLOBAL_BATCH} --eval-every 2 --lr 0.02"
    return tiny_argv(tiny_model, data_files, text)


@pytest.fixture
def run_losses(monkeypatch: pytest.MonkeyPatch, argv: list[str], data_dir: Path) -> Any:
    """A function: (records, saved states) of a run of up to 20 steps, 4 an epoch, whose evaluations give `losses`. Its
    engine does nothing; a signal comes in step `stop_after`."""

    def run(
        losses: list[float], *flags: str, state: TrainState | None = None, stop_after: int = 0
    ) -> tuple[list[Any], list[TrainState]]:
        monkeypatch.setattr(loop, "evaluate", Mock(side_effect=[Evaluation([loss], loss, 1) for loss in losses]))
        argv_of_run = ["--mode", "full", *argv, "--max-steps", "20", "--save-every", "never", *flags]
        settings = cli.parse_args(argv_of_run).settings
        sizes = {"num_examples": 4 * GLOBAL_BATCH, "total_steps": 20, "steps_per_epoch": 4}
        schedule = TrainSchedule(settings=settings, batch=settings.train.batch(1), **sizes)
        records: list[Any] = []
        saved: list[TrainState] = []

        def run_steps(batches: Any, lr_at: Any, should_stop: Any) -> Any:
            numbers = {"loss_sum": 1.0, "grad_norm": 1.0, "elapsed_seconds": 1.0, "is_skipped": False}
            for batch in batches:
                is_stopped = should_stop()
                yield batch, StepResult(**numbers, stop_requested=is_stopped, lr=lr_at(batch.step))
                if is_stopped:
                    return

        def should_stop() -> bool:
            return sum(isinstance(record, StepRecord) for record in records) == stop_after - 1

        engine: Any = SimpleNamespace(dist_context=SimpleNamespace(rank=0), run=run_steps)
        manager: Any = SimpleNamespace(save=lambda _, at: saved.append(at), update_train_state=saved.append)
        for record in loop.train(engine, load(data_dir), schedule, state or TrainState(), manager, should_stop):
            if isinstance(record, EventRecord) and record.event == "checkpoint":
                assert record.step == saved[-1].step, "a row for each, after it was saved"
            else:
                records.append(record)
        return records, saved

    return run


@pytest.mark.parametrize(
    ("rule", "losses", "evaluations"),
    [
        ("1", [3, 2, 2.5, 9, 9], 3),
        ("2", [3, 2, 2.5, 1.9, 1.95, 1.94, 9], 6),  # 1.94 is under its neighbour, not under the lowest
    ],
)
def test_early_stopping_ends_a_run_after_its_patience_without_a_lower_loss(run_losses, rule, losses, evaluations):
    records, saved = run_losses(losses, "--early-stop", rule)
    last = 2 * (evaluations - 1)
    assert [row.step for row in records if isinstance(row, EvalRecord)] == list(range(0, last + 1, 2))
    assert [type(row) for row in records[-3:]] == [EvalRecord, EpochRecord, EventRecord]
    event = records[-1]
    assert (event.event, event.step) == ("early_stop", last)
    assert event.facts["best"]["loss"] == min(losses[:evaluations])
    assert f"stopped early after step {last} of 20: no lower validation loss than " in event.message
    assert [at.step for at in saved] == [last], "the last state is saved, as at any end"


def test_a_resumed_run_stops_early_where_it_would_have_stopped(run_losses):
    losses = [3, 2, 2.5, 2.4, 2.3, 9]
    rule = ("--early-stop", "3", "--save-every", "1")
    whole, saved = run_losses(losses, *rule)
    assert whole[-1].step == 8
    for at in saved:
        again, _ = run_losses(losses[1 + at.step // 2 :], *rule, state=at)
        assert [type(row) for row in again] == [type(row) for row in whole if row.step > at.step]
    assert not again, "from the stop itself nothing is left to do"
    first, stopped = run_losses(losses, *rule, stop_after=8)
    assert first[-1].event == "interrupted"
    again, amended = run_losses(losses[4:], *rule, state=stopped[-1])
    assert [type(row) for row in again] == [EvalRecord, EpochRecord, EventRecord]
    assert (stopped[-1].eval_pending, amended[-1].eval_pending) == (True, False)


@pytest.fixture(scope="module")
def overfitted_run(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learns its 25 rows by heart: its validation loss falls, then rises, and the run stops."""
    out = tmp_path_factory.mktemp("early") / "run"
    flags = ["--epochs", "40", "--early-stop", "3", "--save-every", "never", "--export", "best", "--dropout", "0.05"]
    output = train(["--mode", "full", *argv, *flags], out=out)
    assert "stopped early after step" in output
    assert "reloaded and checked" in output
    return out


def test_an_early_stop_is_a_good_end_that_exports_the_best_weights_and_all_records_say_so(overfitted_run):
    (stop,), (end,) = (read_events(overfitted_run, name) for name in ("early_stop", "finished"))
    assert end["facts"]["early_stop"] is True
    run = read_folder(overfitted_run)
    assert end["step"] == stop["step"] < run.metadata["resolved"]["total_steps"]
    assert run.is_finished
    assert not run.notes
    assert checkpoint.list_checkpoints(overfitted_run / "checkpoints")[-1].step == stop["step"]
    best = min((row for row in read_records(overfitted_run) if row["kind"] == "eval"), key=lambda row: row["loss"])
    assert best["step"] < end["step"]
    assert end["facts"]["exported"] == {"which": "best", "step": best["step"], "loss": best["loss"]}
    match = re.search(r"validation loss (\S+) \(recorded (\S+)\)", end["facts"]["export"])
    assert match is not None
    assert match[2] == f"{best['loss']:.6f}"
    assert float(match[1]) == pytest.approx(best["loss"], rel=1e-6), "what the export is held to"


def test_a_run_resumed_at_its_early_stop_ends_there(overfitted_run, tmp_path):
    out = shutil.copytree(overfitted_run, tmp_path / "again")
    train(["--mode", "full", "--resume"], out=out)
    assert read_reproducible_records(out) == read_reproducible_records(overfitted_run)
    assert len(read_events(out, "early_stop")) == len(read_events(out, "finished")) == 1


def test_dropout_goes_where_the_models_config_has_it_or_is_refused_and_the_plan_says_so(argv, data_dir, tmp_path):
    for flags, expected in ((["--dropout", "0.25"], 0.25), ([], 0.0)):
        settings = cli.parse_args(["--mode", "full", *argv, *flags]).settings
        config = load_config(settings.model)
        assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (expected,) * 3
        plan = make_plan(settings, simulated_context(1), load(data_dir))
        assert plan.resolved()["dropout"] == expected, "the fact by which the comparison tells runs apart"
    other = cli.parse_args(["--mode", "full", "--dropout", "0.1", "--model", str(tmp_path)]).settings.model
    LlamaConfig().save_pretrained(tmp_path)
    assert load_config(other).attention_dropout == 0.1
    MambaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"--dropout 0.1: .*\(mamba\) has no dropout to set"):
        load_config(other)
    assert GPT2Config().resid_pdrop == 0.1, "the class is left alone"
