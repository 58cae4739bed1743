"""One pass over an evaluation split: the loss of every row, the same however the rows are spread over ranks.

Beside validation there may be test records, which say what training gains on records that nothing was chosen by, and
retained text, of the base model's own kind: its loss after training less its loss before is what was forgotten.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from trainer.config.errors import UserError
from trainer.config.files import read_json_object
from trainer.data.dataset import PreparedDataset, TokenDataset
from trainer.data.sampler import eval_batches, eval_order
from trainer.distributed.engine import Engine
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, read_evaluations, write_evaluation
from trainer.tracking.records import EventRecord, bits_per_byte
from trainer.training.generation import ScoredSplit, score_records
from trainer.training.run_plan import RunPlan
from trainer.training.schedule import TrainState

OTHER_SPLITS: dict[ScoredSplit, str] = {"test": "test loss", "retain": "loss of retained text"}
BATCHES_BETWEEN_STOPS = 8  # batches between two questions whether a rank should stop, for which all wait


class StopRequested(Exception):
    """An evaluation was given up because the run is to stop."""


class Evaluation(NamedTuple):
    """The losses of one pass over all rows of a split."""

    row_nll: Sequence[float]  #: summed negative log-likelihood of each row in nats, in the split's order
    loss: float  #: nats per target token: the exact sum of all rows (`math.fsum`), divided once
    num_target_tokens: int
    bits_per_byte: float | None = None  #: None where the text of the targets is not known


def evaluate(
    engine: Engine,
    dataset: TokenDataset,
    eval_batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    num_bytes: int = 0,
    row_nll: Sequence[float] | None = None,
) -> Evaluation:
    """Evaluate all rows of `dataset`; every rank calls it and gets the whole result. `num_bytes`: of the targets' text
    in UTF-8, 0 where it is not known; `row_nll`: where another run has evaluated the same weights, and no row is again.
    Raises StopRequested, on all ranks alike, where any of them is to stop."""
    if row_nll is None:
        context, order = engine.dist_context, eval_order(dataset)
        batch_losses, row_indices = [], []  # losses stay on the device: nobody waits for one batch before the next
        for number, micro_batch in enumerate(eval_batches(dataset, eval_batch_size, context.rank, context.world_size)):
            if number % BATCHES_BETWEEN_STOPS == 0 and any(context.all_gather_object(should_stop())):
                raise StopRequested
            indices = order[micro_batch.index : micro_batch.index + eval_batch_size]
            batch_losses.append(engine.evaluate(micro_batch)[: len(indices)])  # a rank without rows: a masked one
            row_indices += indices.tolist()
        local_losses = [loss for losses in batch_losses for loss in losses.tolist()]
        row_nll = [math.nan] * len(dataset)
        for rank_indices, rank_losses in context.all_gather_object((row_indices, local_losses)):
            for index, loss in zip(rank_indices, rank_losses, strict=True):
                row_nll[index] = loss
    nll_sum, num_target_tokens = math.fsum(row_nll), int(dataset.num_target_tokens.sum())
    return Evaluation(row_nll, nll_sum / num_target_tokens, num_target_tokens, bits_per_byte(nll_sum, num_bytes))


def read_base_evaluations(metadata: Mapping[str, Any], data: PreparedDataset) -> dict[str, list[float]]:
    """{split: `Evaluation.row_nll` before the first step} of what runs in the folder --base-from have evaluated. Of
    runs that had the same base, data and way of computing, by their run.json. `metadata`: this run's."""
    settings, evaluations = metadata["settings"], dict[str, list[float]]()
    folder, keys, lora = settings["output"]["base_from"], ["id", "occurrence", "targets"], settings["lora"]
    # pissa changes the base in its last digits, other methods may start elsewhere
    changes_base = metadata["mode"] == "lora" and (lora["adapter"] == "pissa" or lora["peft_config"])
    if folder is None or settings["model"]["init"] != "pretrained" or changes_base:
        return {}

    def base_facts(run: Mapping[str, Any]) -> list[Any]:
        facts = [run["model"]["fingerprint"], run["data"]["fingerprint"], run["data"]["val_fingerprint"]]
        facts += [run["settings"]["model"]["quant"], run["resolved"]["precision"], run["versions"]["torch"]]
        return [*facts, run["hardware"]["gpu"] or run["hardware"]["cpu"]]

    for split in ("val", *OTHER_SPLITS):
        for path in sorted(Path(folder).glob(f"*/{EVAL_RECORDS_FOLDER}/step-000000-{split}.parquet")):
            with contextlib.suppress(UserError, LookupError, TypeError):  # of a run that is going, or was damaged
                other = read_json_object(path.parents[1] / "run.json")
                rows = read_evaluations(path.parent, val_steps={0}).query("step == 0 and split == @split")
                is_same_base = base_facts(other) == base_facts(metadata)
                if is_same_base and np.array_equal(rows[keys].to_numpy(), data.row_info(split)[keys].to_numpy()):
                    evaluations[split] = rows["nll"].tolist()
                    break
    return evaluations


def evaluate_other_splits(
    plan: RunPlan,
    data: PreparedDataset,
    engine: Engine,
    train_state: TrainState,
    *,
    step: int,
    base_nll: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> Iterator[EventRecord]:
    """The events of the test and retained losses, whose rows rank 0 writes, and of their scores (--score) by trained
    weights. All ranks must call. `step`: of the weights that the engine holds, which may be those of an earlier
    checkpoint than `train_state`; `base_nll`: losses of the splits that another run has evaluated."""
    for split, name in OTHER_SPLITS.items():
        dataset = getattr(data, split)
        if not len(dataset):
            continue
        options: Any = {"num_bytes": data.metadata[split].get("target_bytes", 0), "row_nll": base_nll.get(split)}
        row_nll, loss, num_target_tokens, bits = evaluate(engine, dataset, plan.settings.train.eval_batch, **options)
        folder = Path(plan.settings.run_folder) / EVAL_RECORDS_FOLDER
        write_rows = partial(write_evaluation, folder, step=step, split=split, nll=row_nll)
        plan.dist_context.on_rank_zero(lambda: write_rows(data.row_info(split)))  # noqa: B023  # called at once
        in_bytes = f", {bits:.4f} bits per byte" if bits is not None else ""
        message = f"{name} {loss:.4f} nats per token{in_bytes} over {len(dataset)} rows, weights of step {step}"
        facts = {"step": step, "loss": loss, "bits_per_byte": bits}
        facts |= {"num_target_tokens": num_target_tokens, "num_rows": len(dataset)}
        now = train_state.elapsed_seconds
        yield EventRecord(event=f"{split}_evaluation", step=step, message=message, time=now, facts=facts)
        has_references = split == "test" or dataset.target_mask is not None
        if plan.settings.output.score and step and has_references:
            yield score_records(plan.settings, data, engine, split, step=step, row_nll=row_nll, now=now)
