"""What a run notices of itself: each finding fires when it should, made by a fault, and none on healthy runs. The
faults are real where a small model can have them; what needs a GPU or minutes of time is made of rows."""

import contextlib
import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import joined_ranks, start_engine
from helpers.fake_runs import make_metadata as make_run_metadata
from helpers.launch_ranks import train as train_on_ranks
from helpers.matrix import launch_jobs, make_job
from helpers.process_groups import read_events, read_records, read_reproducible_records
from helpers.tiny_inputs import tiny_argv, write_records

from trainer.config.errors import TrainingError
from trainer.tracking.records import EvalRecord, EventRecord, Record, StepRecord
from trainer.tracking.wandb_logger import wandb_block
from trainer.training.diagnostics import TOPICS, Diagnostic, DiagnosticsMonitor
from trainer.training.loop import train
from trainer.training.recorder import Recorder

STEPS = 200


def make_metadata(**overrides: Any) -> dict[str, Any]:
    """The metadata of a full run of STEPS steps on one CPU rank; `overrides` as of `make_run_metadata`."""
    return make_run_metadata("full", resolved__total_steps=STEPS, **overrides)


def healthy_loss(step: int) -> float:
    return 2.0 + 2.0 * math.exp(-step / 40)


def make_run_records(
    *,
    seed: int = 0,
    steps: int = STEPS,
    loss: Callable[[int], float] = healthy_loss,
    val: Callable[[int], float] = healthy_loss,
    noise: float = 0.1,
    seconds: float = 0.1,
    eval_every: int = 50,
    eval_seconds: float = 1.0,
) -> Iterator[Record]:
    """Steps with noise of this standard deviation, of so many seconds; evaluations in between; 50 steps an epoch."""
    rng, clock = random.Random(seed), 0.0
    for step in range(steps + 1):
        axes: dict[str, Any] = {"step": step, "epoch": step / 50, "samples": step, "tokens": step}
        if step:
            clock += seconds
            numbers = {"loss": loss(step) + rng.gauss(0, noise), "grad_norm": 0.8}
            yield StepRecord(**axes, **numbers, lr=5e-4, tokens_per_second=1.0, time=clock)
        if step % eval_every == 0:
            clock += eval_seconds if step else 0.0
            yield EvalRecord(**axes, loss=val(step), perplexity=1.0, eval_tokens=1, time=clock)


def diagnose(
    metadata: dict[str, Any], stream: Iterable[Record], seconds_per_record: tuple[str, float] = ("data", 0.0)
) -> dict[str, Diagnostic]:
    """{code: finding} of a stream of records; `seconds_per_record`: on what, and how many, are spent before each."""
    monitor, diagnostics = DiagnosticsMonitor(metadata), {}
    for record in stream:
        monitor.seconds[seconds_per_record[0]] += seconds_per_record[1]
        for diagnostic in monitor.on_record(record):
            assert diagnostic.code not in diagnostics, "said once"
            diagnostics[diagnostic.code] = diagnostic
    return diagnostics


def exploding_loss(step: int) -> float:
    return healthy_loss(step) * (1 + max(0, step - 120) / 80)


def memorizing_run(rise: float = 0.002, **options: Any) -> Iterator[Record]:
    return make_run_records(val=lambda step: 4 - step / 50 if step <= 100 else 2 + rise * (step - 100), **options)


def flat_loss_run(val_rise: float = 0.0) -> Iterator[Record]:
    return make_run_records(loss=lambda _: 4.0, val=lambda step: 4.0 + val_rise * min(step, 30), eval_every=25)


def jumping_run(loss: float) -> Iterator[Record]:
    """Of six steps: the first has the loss of the weights before training."""
    return make_run_records(steps=6, loss=lambda step: 4.0 if step == 1 else loss)


def nan_loss_run() -> list[Record]:
    message = "step 10: loss nan; the weights are those after step 9"
    return [*make_run_records(steps=9), EventRecord(event="not_finite", step=10, message=message, time=1.0)]


def slow_run(**options: Any) -> Iterator[Record]:
    return make_run_records(seconds=1.0, **options)


