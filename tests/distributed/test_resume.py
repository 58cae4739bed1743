"""A run that was stopped and goes on: the rows that follow are those of the run that was never stopped.

Bitwise on the same ranks, ZeRO file and micro-batch, dropout included: its masks are seeded by seed, step and the rows'
place in the global batch (`Engine.forward_backward`), data order and rate are functions of the step, and weights and
AdamW's moments come back in float32 as they were. On other ranks or under another ZeRO file sums are taken in another
order: there the bounds of test_invariance.py hold.

`pytest tests/distributed/test_resume.py -m sweep -n 0 -s` prints every resume.
"""

import json
import os
import shutil
import unittest.mock
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import joined_ranks, save_stub_checkpoint
from helpers.launch_ranks import run_on_ranks, run_train_script, train
from helpers.matrix import (
    GLOBAL_BATCH,
    LEARNING_RATE,
    RunDifference,
    assert_resumed_bitwise,
    launch_by_ranks,
    launch_jobs,
    make_job,
    read_job_result,
    run_jobs,
)
from helpers.process_groups import read_events, read_records, read_reproducible_records, reproducible_records
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv, write_records

from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.errors import UserError
from trainer.tools.doctor.run_checks import inspect_run
from trainer.tracking.run_lock import LOCK_FILE
from trainer.training import checkpoint, run_plan
from trainer.training.run_folder import find_resume_source

STEPS = 7  # of 4 an epoch (21 blocks in batches of 6, the fourth has 3): step 2 is inside, 4 at the end, 5 after it
MODES = ("full", "lora")


@pytest.fixture(scope="module")
def dropout_model(session_dir: Path) -> str:
    """The tiny model with GPT-2's own dropout of 0.1."""
    return make_tiny_gpt2(session_dir / "dropped", dropout=0.1)


@pytest.fixture(scope="module")
def argv(dropout_model: str, data_files: tuple[str, str]) -> list[str]:
    text = f"--block-size 16 --lr {LEARNING_RATE} --global-batch {GLOBAL_BATCH} --eval-batch 4 --max-steps {STEPS}"
    return tiny_argv(dropout_model, data_files, f"{text} --eval-every 2 --save-every 1 --save-total-limit 99")


def make_resume_job(out: Path, argv: list[str], name: str, mode: str, zero: str, **options: Any) -> Any:
    lora_flags = ["--lora-dropout", "0.1"] if mode == "lora" else []
    flags = ["--mode", mode, *argv, *lora_flags, "--micro-batch", "1", "--ds-config", zero]
    return make_job(out, name, flags, **options)


def assert_bitwise_resume(out: Path, argv: list[str], world_size: int, steps: dict[str, tuple[int, ...]]) -> None:
    """Run every mode and ZeRO file whole, and again from each of `steps[zero]`; rows and weights must be the same."""
    runs = {f"{world_size}-{zero}-{mode}": (mode, zero) for zero in steps for mode in MODES}
    jobs = []
    for name, run in runs.items():
        jobs.append(make_resume_job(out, argv, name, *run))
        for step in steps[run[1]]:
            jobs.append(make_resume_job(out, argv, f"{name}-{step}", *run, resume=[name, step]))
    launch_jobs(world_size, jobs)
    for name, (_, zero) in runs.items():
        records, _ = read_job_result(out, name)
        assert [row["step"] for row in records if row["kind"] == "step"] == list(range(1, STEPS + 1))
        for step in steps[zero]:
            assert_resumed_bitwise(out, name, f"{name}-{step}", step)
        print(f"{name}: bitwise from steps {steps[zero]}")


@pytest.mark.slow
def test_resume_in_warm_up_and_in_the_middle_of_a_cosine_of_a_mixture_is_bitwise(argv, data_files, tmp_path):
    schedule = ["--schedule", "cosine", "--warmup-ratio", "0.4", "--min-lr", "1e-4"]  # 3 of 7 steps of warm-up
    other = write_records(tmp_path / "other.jsonl", num_records=9, seed=3)
    mixed = [f"{other}=0.6 {flag}=0.4" if flag == data_files[0] else flag for flag in argv]
    assert_bitwise_resume(tmp_path, [*mixed, *schedule], 1, {"zero0": (2, 5)})


