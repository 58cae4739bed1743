"""What to do after a verdict: which seeds or records would decide, and what these runs say LoRA was short of."""

from collections.abc import Sequence
from statistics import fmean

from trainer.report.comparable import SeedGroup
from trainer.report.interval import MAX_PLANNED_SEEDS, SampleSize, plan_sample_size
from trainer.report.judge import FullVsLora, StudyContext, are_near_zero
from trainer.report.run_data import LOSS

MIN_SHRINK = 0.8  # longer training is advised where the gap fell under this share of the shorter runs' gap
RANK_FACTOR = 4
REPEAT_LOWER = "Repeat all seeds at that lower rate."


def next_step(
    comparisons: Sequence[FullVsLora],
    full_groups: Sequence[SeedGroup],
    lora_groups: Sequence[SeedGroup],
    study: StudyContext | None,
) -> str:
    """One sentence on what to do after the answer of the first comparison."""
    pair = comparisons[0]
    if pair.judged and are_near_zero(pair.judged):
        return "Train longer, or choose a scorer that these answers can pass: by this one neither mode learnt the task."
    has_worsened = pair.base_loss is not None and min(pair.full_loss, pair.lora_loss) >= pair.base_loss
    if has_worsened and pair.margin.measure == LOSS and pair.answer != "not ranked":
        neither = "neither improved on its base"
        if pair.is_judged:
            return f"Use the base: {neither} on these records."
        return f"Train at lower rates, and look at the data: {neither}."
    if pair.is_judged and pair.answer in ("better", "good enough", "worse"):
        chosen = pair.full.name if pair.answer == "worse" else pair.lora.name
        return f"Use {chosen}" + " if it is the cheaper one" * (pair.answer == "good enough") + "."
    if pair.answer == "better":
        return "Use LoRA here; launch/export.py publishes it."
    if pair.answer == "good enough":
        return "Use LoRA if its memory or its small files help you; launch/export.py publishes it."
    if pair.answer == "not ranked":
        if any(group.divergence for group in (pair.full, pair.lora)):
            return REPEAT_LOWER
        if not pair.are_records_new:
            return "Repeat both with evaluation records that training does not see."
        return "Repeat one of them, so that only the method differs."
    if pair.answer == "worse":
        return _advise_worse(pair, {group.lr for group in lora_groups}, study)
    if pair.is_judged:
        return "Give more records, or more seeds of each (NAME=MODEL,MODEL), and judge again."
    if pair.doubt:
        return "Read the records that decide (the report names them), and give more: --test-data or --test-fraction."
    if pair.excess is None:
        return "Compare folders of runs on equal data, with their eval_records/: single records decide."
    needed = needed_sample(pair)
    if needed.num_seeds is not None:
        return "Start a study with more --seeds." if study else "Repeat both with more seeds, and compare all at once."
    if needed.num_units is None and needed.floor < abs((pair.contrast or pair.excess).estimate):
        return "Choose by memory and time: the difference is too near the margin for seeds or records to tell."
    return "Give more test records (--test-data or --test-fraction), or accept a larger --margin before the runs."


def advise_unpaired(groups: Sequence[SeedGroup]) -> str:
    """The same where these groups have no full run and LoRA run to compare."""
    if any(group.divergence for group in groups):
        return REPEAT_LOWER
    modes = {group.mode for group in groups if group.finished_runs}
    if len(modes) == 2:
        return "Repeat one of them on the other's data, with its split and tokenizer."
    if modes == {group.mode for group in groups}:
        other = "lora" if modes == {"full"} else "full"
        return f"Train with --mode {other} too, with the other flags as they were, and compare both."
    return "Let the runs end (--resume continues one that was stopped), and compare them again."


def _advise_worse(pair: FullVsLora, lora_rates: set[float], study: StudyContext | None) -> str:
    """Other rates, longer training, a higher rank or another method: the first that the runs speak for."""
    if study is None and len(lora_rates) == 1:
        return "Search LoRA's rate before judging it, as one was tried: launch/study.py."
    longest = max((curve.num_steps for curve in study.rate_curves), default=0) if study else 0
    gaps = {}
    for steps in sorted({curve.num_steps for curve in study.rate_curves} if study else ()):
        best = {c.mode: min(c.losses.values()) for c in study.rate_curves if c.num_steps == steps and c.losses}  # type: ignore[union-attr]
        if len(best) == 2:
            gaps[steps] = best["lora"] - best["full"]
    shorter = max((steps for steps in gaps if steps < longest), default=None)
    if shorter and longest in gaps and gaps[longest] < MIN_SHRINK * gaps[shorter]:
        fell = f"from {gaps[shorter]:.2f} to {gaps[longest]:.2f} between {shorter:,} and {longest:,} steps"
        return f"Train longer: LoRA's gap on validation fell {fell}."
    lora_train, full_train = (_final_train_loss(group) for group in (pair.lora, pair.full))
    lora_run = pair.lora.runs[0]
    rank = None if lora_run.get("settings.lora.peft_config") else lora_run.get("settings.lora.rank")
    if len({run.get("settings.train.label_smoothing") for run in (*pair.lora.runs, *pair.full.runs)}) > 1:
        rank = None  # the training losses are of two kinds
    if (
        lora_train is not None
        and full_train is not None
        and rank
        and lora_train - full_train > (pair.lora_loss - pair.full_loss) / 2
    ):
        ranks = f"--lora-ranks {rank},{RANK_FACTOR * rank}" if study else f"--lora-rank {RANK_FACTOR * rank}"
        behind = f"LoRA's training loss is behind too, {lora_train:.2f} against {full_train:.2f}"
        return f"Try a higher rank ({ranks}): {behind}."
    return "Train every weight, or try another adapter: LoRA fits the training data, so rank is not what it lacks."


def _final_train_loss(group: SeedGroup) -> float | None:
    ends = [float(run.epochs["train_loss"][-1]) for run in group.finished_runs if len(run.epochs["train_loss"])]
    return fmean(ends) if ends and len(ends) == len(group.finished_runs) else None


def needed_sample(pair: FullVsLora) -> SampleSize:
    """The seeds or records that would decide: on which side of the margin, or of 0 where that is nearer."""
    assert pair.excess is not None
    options = [] if pair.contrast and pair.excess.estimate >= 0 else [plan_sample_size(pair.excess)]
    if pair.contrast is not None:
        options.append(plan_sample_size(pair.contrast, is_one_sided=pair.contrast.estimate < 0))
    seeds = min((option.num_seeds for option in options if option.num_seeds), default=None)
    units = min((option.num_units for option in options if option.num_units), default=None)
    return SampleSize(seeds, units, options[-1].floor)


def describe_needed_sample(pair: FullVsLora) -> str:
    """`at least 5 seeds are needed`, or that more records are."""
    assert pair.excess is not None
    needed, unit_name = needed_sample(pair), pair.judged.unit_name if pair.judged else "validation records"
    if needed.num_seeds is not None:
        return f"at least {needed.num_seeds} seeds are needed"
    if needed.floor < abs((pair.contrast or pair.excess).estimate):
        records = f", or at least {needed.num_units:,} {unit_name}," if needed.num_units else ""
        return f"more than {MAX_PLANNED_SEEDS} seeds{records} are needed"
    amount = f"{needed.floor:.2g}" if pair.margin.measure == LOSS else f"{needed.floor:.1f} points"
    floor = f"with these {unit_name} no number of seeds resolves less than ±{amount}"
    number = f"at least {needed.num_units:,}" if needed.num_units and pair.excess.num_seeds > 1 else "more"
    return f"{floor}: {number} {unit_name} are needed"
