"""`launch/doctor.py --prove`: the user's model and rows under every ZeRO stage, number of ranks and way to run steps,
each held against a plain PyTorch loop on this machine.

Dropout is off: its masks depend on the micro-batch.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.config.choices import EIGHT_BIT_OPTIMIZERS
from trainer.config.errors import UserError
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, load
from trainer.data.sampler import IGNORE_INDEX, GlobalBatch
from trainer.distributed.deepspeed_config import read_deepspeed_file
from trainer.distributed.execution import MAX_DIFFERENCE, NUM_WARMUP_CALLS, find_eager_reason
from trainer.distributed.process_group import DistContext
from trainer.model.build import build_model
from trainer.model.loss import uses_gpu_form
from trainer.tools.doctor.checks import ERROR, OK, WARNING, Check, judge
from trainer.tools.trial_engine import run_job, start_trial
from trainer.training.run_plan import RunPlan, make_plan

STAGES = ("zero0", "zero1", "zero2", "zero3")
NUM_STEPS = 3  # that are compared, after those before which no CUDA graph is recorded
#: What a weight may be off, as a share of what its steps may move it (the learning rate each): AdamW divides a gradient
#: by its own size, so its relative rounding becomes one of the step. Weights whose gradient is nearly nothing in the
#: plain loop, where the rounding is all of it, are left out: below the second number times the tensor's mean size.
WEIGHT_BOUNDS = {"fp32": (0.05, 1e-3), "bf16": (0.25, 0.1)}
PLAIN = "plain PyTorch"


def prove(plan: RunPlan, data: PreparedDataset) -> Iterator[Check]:
    """One check a row, as it is done."""
    precision, context = plan.precision, plan.dist_context
    if precision not in WEIGHT_BOUNDS:
        problem = "its loss scale has no plain counterpart; use fp32 or bf16"
        raise UserError(f"--precision {precision} with --prove: {problem}")
    num_first_steps = 0 if context.device.type == "cpu" else NUM_WARMUP_CALLS + 1
    num_steps = min(num_first_steps + NUM_STEPS, plan.schedule.total_steps)
    settings = proof_settings(plan.settings).as_dict()
    with tempfile.TemporaryDirectory(prefix="prove-") as scratch:

        def run(row: dict[str, Any]) -> dict[str, Any]:
            job = {"settings": settings, "data": str(data.folder), "num_steps": num_steps, "precision": precision}
            job |= {"reference": f"{scratch}/reference.pt", **row}
            timeout = plan.settings.engine.hang_timeout
            answers, exit_codes, reason = run_job(measure_row, job, row["world_size"], timeout_seconds=timeout)
            problem = reason if exit_codes else f"took over {timeout:g} s (--hang-timeout)"
            return answers[0] if answers else {"problem": problem}

        reference = run({"ds_config": PLAIN, "world_size": 1, "execution": "eager"})
        if "problem" in reference:
            yield Check(ERROR, PLAIN, reference["problem"], "without it there is nothing to compare with")
            return
        yield Check(OK, PLAIN, f"{num_steps} steps")
        for row in [row for world_size in sorted({1, context.world_size}) for row in list_rows(plan, world_size)]:
            measured = run(row)
            verdict = judge_row(measured, precision)
            message = f"{row['execution']:<8} {verdict}: "
            if verdict != "failed":
                message += f"loss {measured['loss_difference']:.0e}, gradient norm {measured['norm_difference']:.0e}, "
                message += f"weights {measured['weight_difference']:.1%} of their steps"
            remedy = f"do not train with --ds-config {row['ds_config']} --execution {row['execution']} here; report it"
            if verdict == "fell back":
                message, remedy = f"{message}; ", "none needed: the numbers are right"
            message += measured["problem"]
            level = WARNING if verdict == "fell back" else ERROR
            yield judge(verdict != "equal", level, f"{row['ds_config']} x {row['world_size']}", message, remedy)


def proof_settings(settings: Settings) -> Settings:
    optim = "adamw_fused" if settings.train.optim in EIGHT_BIT_OPTIMIZERS else settings.train.optim
    return replace(
        settings,
        model=replace(settings.model, dropout=0.0),
        lora=replace(settings.lora, dropout=0.0),
        train=replace(settings.train, optim=optim),
    )


def list_rows(plan: RunPlan, world_size: int) -> list[dict[str, Any]]:
    """`ds_config`, `world_size` and `execution` of each row on so many ranks."""
    if plan.schedule.batch.global_batch % world_size:
        return []
    rows = []
    settings, is_gpu = proof_settings(plan.settings), uses_gpu_form(plan.dist_context.device)
    for name in dict.fromkeys([*STAGES, settings.engine.ds_config or plan.deepspeed_file.name]):
        has_graphs = not find_eager_reason(settings, is_gpu=is_gpu, stage=read_deepspeed_file(name).stage)
        for execution in ("eager", "graphs") if has_graphs else ("eager",):
            rows.append({"ds_config": name, "world_size": world_size, "execution": execution})
    return rows


def judge_row(measured: dict[str, Any], precision: str) -> str:
    if "loss_difference" not in measured:
        return "failed"
    bound, weight_bound = MAX_DIFFERENCE[precision], WEIGHT_BOUNDS[precision][0]
    losses_and_norms = max(measured["loss_difference"], measured["norm_difference"])
    if losses_and_norms > bound or measured["weight_difference"] > weight_bound:
        return "differs"
    return "fell back" if measured["problem"] else "equal"


# --- one rank ---


def measure_row(job: dict[str, Any], dist_context: DistContext) -> Iterator[dict[str, Any]]:
    """How a row's losses, gradient norms (relative) and weights (a share of what the steps may move them) differ from
    the plain loop's, and the `problem` where steps ran otherwise than asked for; {} of the plain loop itself."""
    settings, data = Settings(**job["settings"]), load(Path(job["data"]))
    if job["ds_config"] == PLAIN:
        _run_plain(job, settings, data, dist_context)
        yield {}
        return
    own = {name: job[name] for name in ("ds_config", "execution", "precision")}
    plan, engine = start_trial(replace(settings, engine=replace(settings.engine, **own)), data, dist_context)
    batches = plan.schedule.batches(data.train, dist_context.rank)(0, job["num_steps"])
    losses, norms = [], []
    for batch, result in engine.run(batches, lambda _: settings.train.lr):
        losses.append(result.loss_sum / batch.num_target_tokens)
        norms.append(result.grad_norm)
    reference = torch.load(job["reference"])
    weight_difference = 0.0
    for name, weight in engine.state.gather_weights():
        differences = (weight - reference["weights"][name])[reference["counted"][name]].abs().nan_to_num(nan=math.inf)
        weight_difference = max(weight_difference, float(differences.max()) if len(differences) else 0.0)
    yield {
        "problem": "; ".join(change["reason"] for change in engine.plan_changes),
        "loss_difference": _relative_difference(losses, reference["losses"]),
        "norm_difference": _relative_difference(norms, reference["norms"]),
        "weight_difference": weight_difference / (settings.train.lr * len(losses)),
    }