@pytest.fixture(scope="module")
def uninterrupted_runs(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole runs of every mode and each kind of ZeRO file on two ranks; resumed inside an epoch, at its end and before
    the last step."""
    out = tmp_path_factory.mktemp("whole")
    assert_bitwise_resume(out, [*argv, "--save-every", "2"], 2, {"zero0": (2,), "zero2": (4,), "zero3_offload": (6,)})
    return out


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(uninterrupted_runs):
    assert len(list(uninterrupted_runs.glob("2-*-[0-9].jsonl"))) == 2 * 3, "the fixture compared them"


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_resumed_from_any_step_of_any_zero_stage_is_bitwise_the_uninterrupted_one(ranks, argv, tmp_path):
    assert_bitwise_resume(tmp_path, argv, ranks, dict.fromkeys(DS_CONFIG_NAMES, tuple(range(1, STEPS + 1))))


MOVES = [  # ranks and ZeRO file before and after, mode
    (2, "zero2", 1, "zero0", "full"),
    (2, "zero0", 2, "zero3", "full"),
    (2, "zero3_offload", 3, "zero1", "lora"),
]


def test_a_run_resumes_with_other_ranks_and_another_zero_file(uninterrupted_runs, argv):
    """From step 2 elsewhere: what follows is what follows where the run began."""
    out, jobs = uninterrupted_runs, []
    for before, old, after, new, mode in MOVES:
        name = f"{before}-{old}-{after}-{new}-{mode}"
        jobs.append(make_resume_job(out, argv, name, mode, new, ranks=after, resume=[f"{before}-{old}-{mode}", 2]))
    launch_by_ranks(jobs)
    for job in jobs:
        records, weights = read_job_result(out, job["resume"][0])
        resumed_records, resumed_weights = read_job_result(out, job["name"])
        expected, actual = reproducible_records(records, after=2), reproducible_records(resumed_records)
        assert [row["tokens"] for row in actual] == [row["tokens"] for row in expected]
        difference = RunDifference.between((actual, resumed_weights), (expected, weights))
        assert difference.is_rounding(), (job["name"], difference)


def read_metadata(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def finished_run(argv: list[str], session_dir: Path) -> Path:
    """The folder of a run of the whole program on two ranks that ended well."""
    flags = ["--mode", "lora", *argv, "--lora-dropout", "0.1", "--micro-batch", "1", "--ds-config", "zero2"]
    train(flags, out=session_dir / "ended", world_size=2, env={"WANDB_MODE": "offline"})
    return session_dir / "ended"


@pytest.fixture(scope="module")
def other_data(session_dir: Path) -> str:
    return write_records(session_dir / "other.jsonl", num_records=12, seed=11)


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of that run, to go on with."""
    return Path(shutil.copytree(finished_run, tmp_path / "again", symlinks=True))


@pytest.mark.slow
def test_resume_takes_everything_from_the_run_folder(finished_run, folder):
    first = read_metadata(folder)
    (folder / "checkpoints/step-000099").mkdir()  # damaged, and later than where the run goes on
    flags = ["--mode", "lora", "--resume", "step-3", "--save-total-limit", "2"]
    train(flags, out=folder, world_size=2, env={"WANDB_MODE": "offline"})

    before, after = read_records(finished_run), read_records(folder)
    assert reproducible_records(after) == reproducible_records(before), "bitwise, and no row doubled or missing"
    times = [row["time"] for row in after]
    assert times == sorted(times), "the clock goes on from where the run stood"
    (event,) = read_events(folder, "resumed")
    cut = len([row for row in before if row["step"] > 3 or row.get("event") == "finished"])
    assert event["message"] == f"resumed from step-000003, {cut} rows after it cut off"
    assert event["facts"]["rows_cut"] == cut
    assert event["facts"]["changed"] == {}
    assert after[[row["step"] for row in after].index(4) - 1] == event, "between the rows before and those after"

    again = read_metadata(folder)
    assert {key: again[key] for key in first} == first, "run.json tells how the run began"
    wandb_ids = [path.name.split("-")[-1] for path in (folder / "wandb").glob("offline-run-*")]
    assert wandb_ids == [first["run_id"]] * 2, "W&B goes on with the same run"
    best = min((row for row in before if row["kind"] == "eval" and row["step"]), key=lambda row: row["loss"])["step"]
    kept = {int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")}
    assert kept == {best, 6, 7}, "those of the course that was left are gone"
    exported = [(path / "model" / "adapter_model.safetensors").read_bytes() for path in (finished_run, folder)]
    assert exported[0] == exported[1]


@pytest.mark.slow
def test_an_allowed_change_on_resume_is_recorded_and_stays(finished_run, folder):
    changes = ["--lr", "1e-4", "--allow-change", "lr"]
    train(["--mode", "lora", "--resume", "step-5", *changes], out=folder, world_size=1)
    first = read_records(folder)
    (event,) = read_events(folder, "resumed")
    change = event["facts"]["changed"]
    assert change["lr"] == [LEARNING_RATE, 1e-4]
    assert set(change) == {"lr"}
    assert f"lr changed from {LEARNING_RATE} to 0.0001" in event["message"]
    rates = [row["lr"] for row in first if row["kind"] == "step"]
    assert rates == pytest.approx([(LEARNING_RATE if step < 5 else 1e-4) * (1 - step / STEPS) for step in range(STEPS)])
    assert read_metadata(folder)["settings"] == read_metadata(finished_run)["settings"]
    assert read_metadata(folder)["resumed"]["changed"] == change

    killed = shutil.copytree(folder, folder.parent / "killed", symlinks=True)  # before a checkpoint with the change
    for saved in [f for f in (killed / "checkpoints").iterdir() if f.name != "step-000005"]:
        shutil.rmtree(saved)
    (check,) = (check for check in inspect_run(killed) if check.name == "resume")
    assert "pass --allow-change lr" in check.message, "as --resume, which has no other proof of what was allowed"

    shutil.rmtree(folder / "checkpoints/step-000007")
    train(["--mode", "lora", "--resume"], out=folder, world_size=1)  # the newest, and the rate without saying it again
    assert read_reproducible_records(folder) == reproducible_records(first)
    events = read_events(folder, "resumed")
    assert [event["step"] for event in events] == [5, 6]
    assert events[-1]["facts"]["changed"] == change, "still another rate than the run began with"


REFUSED: list[tuple[str, tuple[Any, ...], str]] = [  # flags, an edit of run.json, what is said
    ("--lr 1", (), "lr is 1.0 and was 0.003 in this run; restore it, or pass --allow-change lr as well"),
    ("--data OTHER", (), "data is "),
    ("--mode full", (), "--mode full: the run in"),
    ("--allow-change data", (), "--allow-change data: expected one of "),
    ("--resume step-99", (), "--resume step-99: not in"),
    ("", ("train", "lr", 0.005), "--resume: lr is 0.005 and was 0.003"),
    ("", ("train", "seed", 7), "--resume: seed is 7 and was 42"),
    ("", ("lora", "alpha", 64.0), "--resume: alpha is 64.0 and was "),
]


def read_contents(folder: Path) -> dict[Path, bytes]:
    """All files but logs, of W&B's client too, and the lock, which names who came last."""
    files = (path for path in folder.rglob("*") if path.is_file() and not {"wandb", "log", LOCK_FILE} & {*path.parts})
    return {path: path.read_bytes() for path in files}


def resume_each(argvs: list[list[str]]) -> int:
    """Resume these runs one after another in this process; the lowest exit code."""
    return min(run_train_script(["--mode", "lora", "--resume", *argv]) for argv in argvs)


@pytest.mark.slow
def test_a_resume_that_would_give_other_numbers_is_refused_in_one_line(finished_run, other_data, tmp_path):
    """By the flags, or because run.json was edited since the checkpoint; and nothing in the folder is touched."""
    argvs, log = [], tmp_path / "log"
    for number, (flags, edit, _) in enumerate(REFUSED):
        folder = Path(shutil.copytree(finished_run, tmp_path / str(number), symlinks=True))
        if edit:
            (group, name, value), metadata = edit, read_metadata(folder)
            metadata["settings"][group][name] = value
            (folder / "run.json").write_text(json.dumps(metadata))
        argvs.append([*flags.replace("OTHER", other_data).split(), "--output-dir", str(folder)])
    before = read_contents(tmp_path)
    assert run_on_ranks(1, resume_each, argvs, log=log) == 2, log.read_text()
    lines = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    for line, (_, _, expected) in zip(lines, REFUSED, strict=True):
        assert expected in line
    assert "Traceback" not in log.read_text()
    assert read_contents(tmp_path) == before


@pytest.mark.slow
def test_a_base_whose_configuration_was_edited_since_the_checkpoint_is_refused(dropout_model, folder, tmp_path):
    """Its weights are the same, and every number would be another."""
    path, log = Path(dropout_model) / "config.json", tmp_path / "log"
    original = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(original) | {"layer_norm_epsilon": 0.01, "n_head": 4}))
        assert run_on_ranks(1, resume_each, [["--output-dir", str(folder)]], log=log) == 2, log.read_text()
    finally:
        path.write_text(original)
    assert "error: --resume: model_config is " in log.read_text()


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again_unasked(finished_run, folder, tmp_path):
    """Not even under --resume auto, which a requeued job passes; one that never had a checkpoint does begin again."""
    shutil.rmtree(folder / "checkpoints")

    before = read_contents(folder)
    rows, log = (folder / "metrics.jsonl").read_bytes(), tmp_path / "log"
    argv = ["--mode", "lora", "--resume", "auto", "--output-dir", str(folder)]
    assert run_on_ranks(1, run_train_script, argv, log=log) == 2, log.read_text()
    assert "--allow-change records to begin again" in log.read_text()
    assert read_contents(folder) == before
    assert find_resume_source(folder, "latest", base="", allows_records=True) == (None, "")
    with pytest.raises(UserError, match=f"by its rows it saved one after step {STEPS}; restore it"):
        find_resume_source(folder, "latest", base="", allows_records=False)
    (folder / "metrics.jsonl").rename(tmp_path / "rows")
    with pytest.raises(UserError, match="has no checkpoint, and it has exported a model; restore it"):
        find_resume_source(folder, "latest", base="", allows_records=False)

    shutil.rmtree(folder / "model")
    (folder / "metrics.jsonl").write_bytes(b"".join(rows.splitlines(keepends=True)[:2]))  # killed in the first step
    (folder / "eval_records/.step-000000-val.parquet.0123456789ab.tmp").touch()
    output = train(["--mode", "lora", "--resume", "auto"], out=folder, world_size=2)
    assert "resumed from the start: the run had no checkpoint; its rows are kept in metrics.jsonl.1" in output
    assert len((folder / "metrics.jsonl.1").read_bytes().splitlines()) == 2
    assert not list(folder.rglob("*.tmp"))
    assert read_reproducible_records(folder) == read_reproducible_records(finished_run)
    assert [event["step"] for event in read_events(folder, "checkpoint")] == list(range(1, STEPS + 1))


