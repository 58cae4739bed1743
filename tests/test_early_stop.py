"""Early stopping, dropout and the choice of the exported weights: when a run ends, and with which weights."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cells import on_cells, read_cell
from conftest import TEMPLATES
from group import events, rows, science
from ranks import command, on_ranks, train
from test_invariance import BATCH
from transformers import GPT2Config, LlamaConfig, MambaConfig

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.schema import Settings, scientific
from trainer.data.dataset import load, prepare
from trainer.distributed.engine import Step
from trainer.distributed.process_group import planned_world
from trainer.model.build import load_config
from trainer.report.run_data import read_folder
from trainer.run import open_folder
from trainer.tracking.jsonl import rewind
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, to_line
from trainer.training import checkpoint, loop
from trainer.training.checkpoint import Progress
from trainer.training.loop import Course
from trainer.training.run_plan import make_plan


@pytest.fixture(scope="module")
def words(tiny: str, records: tuple[str, str]) -> list[str]:
    text = f"--model {tiny} --data {records[0]} --val-data {records[1]} --block-size 16 --eval-batch 4"
    return [*f"{text} --global-batch {BATCH} --eval-every 2 --lr 0.02".split(), *TEMPLATES]


@pytest.fixture(scope="module")
def prepared(words: list[str], tiny: str) -> Path:
    settings = cli.read(["--mode", "full", *words]).settings
    return prepare(settings.data, model=tiny, global_batch=BATCH).folder


# --- the rule, without a model ---------------------------------------------------------------------------------------


class Still:
    """An engine that does nothing; what the evaluations say is put in the place of `loop.evaluate`."""

    world: Any = SimpleNamespace(rank=0, size=1, gather=lambda value: [value])
    lags = False

    def accumulate(self, micro: Any, *, step: int, counted: int) -> float:
        return 1.0

    def ask(self, rate: float, sums: list[float], *, stop: bool) -> Callable[[], Step]:
        return lambda: Step(nll=sum(sums), grad_norm=1.0, skipped=False, stop=stop)


def watched(
    monkeypatch: pytest.MonkeyPatch, words: list[str], prepared: Path, losses: list[float], *more: str,
    progress: Progress | None = None, stop_after: int | None = None,
) -> tuple[list[Any], list[Progress]]:  # fmt: skip
    """(records, saved states) of a run of up to 20 steps, 4 an epoch, whose evaluations give `losses` in turn."""
    left = iter(losses)
    monkeypatch.setattr(loop, "evaluate", lambda *_: (next(left), 1))
    settings = cli.read(["--mode", "full", *words, "--max-steps", "20", "--save-every", "never", *more]).settings
    course = Course(settings=settings, batch=settings.train.batch(1), total_steps=20, steps_per_epoch=4)
    saved: list[Progress] = []
    saver: Any = SimpleNamespace(save=lambda _, at: saved.append(at), amend=lambda at: saved.append(at))
    engine: Any = Still()
    done: list[Any] = []
    stream = loop.train(
        engine, load(prepared), course, progress or Progress(), saver,
        lambda: stop_after is not None and sum(getattr(r, "lr", 0) > 0 for r in done) == stop_after - 1,
    )  # fmt: skip
    for record in stream:
        done.append(record)
    return done, saved


@pytest.mark.parametrize(
    ("rule", "losses", "evaluations"),
    [
        ("1", [3, 2, 2.5, 9, 9], 3),
        ("2", [3, 2, 2.5, 1.9, 1.95, 1.94, 9], 6),  # 1.94 is under its neighbour, not under the lowest
        ("2", [3, 2, 2, 2, 9], 4),  # not lower is not better
        ("2:0.5", [3, 2.8, 2.6, 9], 3),  # each falls, but not by more than 0.5 below the mark of 3
        ("2:0.5", [3, 2.8, 2.4, 2.3, 2.2, 9], 5),  # the mark moves to 2.4 only
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_a_lower_loss(
    monkeypatch, words, prepared, rule, losses, evaluations
):
    done, saved = watched(monkeypatch, words, prepared, losses, "--early-stop", rule)
    last = 2 * (evaluations - 1)
    assert [row.step for row in done if isinstance(row, EvalRecord)] == list(range(0, last + 1, 2))
    assert [type(row) for row in done[-3:]] == [EvalRecord, EpochRecord, EventRecord]
    event = done[-1]
    best = min(losses[:evaluations])
    assert (event.event, event.step, event.facts["stale"]) == ("early_stop", last, int(rule[0]))
    assert event.facts["best"]["loss"] == best
    count = "1 evaluation" if rule == "1" else f"{rule[0]} evaluations in a row"
    assert f"stopped early after step {last} of 20: {count} did not lower" in event.message
    assert [at.step for at in saved] == [last], "the last state is saved, as at any end"


def test_without_the_flag_and_while_the_loss_falls_a_run_goes_to_its_end(monkeypatch, words, prepared):
    rising = [float(n) for n in range(11)]
    assert watched(monkeypatch, words, prepared, rising)[0][-1].step == 20
    done, _ = watched(monkeypatch, words, prepared, rising[::-1], "--early-stop", "1")
    assert not [row for row in done if isinstance(row, EventRecord)]
    assert done[-1].step == 20
    done, _ = watched(monkeypatch, words, prepared, [*rising[:0:-1], 99], "--early-stop", "1")
    assert not [row for row in done if isinstance(row, EventRecord)], "at the last step there is nothing left to stop"


def test_a_run_that_was_resumed_stops_where_it_would_have_stopped(monkeypatch, words, prepared):
    losses = [3, 2, 2.5, 2.4, 2.3, 9]
    rule = ("--early-stop", "3", "--save-every", "1")
    whole, saved = watched(monkeypatch, words, prepared, losses, *rule)
    assert whole[-1].step == 8
    for at in saved:
        seen = 1 + at.step // 2
        again, _ = watched(monkeypatch, words, prepared, losses[seen:], *rule, progress=at)
        assert [type(row) for row in again] == [type(row) for row in whole if row.step > at.step]
    assert not again, "from the stop itself nothing is left to do"
    first, stopped = watched(monkeypatch, words, prepared, losses, *rule, stop_after=8)
    assert first[-1].event == "interrupted"
    assert stopped[-1].pending
    again, amended = watched(monkeypatch, words, prepared, losses[4:], *rule, progress=stopped[-1])
    assert [type(row) for row in again] == [EvalRecord, EpochRecord, EventRecord]
    assert again[-1].event == "early_stop"
    assert not amended[-1].pending


def test_rows_that_come_again_with_an_evaluation_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    stop = EventRecord(event="early_stop", step=4, message="", time=1.0)
    kept = EventRecord(event="interrupted", step=4, message="", time=1.0)
    path.write_text(to_line(kept) + "\n" + to_line(stop) + "\n")
    assert rewind(path, 4, pending=True) == 1
    assert path.read_text() == to_line(kept) + "\n"
    path.write_text(to_line(stop) + "\n")
    assert rewind(path, 4) == 0, "a run that is resumed at its stop keeps the row"


# --- real ranks ------------------------------------------------------------------------------------------------------


def test_all_ranks_stop_at_the_same_step_under_every_number_of_ranks(words, prepared, tmp_path):
    """A fall of less than 10 nats does not count here, so the second evaluation after the first one ends the run."""
    rule = ["--max-steps", "12", "--early-stop", "2:10", "--save-every", "1"]
    for ranks, zero in ((1, "zero0"), (2, "zero3")):
        name = f"{ranks}"
        job = {
            "name": name, "flags": ["--mode", "full", *words, *rule, "--ds-config", zero], "data": str(prepared),
            "out": str(tmp_path),
        }  # fmt: skip
        again = {**job, "name": f"{name}-again", "resume": [name, 3]}
        stopped = {**job, "name": f"{name}-stopped", "resume": [name, 4]}
        on_cells(ranks, [job, again, stopped], tmp_path / "log")
        whole, _ = read_cell(tmp_path, name)
        assert [(row["kind"], row["step"]) for row in whole[-3:]] == [("eval", 4), ("epoch", 4), ("event", 4)]
        resumed = read_cell(tmp_path, f"{name}-again")[0]
        assert [row.get("loss") for row in resumed] == [row.get("loss") for row in whole if row["step"] > 3]
        assert read_cell(tmp_path, f"{name}-stopped")[0] == []


@pytest.fixture(scope="module")
def overfitted(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learns its 25 rows by heart: its validation loss falls, then rises, and the run stops."""
    out = tmp_path_factory.mktemp("early") / "run"
    more = ["--epochs", "40", "--early-stop", "3", "--save-every", "never", "--export", "best", "--dropout", "0.05"]
    output = train(["--mode", "full", *words, *more], out=out)
    assert "stopped early after step" in output
    assert "reloaded and checked" in output
    return out


