"""Texts of validation prompts at each evaluation, and of all test records to be scored: they change no number."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.engines import StartedRun, joined_ranks, start_engine
from helpers.launch_ranks import train
from helpers.matrix import launch_jobs, make_job
from helpers.process_groups import read_events, read_reproducible_records
from helpers.tiny_inputs import tiny_argv, write_records

from trainer.config import cli
from trainer.config.errors import TrainingError, UserError
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, TokenDataset
from trainer.data.prepare import prepare
from trainer.data.tokenizer import load_tokenizer
from trainer.distributed.decoding import decode
from trainer.model.build import build_model, load_config
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, read_evaluations
from trainer.training.generation import GenerationEvaluator, check_test_records, make_prompts, score_records, split_rows
from trainer.training.scorers import score_text


@pytest.fixture(scope="module")
def argv(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    text = "--block-size 24 --eval-batch 4 --global-batch 6 --objective completion --lr 0.003"
    return tiny_argv(tiny_model, data_files, text)


def prepare_settings(text: str, *flags: str) -> tuple[Settings, PreparedDataset]:
    """The settings of these flags, and their data."""
    settings = cli.parse_args(["--mode", "full", "--global-batch", "2", *text.split(), *flags]).settings
    return settings, prepare(settings.data, model=settings.model.model, global_batch=2)


def test_the_opening_of_a_text_without_a_prompt_is_a_prompt_for_a_sample(tiny_model, tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("".join(f"w{n} w{n + 1} " * 9 + "\n" for n in range(1, 60)))
    _, data = prepare_settings(f"--model {tiny_model} --data {path} --block-size 16 --val-fraction 0.3")
    prompts = make_prompts(data, load_tokenizer(tiny_model), 32)
    assert prompts
    for prompt, (_, text) in zip(prompts, data.val_texts, strict=False):
        assert f"{prompt.text} {prompt.references[0]}".split() == text.split()
    assert make_prompts(data, load_tokenizer(tiny_model), 12) == [], "9 tokens of prompt leave no room among 12"


PROMPTS = [[5, 6, 7], [40], [3, 9, 27, 81, 50, 53, 60, 8]]
MAX_NEW_TOKENS = 7


def shake_weights(run: StartedRun) -> None:
    """Change the trained weights, the same on all ranks, so that adapters say something, too."""
    from deepspeed.runtime.zero import stage3

    is_zero3 = run.plan.deepspeed_file.stage == 3
    for parameter in run.engine.trainable_params.values():
        with stage3.GatheredParameters([parameter], modifier_rank=0) if is_zero3 else torch.no_grad():
            torch.manual_seed(parameter.ds_numel if is_zero3 else parameter.numel())
            parameter.data += 0.1 * torch.randn(parameter.shape)


def generate_jobs(jobs: list[dict[str, Any]]) -> int:
    """Complete each job's prompts by the engine and token by token; out/name.json has both."""
    with joined_ranks() as dist_context:
        for job in jobs:
            run = start_engine(job, dist_context)
            shake_weights(run)
            run.engine.model.causal.generation_config.repetition_penalty = 9.0  # a base may name one
            completions = run.engine.generate(PROMPTS, [MAX_NEW_TOKENS] * len(PROMPTS), [0], batch_size=3)
            weights = dict(run.engine.state.gather_weights())
            if dist_context.rank:
                continue
            plain_model = build_model(run.settings).module.eval()
            plain_model.load_state_dict(weights, strict=False)
            plain = [generate_token_by_token(plain_model, prompt) for prompt in PROMPTS]
            result = {"made": [completion.ids for completion in completions], "plain": plain}
            (Path(job["out"]) / f"{job['name']}.json").write_text(json.dumps(result))
    return 0


