"""A run that was stopped and goes on: the rows that follow are those of the run that was never stopped.

Bitwise on the same ranks, ZeRO file and micro-batch, dropout included: its masks are seeded by seed, step and the rows'
place in the global batch (`Engine.accumulate`), data order and rate are functions of the step, and weights and AdamW's
moments come back in float32 as they were. On other ranks or under another ZeRO file sums are taken in another order:
there the bounds of test_invariance.py hold.

`pytest tests/test_resume.py -m sweep -n 0 -s -k every` prints every resume and every move with its largest differences.
"""

import itertools
import json
import math
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cells import on_cells, read_cell, run_cells
from conftest import TEMPLATES, make_tiny
from ranks import command, on_ranks, train
from test_invariance import BATCH, LOSS, NORM, RATE, WEIGHTS, seen

from trainer.config import cli
from trainer.config.errors import RunFailed, UserError
from trainer.config.schema import DS_NAMES
from trainer.data.dataset import load, prepare
from trainer.distributed.engine import Step
from trainer.run import open_folder
from trainer.tracking.records import EventRecord, StepRecord
from trainer.training import checkpoint, loop
from trainer.training.checkpoint import Best, Checkpoints, Progress
from trainer.training.loop import Course

STEPS = 7  # of 4 an epoch (21 blocks in batches of 6, the fourth has 3): step 2 is inside, 4 at the end, 5 after it
MODES = ("full", "lora")


@pytest.fixture(scope="module")
def dropped(tiny: str, shelf: Path) -> str:
    """The tiny model with GPT-2's own dropout of 0.1."""
    return make_tiny(shelf / "dropped", dropout=0.1)


@pytest.fixture(scope="module")
def words(dropped: str, records: tuple[str, str]) -> list[str]:
    text = f"--model {dropped} --data {records[0]} --val-data {records[1]} --block-size 16 --lr {RATE}"
    text += f" --global-batch {BATCH} --eval-batch 4 --max-steps {STEPS} --eval-every 2 --save-every 1 --keep 99"
    return [*text.split(), *TEMPLATES]


@pytest.fixture(scope="module")
def prepared(words: list[str], dropped: str) -> Path:
    settings = cli.read(["--mode", "full", *words]).settings
    return prepare(settings.data, model=dropped, global_batch=BATCH).folder


def lasting(rows: list[dict[str, Any]], after: int = -1) -> list[dict[str, Any]]:
    """Rows of steps, evaluations and epochs after a step, without what a clock says."""
    clock = ("time", "tokens_per_second")
    return [
        {key: value for key, value in row.items() if key not in clock}
        for row in rows
        if row["kind"] != "event" and row["step"] > after
    ]


def job(out: Path, prepared: Path, words: list[str], name: str, mode: str, zero: str, **more: Any) -> dict[str, Any]:
    lora = ["--lora-dropout", "0.1"] if mode == "lora" else []
    flag_words = ["--mode", mode, *words, *lora, "--micro-batch", "1", "--ds-config", zero]
    return {"name": name, "flags": flag_words, "data": str(prepared), "out": str(out), **more}


# --- the same ranks: bitwise -------------------------------------------------------------------------------------


def continued(out: Path, prepared: Path, words: list[str], ranks: int, steps: dict[str, tuple[int, ...]]) -> None:
    """Run every mode and ZeRO file whole, and again from each of `steps[zero]`; rows and weights must be the same."""
    jobs = []
    for zero in steps:
        for mode in MODES:
            name = f"{ranks}-{zero}-{mode}"
            jobs.append(job(out, prepared, words, name, mode, zero))
            for step in steps[zero]:
                jobs.append(job(out, prepared, words, f"{name}-{step}", mode, zero, resume=[name, step]))
    log = out / f"{ranks}.log"
    on_cells(ranks, jobs, log)
    for zero in steps:
        for mode in MODES:
            name = f"{ranks}-{zero}-{mode}"
            rows, weights = read_cell(out, name)
            assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, STEPS + 1))
            for step in steps[zero]:
                again, ended = read_cell(out, f"{name}-{step}")
                assert lasting(again) == lasting(rows, step), (name, step)
                assert all(np.array_equal(weights[key], ended[key]) for key in weights), (name, step)
            print(f"{name}: bitwise from steps {steps[zero]}")