def test_an_early_stop_is_a_good_end_and_the_record_says_so(overfitted):
    (stop,) = events(overfitted, "early_stop")
    (end,) = events(overfitted, "finished")
    assert end["facts"]["early_stop"] is True
    assert end["step"] == stop["step"] < json.loads((overfitted / "run.json").read_text())["resolved"]["total_steps"]
    run = read_folder(overfitted)
    assert run.finished
    assert not run.notes
    assert [point.step for point in checkpoint.find(overfitted / "checkpoints")][-1] == stop["step"]


def test_what_is_exported_is_the_best_checkpoint_and_all_records_say_which(overfitted):
    (end,) = events(overfitted, "finished")
    best = min((row for row in rows(overfitted) if row["kind"] == "eval"), key=lambda row: row["loss"])
    assert best["step"] < end["step"]
    assert end["facts"]["exported"] == {"which": "best", "step": best["step"], "loss": best["loss"]}
    found = re.search(r"validation loss (\S+) \(recorded (\S+)\)", end["facts"]["export"])
    assert found is not None
    assert found[2] == f"{best['loss']:.6f}"
    assert float(found[1]) == pytest.approx(best["loss"], rel=1e-6), "what the export is held to"
    card = (overfitted / "model" / "README.md").read_text()
    assert f"after step {best['step']:,} of" in card
    assert f"training went on to step {end['step']}." in card
    assert f"The run stopped early after step {end['step']} of" in card
    assert json.loads((overfitted / "run.json").read_text())["settings"]["output"]["export"] == "best"


