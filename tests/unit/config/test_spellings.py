"""Flags of transformers, TRL and peft are taken as ours or refused at once; an unknown one is answered with ours."""

import dataclasses
import enum
import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.spellings import SPELLED_PARTS, read_table, translate

LAUNCH = Path(__file__).parents[3] / "launch"
FLAGS = cli.build_parser().flags()
OURS = {flag.lstrip("-").replace("-", "_") for flag in FLAGS}
TABLE = read_table()
KNOWN = [name for part in SPELLED_PARTS for name in TABLE[part]]
#: Of TRL 1.16.0, which is not installed: SFTConfig without what it inherits, ModelConfig, and its scripts' arguments.
TRL = """
model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path dataset_text_field dataset_kwargs
dataset_num_proc eos_token max_length truncation_mode shuffle_dataset packing packing_strategy padding_free
pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss loss_type activation_offloading pad_token
model_name_or_path model_revision dtype attn_implementation use_peft lora_r lora_alpha lora_dropout lora_target_modules
lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit load_in_4bit
bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage datasets streaming test_split_size dataset_name
dataset_config dataset_train_split dataset_test_split dataset_streaming ignore_bias_buffers
"""


def parse(words: str, num_ranks: int = 1) -> cli.CliArgs:
    return cli.parse_args(words.split(), num_ranks=num_ranks)


