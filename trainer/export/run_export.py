"""The export at the end of a run: the weights that were evaluated, in a folder that was loaded again and compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.dataset import PreparedDataset
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import peak_memory_bytes
from trainer.export.export_cli import load_model_at_checkpoint
from trainer.export.folder import FolderContent, base_model_ref, collect_state_dict, export_folder, training_tokenizer
from trainer.export.model_card import render_model_card
from trainer.export.verify import ReferenceOutputs, VerificationResult, compute_logits, fixed_input_ids
from trainer.model.build import TrainableModel
from trainer.tracking import records
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpoint
from trainer.training.run_plan import RunPlan
from trainer.training.train_state import TrainState


@dataclass(frozen=True, kw_only=True)
class RunExport:
    """What became of the export of a run."""

    verification: VerificationResult
    measurements: dict[str, int]  #: of `measure_memory`
    choice: dict[str, Any]  #: which weights: `which` (last, best), `step`, `loss`


def export_run(
    plan: RunPlan,
    data: PreparedDataset,
    model: TrainableModel,
    engine: Engine,
    state: TrainState,
    metadata: dict[str, Any],
) -> RunExport:
    """Write `model/` of the run folder on rank 0 and verify it in a fresh process; all ranks must call.

    Long: the collectives and what rank 0 does between them, in their order. Parameters: the parts of a run.
    """
    context, settings = plan.dist_context, plan.settings
    folder = Path(settings.run_folder)
    best = context.on_rank_zero(lambda: earlier_checkpoint_to_export(plan, state))
    choice: dict[str, Any] = {
        "which": settings.output.export,
        "step": best.step if best else state.step,
        "loss": best.val_loss if best else state.val_loss,
    }
    input_ids = fixed_input_ids(data)
    engine.restore_fp32()
    logits = compute_logits(model.module, input_ids, context.device)
    weights = collect_state_dict(engine.state.gather_weights(), should_keep=context.rank == 0 and best is None)
    measurements = measure_memory(engine)

    def write_and_verify() -> VerificationResult:
        source_model, exported_weights, reference_logits = model, weights, logits
        if best is not None:  # the engine holds the last weights: the best are read back, in a model of their own
            source_model = load_model_at_checkpoint(folder, settings, best, metadata)
            trainable = ((name, p) for name, p in source_model.module.named_parameters() if p.requires_grad)
            exported_weights = {name: p.detach().cpu() for name, p in trainable}
            reference_logits = compute_logits(source_model.module, input_ids, context.device)
        reference = ReferenceOutputs(
            input_ids=input_ids,
            logits=reference_logits,
            is_tied=model.has_tied_embeddings,
            loss=choice["loss"],
            data_folder=data.folder,
            eval_batch=settings.train.eval_batch,
            device=context.device.type,
            precision=plan.precision,
            num_threads=context.num_threads,
            is_fp16=plan.precision == "fp16" and best is None,
        )
        metric_records = list(records.read_records(folder / "metrics.jsonl", with_steps=False))
        content = FolderContent(
            module=source_model.module,
            state_dict=exported_weights,
            base_model=base_model_ref(model, folder),
            tokenizer=training_tokenizer(settings.model.model, plan.data_info),
        )
        return export_folder(
            folder / "model",
            content,
            reference,
            lambda verification: render_model_card(
                metadata,
                metric_records,
                verification,
                step=choice["step"],
                measurements=measurements,
                choice_reason=_describe_choice(choice, state),
            ),
        )

    verification = context.on_rank_zero(write_and_verify)
    return RunExport(verification=verification, measurements=measurements, choice=choice)


def measure_memory(engine: Engine) -> dict[str, int]:
    """peak_memory_bytes and optimizer_bytes, the largest of the ranks; all must call."""
    context = engine.dist_context
    return {
        "peak_memory_bytes": max(context.all_gather_object(peak_memory_bytes(context.device))),
        "optimizer_bytes": max(context.all_gather_object(engine.state.optimizer_bytes())),
    }


def earlier_checkpoint_to_export(plan: RunPlan, state: TrainState) -> Checkpoint | None:
    """The checkpoint to export with --export best; None: the weights at hand, which are the best or were asked for."""
    if plan.settings.output.export != "best":
        return None
    best = checkpoint.resolve_checkpoint(Path(plan.settings.run_folder) / "checkpoints", "best")
    return best if best.step != state.step else None


def _describe_choice(choice: Mapping[str, Any], state: TrainState) -> str:
    """What the model card says of the choice of the weights; empty for the last ones, which need no word."""
    if choice["which"] == "last":
        return ""
    return (
        f"These are the weights with the lowest validation loss ({choice['loss']:.4f}) of those that were saved; "
        f"training went on to step {state.step:,}."
    )
