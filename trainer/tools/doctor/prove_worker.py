"""One rank of a proof: `python -m trainer.tools.doctor.prove_worker JOB` runs the job's rows, one JSON line each."""

import gc
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, load
from trainer.data.sampler import IGNORE_INDEX, GlobalBatch
from trainer.distributed.process_group import DistContext, destroy_process_group, init_distributed, peak_memory_bytes
from trainer.model.build import build_model, load_config
from trainer.tools.doctor.prove import NUM_STEPS, PLAIN
from trainer.tools.trial_engine import reset_peak_memory, start_trial
from trainer.tracking.silence import silence_libraries
from trainer.training.run_plan import make_plan


def main(job_file: str) -> None:
    """Do the rows in order; rank 0 writes."""
    silence_libraries()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    dist_context = init_distributed(job["device"])
    try:
        data = load(Path(job["data"]))
        for ds_config, execution in job["rows"]:
            reset_peak_memory(dist_context.device)
            if ds_config == PLAIN:
                numbers = run_plain(job, data, dist_context)
            else:
                numbers = run_row(job, data, dist_context, ds_config, execution)
            numbers["peak_memory_bytes"] = max(dist_context.all_gather_object(peak_memory_bytes(dist_context.device)))
            if dist_context.rank == 0:
                with open(job["answer"], "a", encoding="utf-8") as answer:
                    answer.write(json.dumps(numbers) + "\n")
            gc.collect()
    finally:
        dist_context.watchdog.close()
        destroy_process_group()


def run_row(
    job: dict[str, Any], data: PreparedDataset, dist_context: DistContext, ds_config: str, execution: Any
) -> dict[str, Any]:
    """Take the steps as a run does, and hold losses, norms and weights against the plain loop's."""
    settings = Settings.from_dict(job["settings"])
    engine_settings = replace(settings.engine, ds_config=ds_config, execution=execution, precision=job["precision"])
    plan, engine = start_trial(replace(settings, engine=engine_settings), data, dist_context)
    batches = plan.schedule.batches(data.train, dist_context.rank)(0, job["num_steps"])
    losses, norms, seconds, waits = [], [], [], []
    for batch, result in engine.run(batches, lambda _: settings.train.lr):
        losses.append(result.loss_sum / batch.num_target_tokens)
        norms.append(result.grad_norm)
        seconds.append(result.elapsed_seconds)
        waits.append(engine.device_wait_seconds)
    reference = torch.load(job["reference"])
    weight_difference = 0.0
    for name, weight in engine.state.gather_weights():
        counted = reference["counted"][name]
        differences = (weight - reference["weights"][name])[counted].abs()
        weight_difference = max(weight_difference, float(differences.max()) if len(differences) else 0.0)
    timed = seconds[-(NUM_STEPS - 1) :]
    return {
        "path": engine.plan.path,
        "problem": "; ".join(change.reason for change in engine.plan_changes),
        "loss_difference": _relative_difference(losses, reference["losses"]),
        "norm_difference": _relative_difference(norms, reference["norms"]),
        "weight_difference": weight_difference / (settings.train.lr * len(losses)),
        "step_ms": 1000 * statistics.median(timed),
        "device_wait_share": (waits[-1] - waits[-len(timed) - 1]) / sum(timed),
    }


def _relative_difference(values: list[float], expected: list[float]) -> float:
    pairs = zip(values, expected, strict=True)
    differences = [abs(value - other) / (abs(other) or 1.0) for value, other in pairs]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def run_plain(job: dict[str, Any], data: PreparedDataset, dist_context: DistContext) -> dict[str, Any]:
    """The same steps as one writes them by hand: the model's own logits, autograd, torch's clip and AdamW.

    Leaves losses, norms, weights, and which weights had a gradient to speak of in every step, in the job's reference.
    """
    settings, device = Settings.from_dict(job["settings"]), dist_context.device
    model = build_model(settings, device=device, with_fingerprint=False)
    plan = make_plan(settings, dist_context, data, model.metadata, load_config(settings.model))
    train = settings.train
    module = model.module.to(device).train()
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": train.lr * model.get_lr_multiplier(name)} for name, p in params.items()],
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        weight_decay=train.weight_decay,
    )
    counted = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    losses, norms, seconds = [], [], []
    for batch in plan.schedule.batches(data.train, 0)(0, job["num_steps"]):
        start_time = time.perf_counter()
        losses.append(_plain_backward(module, batch, device, uses_bf16=job["precision"] == "bf16"))
        for name, p in params.items():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            root_mean_square = gradient.square().mean().sqrt()
            counted[name] &= gradient.abs() >= (job["min_gradient"] * root_mean_square).clamp(min=1e-30)
        grads = [p.grad for p in params.values() if p.grad is not None]  # in float32 a sum of many squares is 1e-5 off
        tensor_norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
        norms.append(float(torch.stack(tensor_norms).norm()))
        torch.nn.utils.clip_grad_norm_(params.values(), train.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start_time)
    torch.save(
        {
            "losses": losses,
            "norms": norms,
            "weights": {name: p.detach().float().cpu() for name, p in params.items()},
            "counted": {name: mask.cpu() for name, mask in counted.items()},
        },
        job["reference"],
    )
    return {"step_ms": 1000 * statistics.median(seconds[-(NUM_STEPS - 1) :])}


def _plain_backward(module: Any, batch: GlobalBatch, device: torch.device, *, uses_bf16: bool) -> float:
    """Forward and backward of a whole global batch; returns its mean loss."""
    total = 0.0
    for micro_batch in batch.micro_batches:
        arrays = {"input_ids": micro_batch.input_ids, "labels": micro_batch.labels}
        if micro_batch.position_ids is not None:
            arrays["position_ids"] = micro_batch.position_ids
        inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        labels = inputs.pop("labels")
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16):
            logits = module(**inputs, use_cache=False).logits
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        (nll / batch.num_target_tokens).backward()
        total += nll.item()
    return total / batch.num_target_tokens


if __name__ == "__main__":
    main(sys.argv[1])
