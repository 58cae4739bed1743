"""What test_methods.py does on real ranks: a run, the same run stopped and resumed, its export loaded again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.engines import joined_ranks, start_engine
from helpers.matrix import assert_resumed_bitwise, read_job_result, run_job
from trainer.config import cli
from trainer.export.folder import base_model_ref, save_adapter, save_plain_model
from trainer.export.verify import LOGITS_BOUND, compute_logits, fixed_input_ids, verify_folder
from trainer.model.build import merge_adapters
from trainer.training.checkpoint import resolve_checkpoint
from trainer.training.evaluation import evaluate

STOP_STEP = 2  # the step after which the run is stopped


def run_resume_and_export(jobs: list[dict[str, Any]]) -> int:
    """Of each job `{name, flags, data, out}`: run it whole and again from STOP, then export and verify its end."""
    with joined_ranks() as dist_context:
        for job in jobs:
            run_job(dist_context, job)
            run_job(dist_context, {**job, "name": f"{job['name']}-again", "resume": [job["name"], STOP_STEP]})
            result = _export_and_verify(job, dist_context)
            if dist_context.rank == 0:
                (Path(job["out"]) / f"{job['name']}.json").write_text(json.dumps(result))
    return 0


def _export_and_verify(job: dict[str, Any], dist_context: Any) -> dict[str, Any]:
    """The facts about the folder of the last checkpoint, with what the trained model itself answered."""
    settings, out = cli.parse_args(job["flags"]).settings, Path(job["out"])
    checkpoint = resolve_checkpoint(out / f"{job['name']}-checkpoints", "latest")
    run = start_engine(job, dist_context, checkpoint)
    data, model, engine = run.data, run.model, run.engine
    loss = evaluate(engine, data.val, settings.train.eval_batch).loss
    input_ids = fixed_input_ids(data)
    logits = compute_logits(model.module, input_ids, dist_context.device)
    weights = {name: tensor.detach().clone() for name, tensor in engine.state.gather_weights()}
    optimizer_bytes = engine.state.optimizer_bytes()
    if dist_context.rank:
        return {}
    folder = out / f"{job['name']}-folder"
    folder.mkdir()
    base_path = None
    if model.is_adapter:
        base = base_model_ref(settings.model.model, out)
        base_path = base.path
        save_adapter(folder, model, weights, base)
    else:
        save_plain_model(folder, model.module, weights)
    verification = verify_folder(
        folder,
        input_ids=input_ids,
        logits=logits,
        is_tied=model.has_tied_embeddings,
        device=dist_context.device,
        base_path=base_path,
        val=data.val,
        eval_batch=settings.train.eval_batch,
        recorded_loss=run.state.val_loss,
    )
    result = {"problems": verification.problems, "loss": verification.loss, "tied": verification.is_tied}
    if job.get("merge"):
        merged = compute_logits(merge_adapters(model), input_ids, dist_context.device)
        result["merge_difference"] = float(np.abs(merged - logits).max())
    return {
        **result,
        "trained_loss": loss,
        "recorded": run.state.val_loss,
        "largest": verification.max_abs_logit,
        "logits_difference": verification.max_logits_difference,
        "optimizer_bytes": optimizer_bytes,
        "facts": model.metadata,
    }


def assert_promises(out: Path, name: str, *, loss_tolerance: float = 1e-6) -> dict[str, Any]:
    """Assert that a run learns, resumes bitwise and exports what was trained; returns the facts of its export."""
    result = json.loads((out / f"{name}.json").read_text())
    losses = [record["loss"] for record in read_job_result(out, name)[0] if record["kind"] == "eval"]
    assert losses[-1] < losses[0], (name, losses)
    assert_resumed_bitwise(out, name, f"{name}-again", STOP_STEP)
    assert result["trained_loss"] == result["recorded"], name
    assert result["logits_difference"] <= logits_bound(result), (name, result["logits_difference"])
    assert result["loss"] == pytest.approx(result["recorded"], rel=loss_tolerance), name
    assert [problem for problem in result["problems"] if not problem.startswith("validation loss")] == [], name
    print(
        f"{name}: {losses[0]:.4f} -> {losses[-1]:.4f}, logits differ by {result['logits_difference']:.1e}, "
        f"{result['optimizer_bytes']} bytes of state"
    )
    return result


def logits_bound(result: dict[str, Any]) -> float:
    return LOGITS_BOUND * max(1.0, result["largest"])