@torch.no_grad()
def generate_token_by_token(module: Any, prompt: list[int]) -> list[int]:
    """One prompt, one token at a time, from the logits of the whole row."""
    ids = list(prompt)
    for _ in range(MAX_NEW_TOKENS):
        next_token = int(module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if next_token == 0:
            break
        ids.append(next_token)
    return ids[len(prompt) :]


@pytest.mark.parametrize(("ranks", "zero"), [(1, "zero0"), (2, "zero3")])
def test_greedy_generation_equals_token_by_token_argmax(ranks, zero, argv, tmp_path):
    """Batched, cached and padded, with every weight and with adapters."""
    jobs = [make_job(tmp_path, mode, [*argv, "--ds-config", zero, "--mode", mode]) for mode in ("full", "lora")]
    launch_jobs(ranks, jobs, target=generate_jobs)
    for mode in ("full", "lora"):
        result = json.loads((tmp_path / f"{mode}.json").read_text())
        assert result["made"] == result["plain"]
        assert any(len(set(tokens)) > 1 for tokens in result["made"]), "something to compare"


@pytest.fixture(scope="module")
def sampled_and_plain_runs(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run under ZeRO-3 with samples and scores, one of a scorer that fails, and without any."""
    out = tmp_path_factory.mktemp("sampled")
    test_file = write_records(out / "test.jsonl", num_records=12, seed=9)
    retained = write_records(out / "retain.jsonl", num_records=7, seed=10, unknown_word="old")
    flags = f"--mode full --max-steps 5 --eval-every 2 --dropout 0.1 --ds-config zero3 --test-data {test_file}"
    flags += f" --retain-data {retained}"
    (out / "mine.py").write_text("def same(text, reference): return text == reference or 1 / 0")
    scored = f"--num-samples 3 --score exact --score f1 --score {out}/mine.py:same"
    for name, sample_flags in (("with", scored), ("without", "--num-samples 0")):
        train([*argv, *f"{flags} {sample_flags}".split()], out=out / name)
    return out / "with", out / "without"


def test_every_evaluation_leaves_samples_which_change_no_other_number(sampled_and_plain_runs, data_files):
    sampled, bare = sampled_and_plain_runs
    assert read_reproducible_records(sampled) == read_reproducible_records(bare)
    for name in ("model.safetensors", "config.json"):
        assert (sampled / "model" / name).read_bytes() == (bare / "model" / name).read_bytes()
    assert read_events(bare, "samples") == []

    events = read_events(sampled, "samples")
    assert [event["step"] for event in events] == [0, 2, 4, 5]
    val_records = [json.loads(line) for line in Path(data_files[1]).read_text().splitlines()]
    for event in events:
        facts = event["facts"]
        texts = [{"prompt": text["prompt"], "completion": text["reference"]} for text in facts["texts"]]
        assert texts == val_records[:3]


def score_jobs(jobs: list[dict[str, Any]]) -> int:
    """Score the test records of each job by weights that were never trained; its run folder has the event's facts."""
    with joined_ranks() as dist_context:
        for job in jobs:
            run = start_engine(job, dist_context)
            shake_weights(run)
            row_nll = [0.0] * len(run.data.test)
            event = score_records(run.settings, run.data, run.engine, step=1, row_nll=row_nll, now=0.0)
            if dist_context.rank == 0:
                Path(run.settings.run_folder, "facts.json").write_text(json.dumps(event.facts))
    return 0


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.sweep)])
def test_scores_do_not_depend_on_ranks_zero_files_packing_or_the_batch(precision, argv, tmp_path):
    """Prompts of 2 to 6 tokens, padded on the left, some of which leave less room than --score-tokens asks for."""
    test_file = write_records(tmp_path / "test.jsonl", num_records=20, seed=5)
    flags = [*argv, "--test-data", test_file, "--score", "f1", "--score-tokens", "28", "--precision", precision]
    for ranks, zero in ((1, "zero0"), (2, "zero3"), (3, "zero2")):
        jobs = []
        for batch in (1, 8):
            name = f"{ranks}-{batch}"
            more = ["--mode", "full", "--ds-config", zero, "--eval-batch", str(batch), "--output-dir", tmp_path / name]
            jobs.append(make_job(tmp_path, name, [*flags, *map(str, more), *["--packing"] * (ranks == 1)]))
        launch_jobs(ranks, jobs, target=score_jobs)
    rows = [read_evaluations(tmp_path / f"{r}-{b}" / EVAL_RECORDS_FOLDER) for r in (1, 2, 3) for b in (1, 8)]
    facts = json.loads((tmp_path / "1-8" / "facts.json").read_text())
    first = rows[0]
    assert len(set(first["text"])) > 15, "something to compare"
    lengths = [len(text.split()) for text in first["text"]]
    assert {26, 27, 28} <= set(lengths) if precision == "fp32" else max(lengths) > 20
    for other in rows[1:]:  # where the texts are not equal, two tokens were
        same = first["text"] == other["text"]
        assert (~same).sum() <= (0 if precision == "fp32" else facts["num_near_ties"])
        assert first[same].equals(other[same])
    assert facts["scores"]["f1"] == pytest.approx(rows[1]["score_f1"].mean())
    assert facts["num_near_ties"] < 4 or precision == "bf16"