@pytest.fixture(scope="module")
def whole(words: list[str], prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole runs of every mode and ZeRO file on two ranks, with a checkpoint of every step."""
    out = tmp_path_factory.mktemp("whole")
    continued(out, prepared, words, 2, dict.fromkeys(DS_NAMES, (2,)) | {"zero2": (1, 4, 6)})
    return out


def test_what_follows_a_resume_is_bitwise_what_would_have_followed(whole):
    """Every ZeRO file, both offloads among them; inside an epoch, at its end, after one step and before the last."""
    assert len(list(whole.glob("2-*-[0-9].jsonl"))) == 2 * (5 + 3), "`continued` compared them"


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_from_every_step_of_every_stage(ranks, words, prepared, tmp_path):
    continued(tmp_path, prepared, words, ranks, dict.fromkeys(DS_NAMES, tuple(range(1, STEPS + 1))))


# --- other ranks, another ZeRO file: within the bounds of test_invariance ---------------------------------------------

Move = tuple[int, str, int, str, str]  # ranks and ZeRO file before and after, mode
SAMPLE: list[Move] = [
    (2, "zero2", 1, "zero0", "full"),
    (2, "zero3", 1, "zero3", "lora"),
    (2, "zero2_offload", 1, "zero3_offload", "full"),
    (2, "zero0", 2, "zero3", "full"),
    (2, "zero3_offload", 2, "zero1", "lora"),
    (2, "zero1", 3, "zero2", "lora"),
    (2, "zero3", 3, "zero3", "full"),
    (2, "zero2", 3, "zero2", "full"),
    (1, "zero0", 2, "zero2", "full"),
    (1, "zero0", 2, "zero0", "lora"),
]
SAME_FILE = [
    (before, zero, after, zero, mode)
    for before, after in itertools.permutations((1, 2, 3), 2)
    for zero in DS_NAMES
    for mode in MODES
]
OTHER_FILE = [(2, one, 2, other, mode) for one, other in itertools.permutations(DS_NAMES, 2) for mode in MODES]


def moved(moves: list[Move], out: Path, prepared: Path, words: list[str], step: int = 2) -> None:
    """Go on from `step` elsewhere, and hold what follows against what follows where the run began."""
    sources = {f"{ranks}-{zero}-{mode}": (ranks, zero, mode) for ranks, zero, _, _, mode in moves}
    for ranks in sorted({move[0] for move in moves}):
        jobs = [
            job(out, prepared, words, name, mode, zero)
            for name, (size, zero, mode) in sources.items()
            if size == ranks and not (out / f"{name}.jsonl").exists()
        ]
        log = out / f"from-{ranks}.log"
        on_cells(ranks, jobs, log)
    for ranks in sorted({move[2] for move in moves}):
        jobs = [
            job(out, prepared, words, "-".join(map(str, move)), mode, zero, resume=[f"{before}-{old}-{mode}", step])
            for move in moves
            for before, old, after, zero, mode in [move]
            if after == ranks
        ]
        log = out / f"to-{ranks}.log"
        on_cells(ranks, jobs, log)
    wrong = []
    for move in moves:
        rows, weights = read_cell(out, f"{move[0]}-{move[1]}-{move[4]}")
        again, ended = read_cell(out, "-".join(map(str, move)))
        pairs = list(zip(lasting(again), lasting(rows, step), strict=True))
        assert [(a["kind"], a["step"], a["tokens"]) for a, _ in pairs] == [
            (b["kind"], b["step"], b["tokens"]) for _, b in pairs
        ]
        loss = max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs if "loss" in a)
        norm = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs if "grad_norm" in a)
        weight = max(np.abs(seen(name, weights[name]) - seen(name, ended[name])).max() for name in weights) / RATE
        print(*move, f"loss {loss:.1e} norm {norm:.1e} weights {weight:.1e}")
        if not (loss <= LOSS and norm <= NORM and weight <= WEIGHTS):
            wrong.append((move, loss, norm, weight))
    assert not wrong


def test_a_run_goes_on_with_other_ranks_and_another_zero_file(whole, words, prepared):
    moved(SAMPLE, whole, prepared, words)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("moves", [SAME_FILE, OTHER_FILE], ids=["ranks", "file"])
def test_every_change_of_ranks_and_of_zero_file(moves, words, prepared, tmp_path):
    moved(moves, tmp_path, prepared, words)


# --- the run folder --------------------------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def ended(words: list[str], shelf: Path) -> Path:
    """The folder of a run of the whole program on two ranks that ended well."""
    flag_words = ["--mode", "lora", *words, "--lora-dropout", "0.1", "--micro-batch", "1", "--ds-config", "zero2"]
    train(flag_words, out=shelf / "ended", ranks=2, env={"WANDB_MODE": "offline"})
    return shelf / "ended"


def copy(ended: Path, to: Path) -> Path:
    shutil.copytree(ended, to, symlinks=True)
    return to


@pytest.mark.slow
def test_resume_takes_everything_from_the_run_folder(ended, tmp_path):
    folder = copy(ended, tmp_path / "again")
    first = about(folder)
    (folder / "checkpoints/step-000099").mkdir()  # damaged, and later than where the run goes on
    train(["--mode", "lora", "--resume", "step-3", "--keep", "2"], out=folder, ranks=2, env={"WANDB_MODE": "offline"})

    before, after = rows_of(ended), rows_of(folder)
    assert lasting(after) == lasting(before), "bitwise, and no row doubled or missing"
    times = [row["time"] for row in after]
    assert times == sorted(times), "the clock goes on from where the run stood"
    (event,) = [row for row in after if row["kind"] == "event" and row["event"] == "resumed"]
    cut = len([row for row in before if row["step"] > 3 or row.get("event") == "finished"])
    assert event["message"] == f"resumed from step-000003, {cut} rows after it cut off"
    assert event["facts"]["rows_cut"] == cut
    assert event["facts"]["changed"] == {}
    assert after[[row["step"] for row in after].index(4) - 1] == event, "between the rows before and those after"

    again = about(folder)
    assert {key: again[key] for key in first} == first, "run.json tells how the run began"
    assert again["run_id"] == first["run_id"]
    began = {path.name.split("-")[-1] for path in (folder / "wandb").glob("offline-run-*")}
    assert began == {first["run_id"]}, "W&B goes on with the same run"
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2
    best = min((row for row in before if row["kind"] == "eval" and row["step"]), key=lambda row: row["loss"])["step"]
    assert steps_kept(folder) == sorted({best, 6, 7}), "those of the course that was left are gone, not counted as kept"
    exported = [path / "model" / "adapter_model.safetensors" for path in (ended, folder)]
    assert exported[0].read_bytes() == exported[1].read_bytes()


@pytest.mark.slow
def test_a_run_on_two_ranks_goes_on_alone_from_its_best(ended, tmp_path):
    folder = copy(ended, tmp_path / "best")
    evals = [row for row in rows_of(ended) if row["kind"] == "eval" and row["step"]]
    best = min(evals, key=lambda row: row["loss"])
    train(["--mode", "lora", "--resume", "best", "--ds-config", "zero3"], out=folder, ranks=1)
    events = [row for row in rows_of(folder) if row["kind"] == "event" and row["event"] == "resumed"]
    assert [row["step"] for row in events] == [best["step"]]
    assert events[0]["facts"]["resolved"]["ranks"] == 1
    for now, then in zip(lasting(rows_of(folder)), lasting(rows_of(ended)), strict=True):
        assert now["step"] == then["step"]
        assert now.get("loss", now.get("train_loss")) == pytest.approx(
            then.get("loss", then.get("train_loss")), rel=LOSS
        )


@pytest.mark.slow
def test_a_change_that_was_allowed_is_recorded_and_stays(ended, tmp_path):
    folder = copy(ended, tmp_path / "changed")
    train(["--mode", "lora", "--resume", "step-5", "--lr", "1e-4", "--allow-change", "lr"], out=folder, ranks=1)
    first = rows_of(folder)
    (event,) = [row for row in first if row["kind"] == "event" and row["event"] == "resumed"]
    assert event["facts"]["changed"] == {"lr": [RATE, 1e-4]}
    assert f"lr changed from {RATE} to 0.0001" in event["message"]
    rates = [row["lr"] for row in first if row["kind"] == "step"]
    assert rates == pytest.approx([(RATE if step < 5 else 1e-4) * (1 - step / STEPS) for step in range(STEPS)])
    assert about(folder)["settings"] == about(ended)["settings"]
    assert about(folder)["resumed"]["changed"] == {"lr": [RATE, 1e-4]}

    shutil.rmtree(folder / "checkpoints/step-000007")
    train(["--mode", "lora", "--resume"], out=folder, ranks=1)  # the newest, and the rate without saying it again
    assert [row["step"] for row in rows_of(folder) if row.get("event") == "resumed"] == [5, 6]
    assert lasting(rows_of(folder)) == lasting(first)
    events = [row for row in rows_of(folder) if row["kind"] == "event" and row["event"] == "resumed"]
    assert events[-1]["facts"]["changed"] == {"lr": [RATE, 1e-4]}, "still another rate than the run began with"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag_words", "expected"),
    [
        (["--lr", "1"], "lr is 1.0 and was 0.003 in this run; put it back, or say --allow-change lr as well"),
        (["--global-batch", "3"], "global_batch is 3 and was 6"),
        (["--max-steps", "9"], "max_steps is 9 and was 7"),
        (["--seed", "1", "--allow-change", "lr"], "seed is 1 and was 42"),
        (["--lora-rank", "4"], "rank is 4 and was 8"),
        (["--data", "OTHER"], "data is "),
        (["--mode", "full"], "--mode full: the run in"),
        (["--allow-change", "speed"], "--allow-change speed: expected one of "),
        (["--resume", "step-99"], "--resume step-99: not in"),
        (["--micro-batch", "4"], "--global-batch 6: 6 is not micro-batch 4 x 1 rank x a whole accumulation"),
    ],
)
def test_what_may_not_change_is_refused_in_one_line(flag_words, expected, ended, records, tmp_path):
    """Before anything is loaded, and nothing in the folder is touched."""
    folder = copy(ended, tmp_path / "refused")
    log = tmp_path / "refused.log"
    flag_words = [records[1] if word == "OTHER" else word for word in flag_words]
    code = on_ranks(1, command, ["--mode", "lora", "--resume", *flag_words, "--out", str(folder)], log=log)
    lines = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert code == 2, log.read_text()
    assert len(lines) == 1, log.read_text()
    assert expected in lines[0]
    assert "Traceback" not in log.read_text()
    for name in ("run.json", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (ended / name).read_bytes()
    assert steps_kept(folder) == steps_kept(ended)


def test_allow_change_goes_with_resume_only(words, tmp_path):
    request = cli.read(["--mode", "full", *words, "--allow-change", "lr", "--out", str(tmp_path / "new")])
    with pytest.raises(UserError, match="--allow-change lr: goes with --resume"):
        open_folder(request)


def fp16_cells(jobs: list[dict[str, Any]]) -> int:
    """`run_cells` in fp16 on a processor, which computes in it slowly; DeepSpeed asks only whether it is fast.

    The loss scale begins so high that the first steps overflow, and grows after four good ones.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    from trainer.distributed.deepspeed_config import deepspeed_dict

    kind = type(get_accelerator())
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: [torch.float, torch.bfloat16, torch.half]
    made = deepspeed_dict
    high = {"enabled": True, "initial_scale_power": 30, "loss_scale_window": 4, "hysteresis": 1}
    deepspeed_dict = lambda *args, **given: made(*args, **given) | {"fp16": high}
    return run_cells(jobs)


@pytest.mark.parametrize("zero", ["zero1", pytest.param("zero2", marks=pytest.mark.sweep), "zero3"])
def test_fp16_goes_on_with_its_float32_weights_and_its_loss_scale(zero, words, prepared, tmp_path):
    """A resume that began anew with the scale would skip steps again, one from halved weights would drift."""
    base = ["--mode", "full", *words, "--precision", "fp16", "--ds-config", zero, "--max-steps", "48"]
    common = {"data": str(prepared), "out": str(tmp_path)}
    jobs = [
        {"name": "whole", "flags": [*base, "--save-every", "30"], **common},
        {"name": "again", "flags": base, "resume": ["whole", 30], **common},
    ]
    on_cells(1, jobs, tmp_path / "log", fp16_cells)
    whole, weights = read_cell(tmp_path, "whole")
    again, resumed = read_cell(tmp_path, "again")
    skipped = [row["step"] for row in whole if row.get("event") == "skipped_step"]
    assert min(skipped) == 1
    assert max(skipped) > 30, "so that the place within the window shows"
    assert [row["step"] for row in again if row.get("event") == "skipped_step"] == [n for n in skipped if n > 30]
    assert [row["loss"] for row in again if row["kind"] == "step"] == [
        row["loss"] for row in whole if row["kind"] == "step" and row["step"] > 30
    ]
    assert all(np.array_equal(weights[name], resumed[name]) for name in weights)


# --- what a checkpoint holds, and which are kept ---------------------------------------------------------------------


def test_a_checkpoint_holds_twelve_bytes_per_trained_weight(ended, whole):
    """The float32 value and two moments; with LoRA the adapters only, with full training tied weights once."""
    for folder, trainable in (
        (ended / "checkpoints/step-000003", about(ended)["model"]["trainable"]),
        (whole / "2-zero3-lora-checkpoints/step-000003", about(ended)["model"]["trainable"]),
        (whole / "2-zero3-full-checkpoints/step-000003", about(ended)["model"]["parameters"]),
    ):
        state = folder / "state.safetensors"
        with open(state, "rb") as file:
            header = struct.unpack("<Q", file.read(8))[0]
        assert state.stat().st_size == 8 + header + 12 * trainable
        size = sum(path.stat().st_size for path in folder.iterdir())
        constant = 16 * 1024  # names and shapes, and where the run stood
        assert size <= 1.1 * 12 * trainable + constant, size
    assert about(ended)["model"]["trainable"] < about(ended)["model"]["parameters"] / 2


class FakeEngine:
    """One weight on one rank, and its own state; each step's value is its number."""

    def __init__(self, step: int):
        self.trainable = {"w": torch.full((3,), float(step))}
        self.state = self

    def loss_scale(self):
        return None

    def layout(self):
        return [(f"{kind}/w", torch.float32, (3,)) for kind in ("weight", "exp_avg", "exp_avg_sq")]

    def full(self):
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            yield f"{kind}/w", self.trainable["w"]


ALONE: Any = SimpleNamespace(rank=0, size=1, gather=lambda value: [value])


def save(saver: Checkpoints, step: int, loss: float | None) -> None:
    best = Best(step=step, epoch=0.0, loss=loss) if loss is not None else None
    evaluated = {"val_loss": loss, "val_step": step} if loss is not None else {}
    engine: Any = FakeEngine(step)
    saver.save(engine, Progress(step=step, best=best, **evaluated))


def test_the_newest_and_the_best_are_kept(tmp_path):
    saver = Checkpoints(tmp_path / "checkpoints", ALONE, keep=2, identity={})
    kept = {}
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 1.5, 1.0], start=1):
        save(saver, step, loss)
        kept[step] = steps_kept(tmp_path)
    assert kept == {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6]}
    assert checkpoint.choose(saver.folder, "best").step == 2, "the earlier of equals"
    assert checkpoint.choose(saver.folder, "latest").step == 6


