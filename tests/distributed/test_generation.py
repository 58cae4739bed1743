"""Samples and scores: greedy completions at each evaluation that change no number of the run."""

import contextlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import sacrebleu
import torch
from helpers.engines import joined_ranks, start_engine
from helpers.launch_ranks import train
from helpers.matrix import launch_jobs, make_job
from helpers.process_groups import read_events, read_reproducible_records
from helpers.tiny_inputs import tiny_argv

from trainer.config import cli
from trainer.config.choices import MAX_NUM_SAMPLES
from trainer.config.errors import UserError
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset
from trainer.data.prepare import prepare
from trainer.data.tokenizer import load_tokenizer
from trainer.distributed.process_group import simulated_context
from trainer.model.build import build_model, load_config
from trainer.report.load import load_runs
from trainer.report.page import compare, write_report
from trainer.tracking.records import EvalRecord, EventRecord
from trainer.tracking.wandb_logger import WandbLogger
from trainer.training import generation
from trainer.training.generation import GenerationEvaluator, check_prompts_available, make_prompts, text_scores
from trainer.training.run_plan import validate_early


@pytest.fixture(scope="module")
def argv(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    text = "--block-size 24 --eval-batch 4 --global-batch 6 --objective completion --lr 0.003"
    return tiny_argv(tiny_model, data_files, text)


def prepare_settings(text: str, *flags: str) -> tuple[Settings, PreparedDataset]:
    """The settings of these flags, and their data."""
    settings = cli.parse_args(["--mode", "full", "--global-batch", "2", *text.split(), *flags]).settings
    return settings, prepare(settings.data, model=settings.model.model, global_batch=2)


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- the scores ------------------------------------------------------------------------------------------------------


PERFECT_SCORES = {"exact_match": 1.0, "bleu": 100.0, "chrf": 100.0, "rouge_l": 1.0}


def test_text_metrics_are_those_of_their_definitions():
    texts = ["the cat sat on the mat", "five dogs ran home together"]
    assert text_scores(texts, [[f" {text} "] for text in texts]) == pytest.approx(PERFECT_SCORES)
    assert text_scores(["zzz qqq"], [["a b c d e f"]]) == pytest.approx(dict.fromkeys(PERFECT_SCORES, 0.0))
    # ROUGE-L, the F-measure of the longest common subsequence: 3 of 4 words on either side (Lin 2004, section 3.2)
    scores = text_scores(["police kill the gunman", "x"], [["police killed the gunman"], ["x"]])
    assert (scores["rouge_l"], scores["exact_match"]) == (pytest.approx((0.75 + 1) / 2), 0.5)


def test_several_references_of_a_prompt_count_as_the_measures_define_them():
    """The best of them for a match and ROUGE-L, all of them for BLEU and chrF; texts may have different numbers."""
    texts = ["the cat sat on the mat today", "a dog ran in the park now"]
    references = [["a cat is here", texts[0]], [texts[1]]]
    assert text_scores(texts, references) == pytest.approx(PERFECT_SCORES)
    texts = ["the cat sat on a mat today", "a dog ran in the park"]
    references = [["the cat sat on the mat today", "today a cat sat on a mat"], ["the dog ran in a park"]]
    scores = text_scores(texts, references)
    streams = [[first, more[0] if more else first] for first, *more in references]  # twice the same is once
    for name, score in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        assert scores[name] == pytest.approx(score(texts, list(zip(*streams, strict=True))).score)
        assert scores[name] > text_scores(texts, [reference[:1] for reference in references])[name]


def test_validation_records_of_one_prompt_are_its_references(tiny_model, tmp_path):
    pairs = itertools.product(range(1, 61), (20, 30, 40))
    rows = [{"prompt": f"w{n} w{n + 1}", "completion": f" w{m} w{m + 1}"} for n, m in pairs]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    flags = f"--preset demo --model {tiny_model} --data {path} --val-data {path}"
    _, data = prepare_settings(f"{flags} --block-size 16 --allow-leakage")
    prompts = make_prompts(data, load_tokenizer(tiny_model), 32)
    assert len(prompts) == MAX_NUM_SAMPLES, "as many as --num-samples allows are stored"
    assert {prompt.references for prompt in prompts} == {(" w20 w21", " w30 w31", " w40 w41")}
    with pytest.raises(UserError, match=f"--num-samples 33: expected a whole number from 0 to {MAX_NUM_SAMPLES}"):
        cli.parse_args(["--mode", "full", "--num-samples", "33"])


def test_text_metrics_without_their_packages_are_refused_before_data_are_read(monkeypatch):
    monkeypatch.setattr(generation, "find_spec", lambda name: None if name == "rouge_score" else object())
    settings = cli.parse_args(["--mode", "full", "--score-samples", "--data", "nowhere.csv"]).settings
    with pytest.raises(UserError, match=r"--score-samples: needs rouge_score, which is not installed; pip install"):
        validate_early(settings, simulated_context(1, "cpu"))


def test_text_metrics_for_data_without_prompts_are_refused(tiny_model, tmp_path):
    path = write_rows(tmp_path / "plain.jsonl", ({"text": f"w{n} w{n + 1} " * 9} for n in range(1, 60)))
    flags = f"--score-samples --model {tiny_model} --data {path} --block-size 16 --val-fraction 0.3"
    settings, data = prepare_settings(flags)
    with pytest.raises(UserError, match=r"--score-samples: .*plain.jsonl has no prompts to complete"):
        check_prompts_available(settings, data)
    prompts = make_prompts(data, load_tokenizer(tiny_model), 32)
    assert prompts, "but a text's own opening is a prompt for a sample"
    for prompt, (_, text) in zip(prompts, data.val_texts, strict=False):
        assert f"{prompt.text} {prompt.references[0]}".split() == text.split()
    assert make_prompts(data, load_tokenizer(tiny_model), 12) == [], "9 tokens of prompt leave no room among 12"


# --- completions -----------------------------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7], [40], [3, 9, 27, 81, 50, 53, 60, 8]]
MAX_NEW_TOKENS = 7


def generate_jobs(jobs: list[dict[str, Any]]) -> int:
    """Complete each job's prompts by the engine and token by token; out/name.json has both and the gatherings."""
    from deepspeed.runtime.zero import stage3
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    with joined_ranks() as dist_context:
        for job in jobs:
            run = start_engine(job, dist_context)
            is_zero3 = run.plan.deepspeed_file.stage == 3
            for parameter in run.engine.trainable_params.values():  # the same on all ranks; adapters say something, too
                with stage3.GatheredParameters([parameter], modifier_rank=0) if is_zero3 else torch.no_grad():
                    torch.manual_seed(parameter.ds_numel if is_zero3 else parameter.numel())
                    parameter.data += 0.1 * torch.randn(parameter.shape)
            calls = [(stage3.GatheredParameters, "__enter__"), (PartitionedParameterCoordinator, "fetch_sub_module")]
            with contextlib.ExitStack() as stack:
                counted = [
                    stack.enter_context(mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name)))
                    for owner, name in calls
                ]
                completions = run.engine.generate(PROMPTS, MAX_NEW_TOKENS, [0])
            counts = [mocked.call_count for mocked in counted]
            assert completions == run.engine.generate(PROMPTS, MAX_NEW_TOKENS, [0])
            weights = dict(run.engine.state.gather_weights())
            if dist_context.rank:
                assert completions is None
                continue
            plain_model = build_model(run.settings).module.eval()
            plain_model.load_state_dict(weights, strict=False)
            plain = [generate_token_by_token(plain_model, prompt) for prompt in PROMPTS]
            result = {"made": completions, "plain": plain, "counts": counts}
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
    """Batched, cached and padded, with every weight and with adapters; ZeRO-3 gathers once for all tokens."""
    jobs = [make_job(tmp_path, mode, [*argv, "--ds-config", zero, "--mode", mode]) for mode in ("full", "lora")]
    launch_jobs(ranks, jobs, target=generate_jobs)
    full, lora = (json.loads((tmp_path / f"{mode}.json").read_text()) for mode in ("full", "lora"))
    for result in (full, lora):
        assert result["made"] == result["plain"]
        assert any(len(set(tokens)) > 1 for tokens in result["made"]), "something to compare"
    assert full["counts"] == ([1, 0] if zero == "zero3" else [0, 0])


