"""An unknown flag is answered in one line with ours, in every program."""

import dataclasses
import itertools
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import cli
from trainer.config.argument_parser import read_suggestions
from trainer.config.errors import UserError

SUGGESTIONS, _ = read_suggestions()
LAUNCH = Path(__file__).parents[3] / "launch"
FLAGS = cli.build_parser().flags()
OURS = {flag.lstrip("-").replace("-", "_") for flag in FLAGS}


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        ("--learning_rate 1e-4", "--learning_rate 1e-4: did you mean --lr 1e-4?"),
        ("--learning-rate=1e-4", "--learning-rate 1e-4: did you mean --lr 1e-4?"),
        ("--gradient_accumulation_steps 8", "derived here from --global-batch / (--micro-batch x ranks); leave it out"),
        ("--weight_decay 0.1", "did you mean --weight-decay 0.1?"),
        ("--bf16", "--bf16: did you mean --precision bf16?"),
        ("--bf16 False", "leave it out; --precision bf16 would turn it on"),
        ("--save_strategy no", "did you mean --save-every never?"),
        ("--dtype bfloat16", "did you mean --precision bf16?"),
        ("--gradient_checkpointing true", "did you mean --activation-checkpointing?"),
        ("--lrr 3", "did you mean --lr 3?"),
        ("-lr 3", "did you mean --lr 3?"),
        ("--leraning-rate 3", "--leraning-rate 3: did you mean --lr 3?"),
        ("--gradient_acumulation_steps 3", "derived here from --global-batch"),
        ("--frobnicate 3", "--frobnicate 3: unknown flag (--help lists the flags)"),
        ("--frob\nnicate", "--frob\\nnicate: unknown flag"),
        ("--ways lora", "--ways lora: unknown flag"),  # --methods is study.py's
    ],
)
def test_an_unknown_flag_is_answered_with_ours_and_its_value(argv, answer):
    with pytest.raises(UserError) as caught:
        cli.parse_args(["--mode", "full", *argv.split(" ")])
    assert answer in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_flag_that_an_answer_names_exists_and_no_spelling_elsewhere_is_one_of_ours(monkeypatch):
    monkeypatch.syspath_prepend(LAUNCH)
    import study

    words = {word.strip(";,()").partition("=")[0] for answer in SUGGESTIONS.values() for word in answer.split()}
    assert {word for word in words if word.startswith("--")} <= {*FLAGS, *study.build_parser().flags(), "--card"}
    assert not OURS & set(SUGGESTIONS)


def test_the_common_flags_of_transformers_and_peft_are_answered():
    """Taken from the installed dataclasses, so that a renaming there is noticed."""
    from peft import LoraConfig
    from transformers import TrainingArguments

    names = (
        "learning_rate per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps output_dir "
        "num_train_epochs lr_scheduler_type eval_steps eval_strategy save_steps save_strategy logging_steps bf16 fp16 "
        "gradient_checkpointing torch_compile deepspeed max_steps weight_decay max_grad_norm warmup_steps run_name "
        "report_to optim seed"
    )
    for program, common in (
        (TrainingArguments, set(names.split())),
        (
            LoraConfig,
            {"r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora", "use_rslora"},
        ),
    ):
        assert common <= {field.name for field in dataclasses.fields(program)}
        assert common <= OURS | set(SUGGESTIONS)


STRANGE = ("", "nan", "-inf", "1e999", "-1", "\u00b2", "9" * 5000, "a\nb", "\0", "\ud800", "~", ",,", "--", "%(prog)s")


@pytest.mark.parametrize("program", ["train", "bench", "cluster", "compare", "doctor", "export", "generate", "study"])
def test_any_value_of_any_flag_is_taken_or_answered_in_one_line(program):
    parsers = [cli.build_parser()]
    if program != "train":
        build_parser = runpy.run_path(str(LAUNCH / f"{program}.py"))["build_parser"]
        parsers = [build_parser(name) for name in ("steps", "memory")] if program == "bench" else [build_parser()]
    for parser in parsers:
        for flag, value in itertools.product(sorted({*parser.flags()} - {"-h", "--help"}), STRANGE):
            message = ""
            try:
                if program == "train":
                    cli.parse_args(["--mode", "lora", f"{flag}={value}"])
                else:
                    parser.parse_args([f"{flag}={value}"])
            except UserError as error:
                message = str(error)
            assert "\n" not in message


@pytest.mark.parametrize(
    ("program", "argv", "answer"),
    [
        ("train", "--mode full --learning_rate 1e-4", "--learning_rate 1e-4: did you mean --lr 1e-4?"),
        ("study", "--ways lora", "--ways lora: did you mean --methods lora?"),
        ("study", "--learning_rate 1e-4", "did you mean --lr 1e-4?"),
        ("doctor", "--mode full --rank 2", "--rank 2: did you mean --ranks 2?"),
        ("compare", "--out=x", "--out x: did you mean --output-dir x?"),
        ("export", "RUN --out=x", "--out x: did you mean --output-dir x?"),
        ("generate", "RUN --num 0", "--num: 0: expected a whole number from 1 to 32"),
        ("generate", "RUN --temperature nan", "--temperature: nan: expected a number from 0 to 100"),
        ("generate", "RUN --seed 99999999999999999999", "expected a whole number from 0"),
        ("doctor", "--mode full --gpu-memory nan", "--gpu-memory: nan: expected a number from 0.1 to 1e+06"),
        ("doctor", "--mode full --limit -5", "--limit: -5: expected a number from 1"),
        ("doctor", "--mode full --limit inf", "--limit: inf: expected a number from 1"),
        ("train", "--mode full --show-example -3", "--show-example: -3: expected a whole number from 1"),
        ("bench", "speed", "speed: expected steps or memory"),
    ],
)
def test_every_program_answers_in_one_line_with_exit_code_2(program, argv, answer):
    command = [sys.executable, str(LAUNCH / f"{program}.py"), *argv.split()]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=LAUNCH.parent)
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert answer in process.stderr
