"""What a run notices of itself: each finding fires when it should, made by a fault, and none on healthy runs.

The faults are real where a small model can have them; what needs a GPU or minutes of time is made of rows.
"""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cells import on_cells
from conftest import TEMPLATES, write_records
from group import events, rows, science
from ranks import train as train_on_ranks
from run_folders import facts as run_facts
from run_folders import make

from trainer.config import cli
from trainer.config.errors import RunFailed
from trainer.data.dataset import load, prepare
from trainer.distributed.process_group import leave_world, start_world
from trainer.export.model_card import card_text
from trainer.export.verify import Check
from trainer.model.build import build, load_config
from trainer.report.comparison import compare, write
from trainer.report.load import gather
from trainer.report.wandb_runs import from_rows
from trainer.run import _engine
from trainer.tracking.records import EvalRecord, EventRecord, Record, StepRecord
from trainer.tracking.wandb_keys import wandb_config, wandb_summary
from trainer.training.callbacks import Observer
from trainer.training.checkpoint import Checkpoints
from trainer.training.diagnostics.monitor import Diagnosis
from trainer.training.diagnostics.online_stats import Line, Mean, welch
from trainer.training.diagnostics.types import BY_THE_CLOCK, TOPICS, Facts
from trainer.training.loop import train
from trainer.training.run_plan import make_plan

# --- the statistics --------------------------------------------------------------------------------------------------


def test_the_slope_and_its_t_are_those_of_the_textbook():
    """x 1..5, y 2 4 5 4 5: slope 0.6, residual 2.4, so its standard error is sqrt(0.8 / 10), worked out by hand."""
    line = Line()
    for x, y in enumerate([2, 4, 5, 4, 5], start=1):
        line.add(x, y)
    assert line.slope == pytest.approx(0.6)
    assert line.t == pytest.approx(0.6 / math.sqrt(0.08))
    flat = Line()
    assert flat.t == 0.0
    for x in range(4):
        flat.add(x, 1.0)
    assert flat.t == 0.0


def test_welchs_distance_is_in_standard_errors_of_the_difference():
    a, b = Mean.of([1, 2, 3]), Mean.of([4, 6])
    assert (a.value, a.variance, b.variance) == (2, pytest.approx(1 / 3), pytest.approx(1))
    assert welch(a, b) == pytest.approx(-3 / math.sqrt(4 / 3))


# --- rows as a run would leave them ----------------------------------------------------------------------------------

STEPS = 200


def known(**changes: Any) -> Facts:
    """The facts of a full run of STEPS steps on one CPU rank; `changes` replace some."""
    run = run_facts("full", resolved__total_steps=STEPS, hardware__gpus_here=0)
    return Facts(**{**vars(Facts.of(run)), **changes})


def healthy_loss(step: int) -> float:
    return 2.0 + 2.0 * math.exp(-step / 40)


def run_rows(
    *, seed: int = 0, steps: int = STEPS, loss: Callable[[int], float] = healthy_loss,
    val: Callable[[int], float] = healthy_loss, noise: float = 0.1, norm: float = 0.8, lr: float = 5e-4,
    seconds: float = 0.1, eval_every: int = 50, eval_seconds: float = 1.0,
) -> Iterator[Record]:  # fmt: skip
    """Steps with noise of this standard deviation, of so many seconds; evaluations in between; 50 steps an epoch."""
    dice, clock = random.Random(seed), 0.0

    def at(step: int) -> dict[str, Any]:
        return {"step": step, "epoch": step / 50, "samples": step, "tokens": step, "time": clock}

    def evaluation(step: int) -> EvalRecord:
        return EvalRecord(**at(step), loss=val(step), perplexity=1.0, eval_tokens=1)

    yield evaluation(0)
    for step in range(1, steps + 1):
        clock += seconds
        yield StepRecord(
            **at(step), loss=loss(step) + dice.gauss(0, noise), lr=lr * (1 - (step - 1) / STEPS),
            grad_norm=norm * dice.uniform(0.7, 1.4), tokens_per_second=1.0,
        )  # fmt: skip
        if step % eval_every == 0:
            clock += eval_seconds
            yield evaluation(step)