@pytest.fixture(scope="module")
def sampled_and_plain_runs(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run under ZeRO-3 with samples and scores, and without any."""
    out = tmp_path_factory.mktemp("sampled")
    flags = "--mode full --max-steps 5 --eval-every 2 --dropout 0.1 --ds-config zero3"
    for name, sample_flags in (("with", "--num-samples 3 --score-samples"), ("without", "--num-samples 0")):
        train([*argv, *f"{flags} {sample_flags}".split()], out=out / name)
    return out / "with", out / "without"


def test_generating_samples_changes_no_other_number(sampled_and_plain_runs):
    sampled, bare = sampled_and_plain_runs
    assert read_reproducible_records(sampled) == read_reproducible_records(bare)
    for name in ("model.safetensors", "config.json"):
        assert (sampled / "model" / name).read_bytes() == (bare / "model" / name).read_bytes()
    assert read_events(bare, "samples") == []
    assert read_events(bare, "finished")[0]["facts"]["sample_seconds"] == 0


def test_every_evaluation_leaves_samples_scores_and_the_time_they_took(sampled_and_plain_runs, data_files):
    sampled, _ = sampled_and_plain_runs
    events = read_events(sampled, "samples")
    assert [event["step"] for event in events] == [0, 2, 4, 5]
    val_records = [json.loads(line) for line in Path(data_files[1]).read_text().splitlines()]
    for event in events:
        facts = event["facts"]
        texts = [{"prompt": text["prompt"], "completion": text["reference"]} for text in facts["texts"]]
        assert texts == val_records[:3]
        assert facts["scored"] == len(val_records)
        assert set(facts["scores"]) == set(PERFECT_SCORES)
        assert "exact_match" in event["message"]
    seconds = sum(event["facts"]["seconds"] for event in events)
    assert read_events(sampled, "finished")[0]["facts"]["sample_seconds"] == pytest.approx(seconds)


@pytest.mark.usefixtures("no_pictures")
def test_the_report_shows_the_last_samples_beside_those_of_the_base(sampled_and_plain_runs, tmp_path):
    runs, _ = load_runs([str(run) for run in sampled_and_plain_runs])
    comparison = compare(runs)
    write_report(comparison, tmp_path)
    scores = comparison.optional_tables[-1]
    events = read_events(sampled_and_plain_runs[0], "samples")
    first, last = events[0]["facts"]["texts"], events[-1]["facts"]["texts"]
    shown = [(sample.prompt, *sample.texts.values()) for sample in comparison.samples]
    assert shown == [
        tuple(cell.strip() for cell in (text["prompt"], text["reference"], begun["completion"], text["completion"]))
        for begun, text in zip(first, last, strict=True)
    ]
    chrf = scores.headings.index("chrF (0-100)")
    assert scores.rows[0][chrf] == f"{events[-1]['facts']['scores']['chrf']:.4f}"
    for page in ("report.html", "report.md"):
        assert "Completions against their references" in (tmp_path / page).read_text()


def test_completions_that_repeat_their_references_get_full_marks_and_no_room_for_the_model_gives_a_reason(argv):
    settings, data = prepare_settings("--score-samples", *argv)
    encode = load_tokenizer(settings.model.model)
    completions = [encode(completion)["input_ids"] for _, completion in data.val_texts]
    record = EvalRecord(step=1, epoch=1.0, samples=1, tokens=1, loss=1.0, perplexity=1.0, eval_tokens=1, time=1.0)
    for fits in (True, False):
        engine: Any = SimpleNamespace(
            generate=lambda *_: completions,
            model=SimpleNamespace(causal=SimpleNamespace(config=load_config(settings.model))),
            state=SimpleNamespace(fits_unsharded=lambda fits=fits: fits),
        )
        evaluator = GenerationEvaluator(engine, data, settings)
        event = evaluator.evaluate(record)
        assert (event is not None) == fits
        assert ("does not fit" in evaluator.disabled_reason) != fits
        if event is not None:
            assert event.facts["scores"] == pytest.approx(PERFECT_SCORES)


def test_a_resumed_run_takes_the_base_models_texts_of_the_same_prompts_only():
    texts = [{"prompt": name, "completion": f"after {name}"} for name in ("a", "b")]
    event = EventRecord(event="samples", step=0, message="", time=1.0, facts={"seconds": 0.5, "texts": texts})
    for names, expected in (("abc", ["after a", "after b"]), ("a", ["after a", "after b"]), ("xb", [])):
        prompts = [SimpleNamespace(text=name) for name in names]
        samples: Any = SimpleNamespace(prompts=prompts, elapsed_seconds=0.0, base_completions=[])
        assert list(GenerationEvaluator.replay(samples, [event])) == [event]
        assert (samples.base_completions, samples.elapsed_seconds) == (expected, 0.5)


def test_the_wandb_logger_logs_a_sample_table_and_the_scores():
    logged: list[tuple[dict[str, Any], int]] = []
    run: Any = SimpleNamespace(log=lambda row, step: logged.append((row, step)), summary={}, finish=lambda **_: None)
    sink = WandbLogger(run, last_logged_step=1)
    text = {"prompt": "p", "reference": "r", "base": "b", "completion": "c"}
    facts = {"epoch": 0.5, "samples": 4, "tokens": 9, "seconds": 0.1, "texts": [text], "scores": {"chrf": 12.5}}
    for step in (1, 2):
        sink.log(EventRecord(event="samples", step=step, message="", time=1.0, facts=facts))
    assert [step for _, step in logged] == [2, 2], "step 1 was logged by the process before"
    row = {**logged[0][0], **logged[1][0]}
    assert (row["sample/chrf"], row["train/epoch"], row["examples"]) == (12.5, 0.5, 4)
    table = row["sample/texts"]
    assert table.columns == ["step", "epoch", "prompt", "reference", "base", "completion"]
    assert table.data == [[2, 0.5, "p", "r", "b", "c"]]