PRETRAINED = {"model__init": "pretrained", "data__vocabulary": 97}  # a guess costs ln 97 = 4.57
EVERY_10 = {"eval_every": 10, "eval_seconds": 30}
#: {fault: (code, a word of the remedy, rows, facts of the run, on what seconds are spent before each row)}
FAULTS: dict[str, tuple[Any, ...]] = {
    "flat": ("flat_loss", "--lr 1e-08", flat_loss_run(), {"settings__train__lr": 1e-9}),
    "flat and worse": ("flat_loss", "--lr 0.01", flat_loss_run(val_rise=0.01), {"settings__train__lr": 0.1}),
    "rising": ("diverging", "--lr 0.0002", make_run_records(loss=exploding_loss), {}),
    "jump": ("diverging", "--lr 5e-05", jumping_run(9.0), {}),
    "above a guess": ("diverging", "--lr 5e-05", jumping_run(4.75), PRETRAINED),
    "not finite": ("diverging", "--lr 0.0002", nan_loss_run(), {"resolved__precision": "bf16"}),
    "by heart": ("overfitting", "--early-stop 1 --export best", memorizing_run(), {}),
    "by heart, stopping": (
        "overfitting",
        "--dropout 0.2",
        memorizing_run(),
        {"settings__train__early_stop": 3, "resolved__dropout": 0.1},
    ),
    "data": ("waiting_for_data", "TRAINER_CACHE", slow_run(), {}, ("data", 0.3)),
    "evaluation": (
        "much_evaluation",
        "--eval-every epoch",
        slow_run(**EVERY_10),
        {"settings__output__eval_every": "10"},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_diagnosed_once_and_nothing_else_is(name):
    code, remedy, stream, facts, *spent = FAULTS[name]
    diagnostics = diagnose(make_metadata(**facts), stream, *spent)
    assert set(diagnostics) == {code}
    finding = diagnostics[code]
    assert remedy in finding.remedy
    assert finding.cause
    line = finding.to_record(7, 1.5)
    assert line.message.startswith(f"{TOPICS[code]}: {finding.seen}. Likely cause: ")
    if name == "by heart":
        assert "rose for 1 epochs, since epoch 2 (step 100): 2.0000 -> 2.1000" in finding.seen


def test_every_diagnostic_code_has_a_fault_in_the_tests():
    assert {fault[0] for fault in FAULTS.values()} == set(TOPICS)


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(5, 20))])
def test_records_of_a_healthy_run_give_no_diagnostic(seed):
    """Noisy, slow enough to be timed, with the ups and downs of an evaluation that stands still."""
    dice = random.Random(seed)
    facts: Any = dice.choice([{}, {"resolved__ranks": 2, "resolved__precision": "bf16"}])
    stream = make_run_records(
        seed=seed,
        noise=dice.uniform(0.02, 0.4),
        seconds=dice.uniform(0.1, 2),
        val=lambda step: healthy_loss(step) + dice.gauss(0, 0.003),
        eval_every=dice.choice([10, 25, 50]),
    )
    assert diagnose(make_metadata(**facts), stream) == {}


@pytest.mark.parametrize(
    ("stream", "spent", "expected"),
    [
        pytest.param(make_run_records(seconds=0.2), ("data", 0.1), set(), id="40 seconds are too short"),
        pytest.param(slow_run(steps=4, eval_every=4, eval_seconds=90), ("data", 0), set(), id="the last one alone"),
        pytest.param(slow_run(steps=8, eval_every=4, eval_seconds=90), ("data", 0), {"much_evaluation"}, id="two"),
        pytest.param(make_run_records(val=lambda step: float(step < 50)), ("data", 0), set(), id="a loss of 0"),
    ],
)
def test_a_diagnosis_waits_for_enough_evidence(stream, spent, expected):
    assert set(diagnose(make_metadata(), stream, spent)) == expected


def test_a_diagnostic_is_reported_once_across_a_resume():
    """Wherever the run is cut, both parts together say what the whole one says; rows are all that is handed on."""
    stream = list(make_run_records(loss=exploding_loss))
    whole = diagnose(make_metadata(), stream)
    assert set(whole) == {"diverging"}
    for cut in range(0, len(stream), 7):
        written: list[Record] = []
        first = DiagnosticsMonitor(make_metadata())
        for record in stream[:cut]:
            written += [record, *(f.to_record(record.step, record.time) for f in first.on_record(record))]
        second = DiagnosticsMonitor(make_metadata())
        assert second.replay(written) == []
        diagnostics = [finding for record in stream[cut:] for finding in second.on_record(record)]
        assert diagnostics == [whole[code] for code in whole if code not in first.reported_codes]
    lost = DiagnosticsMonitor(make_metadata())
    assert {f.code for f in lost.replay(stream)} == set(whole), "killed between a row and its finding"
    without_a_row = [record for record in make_run_records(eval_every=1) if (record.step, record.kind) != (2, "step")]
    assert DiagnosticsMonitor(make_metadata()).replay(without_a_row) == [], "as --allow-change records has it"


def diagnose_jobs(jobs: list[dict[str, Any]]) -> int:
    """Run each job into its own run folder."""
    with joined_ranks() as dist_context:
        for job in jobs:
            run = start_engine(job, dist_context)
            folder = Path(run.settings.run_folder)
            folder.mkdir(parents=True)
            manager = run.checkpoint_manager(folder / "checkpoints", save_total_limit=1)
            metadata = run.plan.to_metadata(run_id="test", wandb=wandb_block(run.settings.output, "test"))
            recorder = Recorder(run.plan, run.data, run.engine, metadata, run.state)
            with contextlib.suppress(TrainingError):
                recorder.follow(train(run.engine, run.data, run.plan.schedule, run.state, manager, lambda: False))
    return 0


Job = tuple[str, str]  # data, flags