def refusals(words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(words)
    return caught.value.lines


def test_every_field_of_transformers_trl_and_peft_is_known_once_and_its_default_taken():
    from peft import LoraConfig
    from transformers import TrainingArguments

    fields = [field for program in (TrainingArguments, LoraConfig) for field in dataclasses.fields(program)]
    names = [*(field.name for field in fields), *TRL.split()]
    assert {name for name in names if name not in {*OURS, *KNOWN, "local_rank"}} == set()
    assert {name for name in KNOWN if KNOWN.count(name) > 1 or name in OURS | set(TABLE["elsewhere"])} == set()
    table = yaml.safe_load((Path(cli.__file__).parent / "spellings.yaml").read_text())
    rows = [names for part in ("same", "switches", "no_effect", "elsewhere") for names in table[part].values()]
    assert len(names := " ".join([*rows, table["together"]]).split()) == len(set(names)), "each stands in one row"
    for field in fields:
        default = field.default.value if isinstance(field.default, enum.Enum) else field.default
        if default is not dataclasses.MISSING:
            assert translate([f"--{field.name}={default}"], FLAGS).problems == [], field.name


@pytest.mark.parametrize(
    ("words", "ours", "note"),
    [
        ("--learning_rate 1e-4", "--lr 1e-4", "learning_rate is --lr here"),
        ("--max_steps -1 --warmup_steps 0.1", "--warmup-ratio 0.1", "warmup_steps 0.1 is --warmup-ratio 0.1 here"),
        ("--lr_scheduler_type constant_with_warmup", "--schedule constant", "lr_scheduler_type constant_with_w"),
        ("--lr_scheduler_type constant", "--schedule constant --warmup-ratio 0", ""),
        ("--lora_r 4 --lora_target_modules all-linear", "--lora-rank 4 --lora-target-modules all", "lora_r is"),
        ("--modules_to_save lm_head embed_tokens", "--modules-to-save lm_head,wte", "modules_to_save lm_head,embed_t"),
        ("--use_dora True --use_rslora false", "--adapter dora", "use_dora is --adapter dora here"),
        ("--load_in_4bit --bnb_4bit_quant_type nf4", "--quant nf4", "load_in_4bit is --quant nf4 here"),
        ("--bf16 --fp16 False --packing true", "--precision bf16 --packing", "bf16 true is --precision bf16 here"),
        ("--bf16 false", "--precision fp32", "bf16 false is --precision fp32 here"),
        ("--torch_dtype bfloat16", "--precision bf16", "(weights that are trained stay in float32)"),
        ("--report_to none", "--wandb disabled", "report_to none is --wandb disabled here"),
        ("--report_to wandb tensorboard", "--report-to wandb,tensorboard", ""),
        ("--eval_strategy steps --eval_steps 50", "--eval-every 50", "eval_steps 50 is --eval-every 50 here"),
        ("--dataset_name a/b --dataset_config c", "--data a/b:c", "dataset_name is --data a/b:c here"),
        ("--data_seed 3 --seed 3 --push_to_hub false --neftune_noise_alpha None", "--seed 3", ""),
        ("--logging_steps 10 --do_train", "", "logging_steps: without effect, every step is recorded"),
        ("--per_device_train_batch_size 3", "--micro-batch 3 --global-batch 6", "per device 3 x accumulation 1 x 2 p"),
        ("--micro-batch 1 --gradient_accumulation_steps 4", "--micro-batch 1 --global-batch 8", ""),
        ("--global-batch 16 --gradient_accumulation_steps 4", "--micro-batch 2 --global-batch 16", ""),
    ],
)
def test_a_flag_of_another_program_is_taken_with_its_value_and_the_plan_says_so(words, ours, note):
    given, expected = parse(f"--mode lora {words}", num_ranks=2), parse(f"--mode lora {ours}")
    assert given.settings.overrides == expected.settings.overrides
    assert note in "; ".join(given.notes)


def test_peft_decides_the_mode_and_a_checkpoint_of_the_trainer_is_ours():
    assert parse("--use_peft").settings.mode == parse("--use_peft true --mode lora").settings.mode == "lora"
    assert parse("--use_peft false").settings.mode == "full"
    assert parse("--use_peft true --mode full --eval_strategy no --eval-every 5").settings.output.eval_every == "5"
    assert parse("--mode full --eval-every 5 --eval_strategy no").settings.output.eval_every == "never"
    assert parse("--mode full --resume_from_checkpoint True").resume == "latest"
    assert parse("--mode full --resume_from_checkpoint runs/a/checkpoint-500").resume == "step-500"


TRL_YAML = """
# TRL's own examples and those of the alignment handbook
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
max_length: 2048
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
eval_strategy: steps
eval_steps: 100
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
bf16: true
optim: adamw_torch
lr_scheduler_type: cosine
warmup_ratio: 0.1
report_to:
- wandb
push_to_hub: false
hub_model_id:
"""


def test_a_yaml_file_of_trl_is_taken_as_it_is(tmp_path):
    (tmp_path / "sft.yaml").write_text(TRL_YAML)
    ours = (
        "--mode lora --model Qwen/Qwen2.5-0.5B --data trl-lib/Capybara --lr 2e-4 --epochs 1 --packing --block-size 2048"
    )
    ours += (
        " --micro-batch 2 --global-batch 64 --activation-checkpointing --eval-every 100 --lora-rank 32 --lora-alpha 16"
    )
    ours += " --lora-target-modules q_proj,v_proj --precision bf16 --optim adamw --schedule cosine --warmup-ratio 0.1"
    given = cli.parse_args(["--config", str(tmp_path / "sft.yaml")], num_ranks=4)
    assert given.settings.overrides == parse(f"{ours} --report-to wandb").settings.overrides
    (tmp_path / "sft.yaml").write_text("mode: full\nneftune_noise_alpha: 5\nlearning_rat: 1")
    assert refusals(f"--config {tmp_path}/sft.yaml --lr 0 --streaming") == [
        "--neftune_noise_alpha 5: noise on embeddings (NEFTune) is not built in",
        "--streaming: data are read whole and kept on disk, not streamed",
        "--lr 0: expected a number above 0",
        "--learning_rat 1: did you mean --lr?",
    ]


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        (
            "--use_liger_kernel --sequence_parallel_size 2 --torch_compile --report_to mlflow",
            [
                "--use_liger_kernel: not built in",
                "--sequence_parallel_size 2: a sequence is not divided",
                "--torch_compile: steps are not compiled here",
                "--report-to mlflow: expected tensorboard or wandb",
            ],
        ),
        ("--lr 0 --epochs 0 --block-size 1 --lrr 3", ["--lr 0: ", "--epochs 0: ", "--lrr 3: did", "--block-size 1: "]),
        ("--quant nf4 --min-lr 1", ["--min-lr 1.0: expected at most", "--quant nf4: a quantised weight"]),
        ("--learning_rate 1e-4 stray {mr}", ["stray {mr}: expected a flag (--help lists the flags); quote a text"]),
        ("--lr_scheduler_type constant --warmup_steps 5", ["--lr_scheduler_type constant: has no warm-up in transf"]),
        (
            "--global-batch 8 --per_device_train_batch_size 3 --gradient_accumulation_steps 2",
            ["--global-batch 8: per dev"],
        ),
        ("--bf16 --fp16", ["--bf16 and --fp16: exclude one another; expected one of them"]),
        ("--peft_use_dora False", ["--peft_use_dora False: leave it out; --adapter dora would turn it on"]),
        ("--lr_scheduler_typ polynomial", ["--lr_scheduler_typ polynomial: did you mean --schedule?"]),
        ("--learning_rate --dataset_name", ["--dataset_name: expected one argument", "--lr: expected one argument"]),
        ("--data A=0.7 --data B=0.3", ["--data: given 2 times; expected once, several with w"]),
        ("--frobnicate 3", ["--frobnicate 3: unknown flag (--help lists the flags)"]),
        (
            '--mode lora --peft-config {"peft_type":"VERA"} --lora-rank 4 --warmup-steps 1 --warmup-ratio 0.1',
            ["--warmup-ratio 0.1: not with", "--lora-rank: not with --peft-config, which says what is trained"],
        ),
    ],
)
def test_what_has_no_equivalent_and_all_other_mistakes_are_told_at_once_a_line_each(words, answers):
    with pytest.raises(UserError) as caught:
        cli.parse_args([*(["--mode", "full"] if "--mode" not in words else []), *words.split(" ")])
    lines = caught.value.lines
    assert len(lines) == len(answers), lines
    assert all(line.startswith(answer) for line, answer in zip(lines, answers, strict=True)), lines


