"""The card's program is Hugging Face's Trainer: ours follows it step by step. Both start from the same model folder and
feed the same blocks in the same order, with the card's numbers; the Trainer is the installed one with its defaults.
Without dropout the two are one computation up to the rounding of float32; with it they draw other masks."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import prepare_data
from helpers.matrix import launch_jobs, make_job, read_job_result
from helpers.tiny_inputs import tiny_argv
from helpers.tolerances import TRAINER_EVAL_TOLERANCE, TRAINER_LOSS_TOLERANCE, TRAINER_NORM_TOLERANCE

from trainer.config import reference
from trainer.data.dataset import load
from trainer.data.sampler import epoch_order

STEPS = 60  # five epochs and a half of 21 blocks, 2 a step: the last step of each epoch has one
CARD = reference.SETTINGS


def card_argv(model: str, data_files: tuple[str, str], *extra_flags: str) -> list[str]:
    """Flags of the card preset on the tiny model and data."""
    text = f"--mode full --preset card --block-size 16 --max-steps {STEPS} --save-every never"
    return tiny_argv(model, data_files, text, *extra_flags)


def run_hugging_face_trainer(model: str, data: Path, out: Path, **overrides: Any) -> list[dict[str, float]]:
    """The log of a real Trainer with the card's numbers on the blocks of `data`: a row per step and evaluation."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    prepared = load(data)

    class OurOrder(torch.utils.data.Sampler):
        def __init__(self) -> None:
            self.epochs = itertools.count()

        def __len__(self) -> int:
            return len(prepared.train)

        def __iter__(self) -> Iterator[int]:
            options = {"seed": CARD["seed"], "global_batch": CARD["global_batch"], "group_by_length": False}
            yield from epoch_order(prepared.train, epoch=next(self.epochs), **options).tolist()

    class InOurOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
            return OurOrder()

    def blocks(rows: Any) -> list[dict[str, Any]]:
        ids = [torch.from_numpy(rows.row(i)) for i in range(len(rows))]
        # Nothing predicts a block's first token. The Trainer's count of targets says so in recent versions only.
        return [{"input_ids": row, "labels": torch.cat([torch.tensor([-100]), row[1:]])} for row in ids]

    numbers = {
        "learning_rate": CARD["lr"],
        "per_device_train_batch_size": CARD["global_batch"],
        "seed": CARD["seed"],
        "per_device_eval_batch_size": CARD["eval_batch"],
        "adam_beta1": CARD["beta1"],
        "adam_beta2": CARD["beta2"],
        "adam_epsilon": CARD["epsilon"],
        "lr_scheduler_type": CARD["schedule"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # accelerate would set it, aloud
        arguments = TrainingArguments(
            output_dir=str(out),
            max_steps=STEPS,
            logging_steps=1,
            logging_first_step=True,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **{**numbers, **overrides},
        )
    torch.set_num_threads(1)  # the model is so small that a second one only waits
    trainer = InOurOrder(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=blocks(prepared.train),
        eval_dataset=blocks(prepared.val),
    )
    trainer.train()
    return trainer.state.log_history


def test_the_card_preset_follows_hugging_faces_trainer_step_by_step(tiny_model, data_files, tmp_path):
    faster = ["--lr", "1e-3"]  # the weights move thirty times as far, so that more than the start is compared
    argvs = {"card": card_argv(tiny_model, data_files), "faster": card_argv(tiny_model, data_files, *faster)}
    launch_jobs(1, [make_job(tmp_path, name, argv) for name, argv in argvs.items()])
    data_dir = prepare_data(argvs["card"])
    for name, changed in (("card", {}), ("faster", {"learning_rate": 1e-3})):
        rows = read_job_result(tmp_path, name)[0]
        log = run_hugging_face_trainer(tiny_model, data_dir, tmp_path, **changed)
        theirs = [row for row in log if "loss" in row]
        steps = [row for row in rows if row["kind"] == "step"]
        assert [row["step"] for row in theirs] == [row["step"] for row in steps] == list(range(1, STEPS + 1))
        pairs = list(zip(steps, theirs, strict=True))
        loss, norm = (max(abs(a[key] / b[key] - 1) for a, b in pairs) for key in ("loss", "grad_norm"))
        evaluated = {row["step"]: row["eval_loss"] for row in log if "eval_loss" in row}
        mine = {row["step"]: row["loss"] for row in rows if row["kind"] == "eval" and row["step"]}
        assert mine.keys() == evaluated.keys()
        final = max(abs(mine[step] / evaluated[step] - 1) for step in mine)
        print(f"{name}: loss {loss:.1e} norm {norm:.1e} eval {final:.1e}; {steps[0]['loss']} -> {steps[-1]['loss']}")
        assert [a["lr"] for a, _ in pairs] == [b["learning_rate"] for _, b in pairs]
        assert [a["epoch"] for a, _ in pairs[10::11]] == [b["epoch"] for _, b in pairs[10::11]] == [1, 2, 3, 4, 5]
        assert loss <= TRAINER_LOSS_TOLERANCE
        assert norm <= TRAINER_NORM_TOLERANCE
        assert final <= TRAINER_EVAL_TOLERANCE
        assert max(row["grad_norm"] for row in steps) > 1, "clipping at 1.0 was at work"