def diagnose_real_runs(model: str, out: Path, jobs: dict[str, Job]) -> dict[str, dict[str, int]]:
    """{name: {code of a finding: its step}} of real runs on one rank."""
    paths = {
        name: write_records(out / f"{name}.jsonl", num_records=count, seed=seed)
        for name, count, seed in (("many", 200, 3), ("few", 25, 3), ("val", 40, 4))
    }
    rng = random.Random(5)
    numbers = [rng.randrange(1, 90) for _ in range(200)]
    rows = [{"prompt": f"w{n}", "completion": f" w{n + 1} w{n + 2}"} for n in numbers]
    paths["short"] = str(out / "short.jsonl")
    Path(paths["short"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "--objective blocks --block-size 24 --eval-batch 20 --global-batch 8 --save-every never --num-samples 0"
    rank_jobs = []
    for name, (data, flags) in jobs.items():
        files = paths[data], paths["short" if data == "short" else "val"]
        rank_jobs.append(make_job(out, name, tiny_argv(model, files, f"{text} {flags} --output-dir {out / name}")))
    launch_jobs(1, rank_jobs, target=diagnose_jobs)
    events = {name: read_events(out / name, "diagnosis") for name in jobs}
    return {name: {row["facts"]["code"]: row["step"] for row in events[name]} for name in jobs}


REAL_FAULTS = {
    "flat_loss": ("many", "--mode lora --lr 1e-7 --max-steps 60 --eval-every 20"),
    "diverging": ("many", "--mode full --lr 3 --max-steps 80"),
    "overfitting": ("few", "--mode full --lr 0.02 --epochs 25 --eval-every epoch"),
}


def test_real_runs_with_a_fault_are_diagnosed(tiny_model, tmp_path):
    findings = diagnose_real_runs(tiny_model, tmp_path, REAL_FAULTS)
    for code, steps in findings.items():
        assert {code} <= set(steps) <= {code, *({"flat_loss"} if code == "diverging" else ())}, "both are true"
    assert findings["diverging"]["diverging"] <= 10, "at once"


HEALTHY_DATA = {  # data and flags: of the first two a step has eight rows
    "blocks": ("many", ""),
    "completions": ("many", "--objective completion --warmup-steps 5 --micro-batch 4"),
    "short, one a step": ("short", "--objective completion --allow-leakage --global-batch 1 --init random"),
    "short, two a step": ("short", "--objective completion --allow-leakage --global-batch 2"),
}
HEALTHY_RATES = {"full": (0.001, 0.003, 0.006), "lora": (0.005, 0.01, 0.02)}
HEALTHY_RUNS = list(itertools.product(HEALTHY_DATA, HEALTHY_RATES, range(3)))


@pytest.mark.parametrize(
    "runs",
    [
        [("blocks", "full", 1), ("short, one a step", "lora", 2)],
        pytest.param(HEALTHY_RUNS, marks=[pytest.mark.sweep, pytest.mark.timeout(3600)]),
    ],
    ids=["two", "all"],
)
def test_healthy_real_runs_give_no_diagnostic(runs, tiny_model, tmp_path):
    jobs = {}
    for seed, (kind, mode, rate) in enumerate(runs):
        data, flags = HEALTHY_DATA[kind]
        steps = 60 if data == "many" else 200
        flags += f" --mode {mode} --seed {seed} --lr {HEALTHY_RATES[mode][rate]} --max-steps {steps} --eval-every epoch"
        jobs[f"{kind}-{mode}-{rate}".replace(" ", "-")] = (data, flags)
    findings = diagnose_real_runs(tiny_model, tmp_path, jobs)
    assert not {name: codes for name, codes in findings.items() if codes}


def test_a_run_writes_a_diagnostic_once_shows_it_once_and_keeps_it_over_a_resume(tiny_model, data_files, tmp_path):
    """Through the real program: record, console, model card, report; the resumed run has the rows of the whole one."""
    text = "--mode full --block-size 16 --global-batch 6 --lr 1e-7 --max-steps 54"
    argv = tiny_argv(tiny_model, data_files, f"{text} --eval-every 27 --save-every 27")
    out = tmp_path / "whole"
    output = train_on_ranks(argv, out=out)
    (event,) = read_events(out, "diagnosis")
    assert event["facts"]["code"] == "flat_loss"
    assert event["step"] == 50
    assert output.count("warning: not learning: the training loss did not measurably fall in 50 steps") == 1
    assert f"- step 50: {event['message']}" in (out / "model" / "README.md").read_text()

    again = tmp_path / "again"
    shutil.copytree(out, again)
    train_on_ranks(["--mode", "full", "--resume", "step-27"], out=again)
    assert read_reproducible_records(again) == read_reproducible_records(out)
    (repeated,) = read_events(again, "diagnosis")
    assert repeated["facts"] == event["facts"], "of steps on both sides of the resume"
    assert repeated["step"] == 50
    assert not [row for row in read_records(again) if row.get("facts", {}).get("topic") == "too slow"]