def run_fp16_jobs(jobs: list[dict[str, Any]]) -> int:
    """`run_jobs` in fp16 on a processor, which computes in it slowly; DeepSpeed asks only whether it is fast. The loss
    scale begins so high that the first steps overflow, and grows after four good ones."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    from trainer.distributed.deepspeed_config import build_deepspeed_config

    accelerator_class = type(get_accelerator())
    accelerator_class.is_fp16_supported = lambda self: True
    accelerator_class.supported_dtypes = lambda self: [torch.float, torch.bfloat16, torch.half]
    original = build_deepspeed_config
    fp16_config = {"enabled": True, "initial_scale_power": 19, "loss_scale_window": 4, "hysteresis": 1}
    run_plan.build_deepspeed_config = lambda *args, **options: original(*args, **options) | {"fp16": fp16_config}
    return run_jobs(jobs)


def test_an_fp16_run_resumes_with_its_float32_weights_and_loss_scale(argv, tmp_path):
    """A resume that began anew with the scale would skip steps again, one from halved weights would drift."""
    base = ["--mode", "full", *argv, "--precision", "fp16", "--ds-config", "zero3", "--max-steps", "28"]
    jobs = [
        make_job(tmp_path, "whole", [*base, "--save-every", "20"]),
        make_job(tmp_path, "again", base, resume=["whole", 20]),
    ]
    launch_jobs(1, jobs, target=run_fp16_jobs)
    whole, again = (read_job_result(tmp_path, name)[0] for name in ("whole", "again"))
    skipped = [row["step"] for row in whole if row.get("event") == "skipped_step"]
    assert min(skipped) == 1
    assert max(skipped) > 20, "so that the place within the window shows"
    assert [row["step"] for row in again if row.get("event") == "skipped_step"] == [n for n in skipped if n > 20]
    assert_resumed_bitwise(tmp_path, "whole", "again", 20)


def load_on_three_hosts(folder: Path) -> int:
    """Of ranks 0 to 4 two are on host a, two on b and one on c; only a and c see the folder. Counts what is sent."""
    sent: list[list[int]] = []
    with joined_ranks() as context, unittest.mock.patch.object(torch.distributed, "broadcast") as broadcast:
        original, broadcast.side_effect = torch.distributed.distributed_c10d.broadcast, None

        def count(tensor: torch.Tensor, source: int, group: Any) -> None:
            sent.append(torch.distributed.get_process_group_ranks(group))
            original(tensor, source, group=group)

        broadcast.side_effect = count
        context = replace(context, hosts=("a", "a", "b", "b", "c"))
        source = checkpoint.resolve_checkpoint(folder / "checkpoints", "latest")
        if context.hosts[context.rank] == "b":
            source = replace(source, folder=Path("/nowhere/checkpoints") / source.folder.name)
        module = torch.nn.Module()
        module.w = torch.nn.Parameter(torch.zeros(3))
        checkpoint.load_weights(source, module, context)
        assert torch.equal(module.w, torch.full((3,), 2.0))
        all_sent = context.all_gather_object(sent)
    assert all_sent == [[[0, 2]], [], [[0, 2], [2, 3]], [[2, 3]], []], all_sent
    return 0


def test_a_checkpoint_is_read_where_its_folder_is_shared_and_sent_once_to_each_other_host(tmp_path):
    for step in (1, 2):
        save_stub_checkpoint(tmp_path / "checkpoints", step)
    (tmp_path / LOCK_FILE).write_text("process 1 on a")
    assert run_on_ranks(5, load_on_three_hosts, tmp_path, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