def _relative_difference(values: list[float], expected: list[float]) -> float:
    pairs = zip(values, expected, strict=True)
    differences = [abs(value - other) / (abs(other) or 1.0) for value, other in pairs]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def _run_plain(job: dict[str, Any], settings: Settings, data: PreparedDataset, dist_context: DistContext) -> None:
    """The same steps as one writes them by hand: the model's own logits, autograd, torch's clip and AdamW. The job's
    reference file gets losses, norms, weights, and which weights had a gradient to speak of in every step."""
    device, train, min_gradient = dist_context.device, settings.train, WEIGHT_BOUNDS[job["precision"]][1]
    model = build_model(settings, device=device, with_fingerprint=False)
    plan = make_plan(settings, dist_context, data)
    module = model.module.to(device).train()
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        params.values(),
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        weight_decay=train.weight_decay,
    )
    counted = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    losses, norms = [], []
    for batch in plan.schedule.batches(data.train, 0)(0, job["num_steps"]):
        losses.append(_plain_backward(module, batch, train.label_smoothing, uses_bf16=job["precision"] == "bf16"))
        for name, p in params.items():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            root_mean_square = gradient.square().mean().sqrt()
            counted[name] &= gradient.abs() >= (min_gradient * root_mean_square).clamp(min=1e-30)
        grads = [p.grad for p in params.values() if p.grad is not None]  # in float32 a sum of many squares is 1e-5 off
        tensor_norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
        norms.append(float(torch.stack(tensor_norms).norm()))
        torch.nn.utils.clip_grad_norm_(params.values(), train.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach().float().cpu() for name, p in params.items()}
    counted = {name: mask.cpu() for name, mask in counted.items()}
    torch.save({"losses": losses, "norms": norms, "weights": weights, "counted": counted}, job["reference"])


def _plain_backward(module: Any, batch: GlobalBatch, label_smoothing: float, *, uses_bf16: bool) -> float:
    total, device = 0.0, module.device
    for micro_batch in batch.micro_batches:
        arrays = {"input_ids": micro_batch.input_ids, "labels": micro_batch.labels}
        if micro_batch.position_ids is not None:
            arrays["position_ids"] = micro_batch.position_ids
        inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        labels = inputs.pop("labels")
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16):
            logits = module(**inputs, use_cache=False).logits
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
        (nll / batch.num_target_tokens).backward()
        total += nll.item()
    return total / batch.num_target_tokens