def test_no_suggestion_leads_to_another_refusal():
    for name in {*OURS, *KNOWN, *TABLE["elsewhere"]} - {"help", "config"}:
        for line in refusals(f"--mode=lora --model=m --{name[:-1]}_{name[-1]}"):
            if suggestion := re.search(r"did you mean --(\S+)( \S+)?\?$", line):
                assert suggestion[1].replace("-", "_") in {*OURS, *KNOWN} - {*TABLE["only"]}
                assert not suggestion[2] or parse(f"--mode=lora --{suggestion[1]}{suggestion[2]}")


def test_every_flag_that_an_answer_names_exists(monkeypatch):
    monkeypatch.syspath_prepend(LAUNCH)
    import cluster
    import study

    answers = (answer for _, answer in TABLE["only"].values())
    texts = [*TABLE["elsewhere"].values(), *answers, *TABLE["switches"].values()]
    words = {word.strip(";,()'").partition("=")[0] for text in texts for word in text.split()}
    named = {word for word in words if word.startswith("--")}
    other_programs = {*study.build_parser().flags(), *cluster.build_parser().flags(), "--card", "--push"}
    assert named <= {*FLAGS, *other_programs}


STRANGE = ("", "nan", "1e999", "-1", "\u00b2", "9" * 5000, "a\nb\0\ud800", "%(prog)s")
PROGRAMS = ("train", "cluster", "compare", "doctor", "export", "generate", "judge", "study")


@pytest.mark.parametrize("program", PROGRAMS)
def test_any_value_of_any_flag_is_taken_or_answered_in_one_line(program):
    parser, parse = cli.build_parser(), lambda word: cli.parse_args(["--mode", "lora", word])
    if program != "train":
        parser = runpy.run_path(str(LAUNCH / f"{program}.py"))["build_parser"]()
        parse = lambda word: parser.parse_args([word])  # noqa: E731
    for flag, value in itertools.product(sorted({*parser.flags()} - {"-h", "--help"}), STRANGE):
        message = ""
        try:
            parse(f"{flag}={value}")
        except UserError as error:
            message = str(error)
        assert "\n" not in message


@pytest.mark.parametrize(
    ("program", "argv", "answer"),
    [
        ("train", "--lrate 1e-4", "--lrate 1e-4: unknown flag"),
        ("study", "--seed 3", "--seed=3: the study sets it for each of its runs; expected --seeds"),
        ("doctor", "--mode full --rank 2", "--rank 2: did you mean --ranks?"),
        ("generate", "RUN --num 0", "--num 0: expected a whole number from 1 to 32"),
        ("bench", "--steps -1", "--steps -1: expected a whole number from 1"),
    ],
)
def test_every_program_answers_in_one_line_with_exit_code_2(program, argv, answer):
    command = [sys.executable, str(LAUNCH / f"{program}.py"), *argv.split()]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=LAUNCH.parent)
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert answer in process.stderr