def codes(facts: Facts, stream: Any, spend: Callable[[Diagnosis], None] = lambda _: None) -> dict[str, Any]:
    """{code: finding} of a stream of records; `spend` counts times after each."""
    diagnosis, found = Diagnosis(facts), {}
    for record in stream:
        spend(diagnosis)
        for finding in diagnosis.take(record):
            assert finding.code not in found, "said once"
            found[finding.code] = finding
    return found


def spending(what: str, seconds: float) -> Callable[[Diagnosis], None]:
    return lambda diagnosis: diagnosis.spend(what, seconds)


def skipped(every: int) -> list[EventRecord]:
    return [EventRecord(event="skipped_step", step=step, message="", time=0.0) for step in range(1, 60, every)]


Fault = tuple[str, dict[str, Any], Callable[[], Any], Callable[[Diagnosis], None], str]


def fault(
    code: str, remedy: str, stream: Callable[[], Any] = run_rows, spend: Callable[[Diagnosis], None] = lambda _: None,
    **facts: Any,
) -> Fault:  # fmt: skip
    """The code to be found, with a word of its remedy, in these rows of a run with these facts."""
    return code, facts, stream, spend, remedy


def by_heart() -> Iterator[Record]:
    return run_rows(val=lambda step: 4 - step / 50 if step <= 100 else 2 + (step - 100) / 500)


def exploding(step: int) -> float:
    return healthy_loss(step) * (1 + max(0, step - 120) / 80)


def flat(up: float = 0.0) -> Callable[[], Iterator[Record]]:
    return lambda: run_rows(loss=lambda _: 4.0, val=lambda step: 4.0 + up * min(step, 30), eval_every=25)


def not_a_number() -> list[Record]:
    message = "step 10: loss nan; the weights are those after step 9"
    return [*run_rows(steps=9), EventRecord(event="not_finite", step=10, message=message, time=1.0)]


def slow(**how: Any) -> Callable[[], Iterator[Record]]:
    return lambda: run_rows(seconds=1.0, **how)