@pytest.mark.sweep
def test_the_same_weights_are_exported_under_zero3_with_adapters(words, tmp_path):
    more = ["--epochs", "40", "--early-stop", "2", "--save-every", "never", "--export", "best", "--lr", "0.1"]
    out = tmp_path / "run"
    train(["--mode", "lora", *words, *more, "--ds-config", "zero3"], out=out, ranks=2)
    (end,) = events(out, "finished")
    assert end["facts"]["exported"]["step"] < end["step"], "otherwise nothing is shown here"
    assert end["facts"]["export"].startswith("reloaded and checked")


def test_a_run_resumed_at_its_stop_ends_there_and_a_change_of_the_rule_is_refused(overfitted, words, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(overfitted, out)
    train(["--mode", "full", "--resume"], out=out)
    assert science(out) == science(overfitted)
    assert len(events(out, "early_stop")) == len(events(out, "finished")) == 1
    log = tmp_path / "refused.log"
    words = ["--mode", "full", "--resume", "--early-stop", "9", "--out", str(out)]
    assert on_ranks(1, command, words, log=log) == 2
    assert "early_stop is 9 and was 3 in this run" in log.read_text()


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["0", "-1", "x", "2:", "2:-1", "2:x", "1.5", "2:nan"])
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(UserError, match=r"--early-stop .*: expected PATIENCE"):
        cli.read(["--mode", "full", f"--early-stop={rule}"])


def test_a_rule_without_evaluations_is_refused():
    with pytest.raises(UserError, match="--eval-every never: there is no evaluation to stop at"):
        cli.read(["--mode", "full", "--early-stop", "2", "--eval-every", "never"])


def test_dropout_sets_all_three_of_gpt2_and_the_plan_says_so(words, prepared):
    settings = cli.read(["--mode", "full", *words, "--dropout", "0.25"]).settings
    config = load_config(settings.model)
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0.25, 0.25, 0.25)
    world = planned_world(1, "cpu")
    model = {"trainable": 1, "parameters": 1, "name": "x", "lora_targets": []}
    plan = make_plan(settings, world, load(prepared), model, config)
    assert plan.resolved()["dropout"] == 0.25, "the fact by which the comparison tells runs apart"
    own = cli.read(["--mode", "full", *words]).settings
    assert make_plan(own, world, load(prepared), model, load_config(own.model)).resolved()["dropout"] == 0.0


def test_dropout_of_other_models_goes_where_their_config_has_it_or_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    settings = cli.read(["--mode", "full", "--model", str(tmp_path / "llama"), "--dropout", "0.1"]).settings
    assert load_config(settings.model).attention_dropout == 0.1
    MambaConfig().save_pretrained(tmp_path / "mamba")
    settings = cli.read(["--mode", "full", "--model", str(tmp_path / "mamba"), "--dropout", "0.1"]).settings
    with pytest.raises(UserError, match=r"--dropout 0.1: .*\(mamba\) has no dropout to set"):
        load_config(settings.model)
    assert GPT2Config().resid_pdrop == 0.1, "the class is left alone"


def test_a_change_of_dropout_is_refused_on_resume_apart_from_that_of_the_adapters():
    settings = cli.read(["--mode", "lora", "--dropout", "0.2", "--lora-dropout", "0.3"]).settings
    kept = scientific(settings)
    assert (kept["dropout"], kept["lora_dropout"]) == (0.2, 0.3)


def test_a_run_from_before_these_settings_is_still_read(overfitted):
    values = json.loads((overfitted / "run.json").read_text())["settings"]
    del values["model"]["dropout"], values["train"]["early_stop"], values["output"]["export"]
    old = Settings.from_dict(values)
    assert (old.model.dropout, old.train.patience, old.output.export) == (None, None, "last")
    assert open_folder(cli.read(["--mode", "full", "--resume", "--out", str(overfitted)]))[1]