def test_texts_that_cannot_be_generated_cost_themselves_only(argv):
    settings, data = prepare_settings("--test-fraction 0.2 --score exact", *argv)
    causal, fail = SimpleNamespace(config=load_config(settings.model)), mock.Mock(side_effect=TrainingError("no room"))
    engine: Any = SimpleNamespace(model=SimpleNamespace(causal=causal), dist_context=None, generate=fail)
    evaluator, record = GenerationEvaluator(engine, data, settings), SimpleNamespace(step=2, time=1.0)
    assert [event and event.message for event in map(evaluator.evaluate, [record] * 2)] == ["no samples: no room", None]
    event = score_records(settings, data, engine, step=1, row_nll=[0.0] * len(data.test), now=0.0)
    assert (event.message, event.facts["scores"]) == ("no scores of the test records: no room", {})


def test_tokens_that_are_equally_likely_are_noticed(tiny_model):
    settings = cli.parse_args(["--mode", "full", "--model", tiny_model, "--preset", "demo"]).settings
    causal = build_model(settings).causal.eval()
    prompts = [[5, 6, 7], [40]]
    before = decode(causal, prompts, 5, [0])
    assert not any(completion.is_near_tie for completion in before)
    likeliest = before[0].ids[0]
    with torch.no_grad():  # two tokens of one embedding have one logit, in the first text only
        unused = next(t for t in range(1, 97) if t not in {*prompts[0], *prompts[1], *before[0].ids, *before[1].ids})
        causal.lm_head.weight[unused] = causal.lm_head.weight[likeliest]
    after = decode(causal, prompts, 1, [0])
    assert [completion.is_near_tie for completion in after] == [True, likeliest == before[1].ids[0]]


@pytest.mark.parametrize("split", ["retain", "test"])
def test_a_run_leaves_text_and_scores_of_each_test_record_and_says_what_failed(sampled_and_plain_runs, split):
    scored, plain = sampled_and_plain_runs
    (event,) = read_events(scored, f"{split}_scores")
    rows = read_evaluations(scored / EVAL_RECORDS_FOLDER).query("split == @split and step == 5")
    losses = read_evaluations(plain / EVAL_RECORDS_FOLDER).query("split == @split and step == 5")
    assert rows[list(losses)].equals(losses), "the losses are those of a run without scores"
    lines = (scored.parent / f"{split}.jsonl").read_text().splitlines()
    references = [json.loads(line)["completion"] for line in lines]
    for name in ("exact", "f1"):
        expected = [score_text(name, text, reference) for text, reference in zip(rows["text"], references, strict=True)]
        assert rows[f"score_{name}"].tolist() == expected
        assert event["facts"]["scores"][name] == pytest.approx(rows[f"score_{name}"].mean())
    ((name, reason),) = event["facts"]["failures"].items()
    assert reason.startswith("failed with ZeroDivisionError: division by zero (text ")
    assert f"no scores by {name}: it {reason}" in event["message"]
    assert not any("mine" in column for column in rows)
    assert read_events(scored, "finished"), "it costs nothing else"
    card = (scored / "model" / "README.md").read_text()
    means = f"`exact` {rows['score_exact'].mean():.4f}, `f1` {rows['score_f1'].mean():.4f}."
    assert (f"test records: {means}" in card) == (split == "test")


def test_the_reference_of_a_conversation_is_its_last_assistant_turn():
    """The end token is 9: two turns, and one that is cut within its last turn."""
    rows = [([1, 2, 9, 3, 4, 9, 5], [0, 1, 1, 0, 1, 1, 0]), ([1, 2, 9, 3, 4, 5, 6, 7], [0, 1, 1, 0, 1, 1, 1, 1])]
    ids, masks = (np.concatenate([row[i] for row in rows]) for i in (0, 1))
    test = TokenDataset(ids=ids.astype(np.uint16), offsets=np.array([0, 7, 15]), target_mask=masks.astype(np.uint8))
    expected = [((1, 2, 9, 3), (4, 9), True), ((1, 2, 9, 3), (4, 5, 6, 7), False)]
    assert split_rows(test, [9], 8) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--val-fraction 0.2", "there are no test records; expected --test-data, or --test-fraction 0.1"),
        ("--test-fraction 0.2 --completion {completion}", "the records have no prompts; expected --prompt beside"),
        ("--test-fraction 0.2 --score json", "--score json: no test record has a JSON value to compare with"),
    ],
)
def test_test_records_that_cannot_be_scored_are_refused_before_the_model_is_built(
    flags, message, tiny_model, data_files
):
    text = f"--score exact --model {tiny_model} --data {data_files[0]} --preset demo --block-size 24 {flags}"
    settings, data = prepare_settings(f"{text} --objective completion")
    with pytest.raises(UserError, match=re.escape(message)):
        check_test_records(settings, data)
    unseen = replace(settings, output=replace(settings.output, export="none"))
    check_test_records(unseen, data)