FAULTS = {
    "flat": fault("flat_loss", "--lr 1e-08", flat(), lr=1e-9),
    "flat and worse": fault("flat_loss", "--lr 0.01", flat(up=0.01), lr=0.1),
    "no gradient": fault("no_gradient", "--objective blocks", lambda: run_rows(norm=1e-6)),
    "fp16 underflow": fault("no_gradient", "--precision bf16", lambda: run_rows(norm=0.0), precision="fp16"),
    "no rate": fault("no_rate", "--lr", lambda: run_rows(lr=1e-12)),
    "long warm-up": fault("no_rate", "--warmup-steps 0", lambda: run_rows(lr=1e-12), warmup_steps=10**9),
    "masked": fault("masked_labels", "--prompt", counted_share=0.05),
    "clipped": fault("always_clipped", "--clip 0.", clip=0.01),
    "rising": fault("diverging", "--lr 0.0002", lambda: run_rows(loss=exploding)),
    "worse than before": fault(
        "diverging",
        "--lr 0.0002",
        lambda: run_rows(loss=lambda step: 9 - step / 100, val=lambda step: 4 + min(step, 100) / 50),
        lr=5e-4,
    ),
    "not finite": fault("diverging", "--lr 0.0002", not_a_number, precision="bf16"),
    "by heart": fault("overfitting", "--early-stop 1 --export best", by_heart),
    "by heart, stopping": fault("overfitting", "--dropout 0.2", by_heart, early_stop=True, dropout=0.1),
    "overflow": fault("overflow", "--precision bf16", lambda: skipped(3), precision="fp16"),
    "data": fault("waiting_for_data", "TRAINER_CACHE", slow(), spending("data", 0.3)),
    "logging": fault("slow_logging", "--wandb offline", slow(), spending("logging", 0.3), wandb="online"),
    "evaluation": fault("much_evaluation", "--eval-every epoch", slow(eval_every=10, eval_seconds=30), eval_every="10"),
    "python": fault("python_bound", "--micro-batch 16", slow(), spending("device", 0.01), device="cuda"),
    "gpus": fault("unused_ranks", "--num_gpus 8", slow(), spending("device", 0.5), device="cuda", gpus_here=8),
    "idle ranks": fault(
        "unused_ranks", "--eval-batch 5", slow(eval_seconds=10), ranks=4, val_examples=20, eval_batch=16
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_named_once_and_nothing_else_is(name):
    code, facts, stream, spend, remedy = FAULTS[name]
    found = codes(known(**facts), stream(), spend)
    assert set(found) == {code}
    finding = found[code]
    assert remedy in finding.remedy
    assert finding.cause
    assert all(value is not None for value in finding.evidence.values())
    line = finding.record(7, 1.5)
    assert line.message.startswith(f"{TOPICS[code]}: {finding.seen}; likely cause: ")
    json.dumps(line.facts, allow_nan=False)


def test_every_code_has_a_fault():
    assert {fault[0] for fault in FAULTS.values()} | {"adapter_still_zero"} == set(TOPICS)


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_a_healthy_run_bring_no_finding(seed):
    """Noisy, slow enough to be timed, with the ups and downs of an evaluation that stands still."""
    dice = random.Random(seed)
    facts = known(**dice.choice([{}, {"device": "cuda"}, {"ranks": 2, "precision": "bf16", "clip": 0.5}]))
    stream = run_rows(
        seed=seed, noise=dice.uniform(0.02, 0.4), norm=dice.uniform(0.3, 3), seconds=dice.uniform(0.1, 2),
        val=lambda step: healthy_loss(step) + dice.gauss(0, 0.003), eval_every=dice.choice([10, 25, 50]),
    )  # fmt: skip
    assert codes(facts, stream, spending("device", 0.5)) == {}
    first = [EventRecord(event="skipped_step", step=step, message="", time=0.0) for step in (1, 2, 3, 4, 5, 40)]
    assert codes(known(precision="fp16"), first) == {}, "a loss scale on its way down"


def test_a_short_run_is_not_told_to_be_faster():
    assert codes(known(), run_rows(seconds=0.2), spending("data", 0.1)) == {}, "40 seconds"


def test_the_one_evaluation_that_every_run_has_is_not_too_many():
    assert codes(known(), run_rows(steps=4, seconds=20, eval_every=4, eval_seconds=90)) == {}
    assert set(codes(known(), run_rows(steps=8, seconds=20, eval_every=4, eval_seconds=90))) == {"much_evaluation"}


def test_overfitting_says_since_when_and_for_how_long():
    found = codes(known(), by_heart())
    evidence = found["overfitting"].evidence
    assert (evidence["since_step"], evidence["since_epoch"], evidence["epochs"]) == (100, 2.0, 1.0)
    assert "rose for 1 epochs, since epoch 2 (step 100): 2.0000 -> 2.1000" in found["overfitting"].seen


def test_what_was_said_before_a_resume_is_not_said_again_and_what_was_not_is():
    """Wherever the run is cut, both parts together say what the whole one says; rows are all that is handed on."""
    stream = list(run_rows(loss=exploding, norm=30.0))
    whole = codes(known(), stream)
    assert set(whole) == {"diverging", "always_clipped"}
    for cut in range(0, len(stream), 7):
        written: list[Record] = []
        first = Diagnosis(known())
        for record in stream[:cut]:
            written += [record, *(f.record(record.step, record.time) for f in first.take(record))]
        second = Diagnosis(known())
        assert second.replay(written) == []
        found = [finding for record in stream[cut:] for finding in second.take(record)]
        assert [*first.said, *(f.code for f in found)] == [*first.said, *(c for c in whole if c not in first.said)]
        assert all(finding == whole[finding.code] for finding in found)
    lost = Diagnosis(known())
    assert {f.code for f in lost.replay(stream)} == set(whole), "killed between a row and its finding"


# --- real runs -------------------------------------------------------------------------------------------------------


def _scaled_gradients(engine: Any) -> None:
    for parameter in engine.trainable.values():
        parameter.register_hook(lambda gradient: gradient * 1e-12)


def _no_update(engine: Any) -> None:
    step = engine.optimizer.step

    def frozen() -> None:
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        step()

    engine.optimizer.step = frozen


INJECT = {"scaled_gradients": _scaled_gradients, "no_update": _no_update}


def watch_cells(jobs: list[dict[str, Any]]) -> int:
    """Run each job `{name, flags, data, out, fault}` with an observer beside it; out/name.json lists the findings."""
    world = start_world()
    try:
        for job in jobs:
            settings = cli.read(job["flags"]).settings
            data = load(Path(job["data"]))
            model = build(settings)
            plan = make_plan(settings, world, data, model.facts, load_config(settings.model))
            engine, progress = _engine(plan, model, None)
            INJECT.get(job.get("fault", ""), lambda _: None)(engine)
            out = Path(job["out"])
            saver = Checkpoints(out / f"{job['name']}-checkpoints", world, keep=1, identity={"base": "test"})
            about = plan.as_json(run_id="x", wandb={"mode": "disabled"})
            observer = Observer(engine, Facts.of(about))
            found = []
            try:
                for record in train(engine, data, plan.course, progress, saver, lambda: False, observer.drew):
                    found += [event.facts for event in observer.after(record)]
            except RunFailed:
                pass
            (out / f"{job['name']}.json").write_text(json.dumps(found))
    finally:
        leave_world()
    return 0


@pytest.fixture(scope="module")
def lines(tiny: str, shelf: Path) -> dict[str, tuple[list[str], str]]:
    """{data: (flags, prepared folder)}: many rows, few, and long prompts before short completions."""
    made = {}
    for name, count in (("many", 200), ("few", 25)):
        made[name] = write_records(shelf / f"diagnosed-{name}.jsonl", rows=count, seed=3)
    masked = [{"prompt": "w1 " * 20, "completion": f" w{n % 90 + 1}"} for n in range(200)]
    (shelf / "diagnosed-masked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in masked))
    made["masked"] = str(shelf / "diagnosed-masked.jsonl")
    val = write_records(shelf / "diagnosed-val.jsonl", rows=40, seed=4)
    found = {}
    for name, path in made.items():
        for objective in ("blocks", "completion"):
            text = f"--model {tiny} --data {path} --val-data {val} --block-size 24 --eval-batch 20 --global-batch 8"
            words = [*f"{text} --objective {objective} --save-every never".split(), *TEMPLATES]
            settings = cli.read(["--mode", "full", *words]).settings
            folder = prepare(settings.data, model=tiny, global_batch=8).folder
            found[f"{name}-{objective}"] = (words, str(folder))
    return found


def watched(out: Path, lines: Any, jobs: dict[str, tuple[str, str, str]]) -> dict[str, list[dict[str, Any]]]:
    """{name: findings} of real runs on one rank; a job is (data, flags, fault)."""
    told = []
    for name, (data, more, fault) in jobs.items():
        words, folder = lines[data]
        told.append({"name": name, "flags": [*more.split(), *words], "data": folder, "out": str(out), "fault": fault})
    on_cells(1, told, out / "log", target=watch_cells)
    return {name: json.loads((out / f"{name}.json").read_text()) for name in jobs}


REAL = {
    "flat_loss": ("many-blocks", "--mode full --lr 1e-7 --max-steps 60 --eval-every 20", ""),
    "no_rate": ("many-blocks", "--mode full --lr 1e-10 --max-steps 20", ""),
    "no_gradient": ("many-blocks", "--mode full --lr 3e-3 --max-steps 12", "scaled_gradients"),
    "adapter_still_zero": ("many-blocks", "--mode lora --lr 3e-3 --max-steps 6 --eval-every 3", "no_update"),
    "always_clipped": ("many-blocks", "--mode full --lr 3e-3 --clip 1e-3 --max-steps 52", ""),
    "masked_labels": ("masked-completion", "--mode full --lr 3e-3 --max-steps 2", ""),
    "diverging": ("many-blocks", "--mode full --lr 3 --max-steps 80", ""),
    "overfitting": ("few-blocks", "--mode full --lr 0.02 --epochs 25 --eval-every epoch", ""),
}


#: what is as true of a run with that fault
AS_TRUE = {"no_rate": {"flat_loss"}, "no_gradient": {"flat_loss"}, "diverging": {"always_clipped", "flat_loss"}}


def test_real_runs_with_a_fault_are_found_out(lines, tmp_path):
    found = watched(tmp_path, lines, REAL)
    for code, findings in found.items():
        assert code in [finding["code"] for finding in findings], (code, findings)
        assert {finding["code"] for finding in findings} <= {code, *AS_TRUE.get(code, ())}, findings


def healthy(runs: int) -> dict[str, tuple[str, str, str]]:
    jobs = {}
    for seed in range(runs):
        mode, objective = ("full", "lora")[seed % 2], ("blocks", "completion")[seed // 2 % 2]
        more = f"--mode {mode} --seed {seed} --lr {(0.003, 0.02)[seed % 2]} --max-steps 60 --eval-every epoch"
        more += f" --micro-batch {(8, 4, 2)[seed % 3]} --warmup-steps {(0, 5)[seed % 5 == 0]}"
        jobs[f"healthy-{seed}"] = (f"many-{objective}", more, "")
    return jobs


def test_healthy_runs_say_nothing(lines, tmp_path):
    """Two of the twenty, every weight on blocks and adapters on completions; `-m sweep` runs them all."""
    jobs = healthy(20)
    found = watched(tmp_path, lines, {name: jobs[name] for name in ("healthy-0", "healthy-3")})
    assert {name: [f["code"] for f in findings] for name, findings in found.items() if findings} == {}


@pytest.mark.sweep
def test_twenty_healthy_runs_say_nothing(lines, tmp_path):
    found = watched(tmp_path, lines, healthy(20))
    assert {name: [f["code"] for f in findings] for name, findings in found.items() if findings} == {}


# --- where it is shown -----------------------------------------------------------------------------------------------


def test_a_run_writes_it_once_shows_it_once_and_keeps_it_over_a_resume(tiny, records, tmp_path):
    """Through the real program: record, console, model card, report; the resumed run has the rows of the whole one."""
    text = f"--mode full --model {tiny} --data {records[0]} --val-data {records[1]} --block-size 16 --global-batch 6"
    words = [*f"{text} --lr 0.001 --clip 1e-4 --max-steps 54 --eval-every 27 --save-every 27".split(), *TEMPLATES]
    out = tmp_path / "whole"
    output = train_on_ranks(words, out=out)
    (event,) = events(out, "diagnosis")
    assert event["facts"]["code"] == "always_clipped"
    assert event["step"] == 50
    assert output.count("not learning: each of the last 50 steps was clipped") == 1
    assert f"- step 50: {event['message']}" in (out / "model" / "README.md").read_text()

    again = tmp_path / "again"
    shutil.copytree(out, again)
    train_on_ranks(["--mode", "full", "--resume", "step-27"], out=again)
    assert science(again) == science(out)
    (repeated,) = events(again, "diagnosis")
    assert repeated["facts"] == event["facts"], "of steps on both sides of the resume"
    assert repeated["step"] == 50
    assert not [row for row in rows(again) if row.get("facts", {}).get("code") in BY_THE_CLOCK]


def test_the_comparison_and_the_model_card_show_what_runs_noticed(tmp_path):
    folder = make(tmp_path / "run")
    event = next(iter(codes(known(clip=0.01), run_rows()).values())).record(50, 5.0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "event", **vars(event)}) + "\n")
    runs, problems = gather([str(folder)])
    assert runs[0].finished
    assert not problems
    comparison = compare(runs)
    write(comparison, tmp_path / "out")
    assert event.message in json.loads((tmp_path / "out" / "comparison.json").read_text())["diagnosis"][0]["finding"]
    for page in ("report.html", "report.md"):
        text = (tmp_path / "out" / page).read_text()
        assert "Diagnosis" in text
        assert "each of the last 50 steps was clipped" in text
    kept = wandb_summary(event)
    assert kept == {"event/diagnosis/always_clipped": event.message}
    history = [{"_step": 0, "val/loss": 2.0, "epoch": 0.0}]
    config = wandb_config(run_facts("full"))
    run = from_rows("w", "id", "name", config, history, {**kept, "wall_seconds": 1.0}, finished=True, age=0.0)
    assert run.findings == ((0, event.message),), "from W&B, too, where the summary keeps no step"
    about = run_facts("full", model__init="pretrained", not_comparable_with_card=[])
    card = card_text(about, [event], Check(), step=720)
    assert "### Diagnosis" in card
    assert event.message in card
    assert "Diagnosis" not in card_text(about, [], Check(), step=720)