def test_deleting_is_the_last_thing_done(tmp_path, monkeypatch):
    saver = Checkpoints(tmp_path / "checkpoints", ALONE, keep=1, identity={})
    save(saver, 1, None)
    there = []
    delete = checkpoint._delete
    monkeypatch.setattr(checkpoint, "_delete", lambda folder: (there.append(steps_kept(tmp_path)), delete(folder)))
    save(saver, 2, None)
    assert there == [[1, 2]], "the new one was whole under its name when the old one went"
    assert steps_kept(tmp_path) == [2]

    def full(_handle: int) -> None:
        raise OSError(28, "No space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match="step-000003 not written: No space left; the checkpoints before it are whole"):
        save(saver, 3, None)
    assert steps_kept(tmp_path) == [2]
    assert checkpoint.choose(saver.folder, "latest").step == 2


def test_going_on_from_an_earlier_checkpoint_drops_the_later_ones(tmp_path):
    """Else they would count as the newest: the run's own would be deleted, the next resume take the wrong course."""
    saver = Checkpoints(tmp_path / "checkpoints", ALONE, keep=9, identity={})
    for step in (1, 2, 8, 9):
        save(saver, step, None)
    (saver.folder / "step-000009" / "state.json").write_text("cut off")
    checkpoint.drop_after(saver.folder, 2)
    assert sorted(path.name for path in saver.folder.iterdir()) == ["step-000001", "step-000002"]


# --- the loop's own promises -----------------------------------------------------------------------------------------


def test_a_skipped_step_is_reported_and_not_counted_by_adam(prepared, words):
    """fp16 may leave out an update where the loss scale was too high; it needs a GPU, so the engine is a fake."""

    class Skipping:
        world, lags = ALONE, False

        def accumulate(self, micro, *, step, counted):
            return torch.tensor(1.0, dtype=torch.float64)

        def ask(self, rate, sums, *, stop):
            self.steps = getattr(self, "steps", 0) + 1
            skipped = self.steps == 2
            done = Step(nll=float(sum(sums)), grad_norm=math.inf if skipped else 1.0, skipped=skipped, stop=stop)
            return lambda: done

        def evaluate(self, micro):
            return torch.ones(len(micro.input_ids), dtype=torch.float64)

    settings = cli.read(["--mode", "full", *words, "--max-steps", "4", "--save-every", "never"]).settings
    data = load(prepared)
    course = Course(settings=settings, batch=settings.train.batch(1), total_steps=4, steps_per_epoch=4)
    saved: list[Progress] = []
    saver: Any = SimpleNamespace(save=lambda engine, progress: saved.append(progress))
    engine: Any = Skipping()
    rows = list(loop.train(engine, data, course, Progress(), saver, lambda: False))
    assert [row.step for row in rows if isinstance(row, StepRecord)] == [1, 3, 4]
    (event,) = [row for row in rows if isinstance(row, EventRecord)]
    assert (event.event, event.step) == ("skipped_step", 2)
    assert "step 2: gradient overflow in fp16, update skipped" in event.message
    assert saved[-1].step == 4
    assert saved[-1].skipped == 1, "AdamW's count of steps after a resume leaves it out"
