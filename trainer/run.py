"""One run, wired: the only file that knows all the others.

Long: every part is called here, once.
"""

import os
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.cli import CliArgs
from trainer.config.errors import TrainingError, UserError, report_error
from trainer.data.dataset import PreparedDataset
from trainer.distributed.engine import Engine
from trainer.distributed.launch_environment import read_launch_environment
from trainer.distributed.preflight import program_facts, refuse_differences, refuse_full_disk
from trainer.distributed.process_group import (
    DistContext,
    destroy_process_group,
    init_distributed,
    is_peer_failure,
    simulated_context,
)
from trainer.distributed.signals import SignalHandler
from trainer.export.run_export import RunExport, earlier_checkpoint_to_export, export_run, measure_memory
from trainer.model.build import TrainableModel, build_model, load_config
from trainer.model.flops import count_step_flops
from trainer.tools.finders.batch_finder import find_micro_batch_size
from trainer.tools.finders.files import FINDER_FILES
from trainer.tools.finders.lr_finder import find_lr
from trainer.tracking.records import Record
from trainer.tracking.run_lock import hold_run_folder
from trainer.tracking.summary import show_plan
from trainer.tracking.tensorboard_logger import check_loggers
from trainer.training import checkpoint, run_folder
from trainer.training.callbacks import Callbacks
from trainer.training.checkpoint import MIN_BYTES_PER_TRAINED_WEIGHT, Checkpoint, CheckpointManager
from trainer.training.checkpoint_loading import load_for_evaluation, load_optimizer, load_weights
from trainer.training.data_setup import prepare_data, print_examples
from trainer.training.generation import GenerationEvaluator, check_prompts_available
from trainer.training.host_report import with_host_lines
from trainer.training.loop import train
from trainer.training.metric_logger import MetricLogger
from trainer.training.plan_validation import validate_early
from trainer.training.run_events import finished_event, resumed_event
from trainer.training.run_plan import RunPlan, make_plan
from trainer.training.split_evaluation import OTHER_SPLITS, evaluate_other_split
from trainer.training.train_state import TrainState


def run(args: CliArgs, signal_handler: SignalHandler) -> int:
    """Do what was asked; returns the exit code. Where one rank fails all do, and one of them says why."""
    launch = read_launch_environment(os.environ)
    if args.dry_run and launch.rank > 0:  # a plan is made by one, without joining anybody
        return 0
    if args.dry_run:
        context = simulated_context(launch.world_size)
    else:
        context = init_distributed(join_timeout_seconds=args.settings.engine.hang_timeout)
    try:
        return _run(args, context, signal_handler)
    except Exception as error:
        with signal_handler.defer_signals():  # a launcher that has seen one rank end signals all others
            is_reporting_rank, failure = context.watchdog.claim_error_report(), error
            if is_peer_failure(error):
                failure = TrainingError(context.watchdog.describe_lost_peer() if is_reporting_rank else "")
            if is_reporting_rank and isinstance(failure, (UserError, TrainingError)):
                report_error(failure)
            context.watchdog.close(has_failed=True)
        if isinstance(failure, (UserError, TrainingError)):
            return failure.exit_code
        raise  # a mistake of ours, with its traceback
    finally:
        context.watchdog.close()
        destroy_process_group()


def _run(args: CliArgs, context: DistContext, signal_handler: SignalHandler) -> int:
    refuse_differences(context, program_facts(args.settings.as_dict()))
    settings, previous_metadata = context.on_rank_zero(lambda: run_folder.resolve_output_dir(args, FINDER_FILES))
    if args.resume == "auto" and previous_metadata is None:
        run_folder.refuse_run_elsewhere(Path(settings.run_folder), context)
    context.on_rank_zero(lambda: validate_early(settings, context))
    context.on_rank_zero(lambda: check_loggers(settings.output))
    data = prepare_data(settings, context)
    if args.show_example and context.rank == 0:
        print_examples(settings, data, args.show_example)
    check_prompts_available(settings, data)
    on_meta = args.dry_run or args.find_batch
    model = build_model(settings, on_meta=on_meta, with_fingerprint=context.local_rank == 0, device=context.device)
    refuse_differences(
        context, {"the data": data.metadata["fingerprint"], "the base model": model.metadata["fingerprint"]}
    )
    lengths, global_batch = data.train.lengths(), settings.train.global_batch
    step_flops = context.on_rank_zero(lambda: count_step_flops(settings, lengths=lengths, global_batch=global_batch))
    model_info = {**model.metadata, "step_flops": step_flops}
    plan = make_plan(settings, context, data, model_info, load_config(settings.model))
    if (args.dry_run or args.runs_finder) and context.rank == 0:
        show_plan(plan.summary_lines())
    if args.dry_run:
        return 0
    if args.runs_finder:
        return run_finder(args, plan, data, model)
    with hold_run_folder(Path(settings.run_folder), context.on_rank_zero):
        # Once more, now that nobody else writes there: another run may have come or gone on meanwhile.
        _, previous_metadata = context.on_rank_zero(lambda: run_folder.resolve_output_dir(args, FINDER_FILES))
        return TrainingRun(with_host_lines(plan), data, model, args, previous_metadata).run(signal_handler)


def run_finder(args: CliArgs, plan: RunPlan, data: PreparedDataset, model: TrainableModel) -> int:
    """Trials instead of the run; the exit code."""
    if args.find_lr is None:
        return find_micro_batch_size(plan, data)
    with plan.dist_context.watchdog.watch_for_hangs(plan.settings.engine.hang_timeout):
        return find_lr(args.find_lr, plan, data, build_engine(plan, model, None)[0])


def build_engine(plan: RunPlan, model: TrainableModel, source: Checkpoint | None) -> tuple[Engine, TrainState]:
    """The engine of a plan and the state of the run: at its start, or where the checkpoint `source` stood."""
    if source is not None:
        load_weights(source, model.module, plan.dist_context)
    engine = Engine(plan.dist_context, model, plan.deepspeed_config, plan.settings.train, plan.execution)
    if source is None:
        return engine, TrainState()
    load_optimizer(source, engine)
    return engine, source.train_state


class TrainingRun:
    """A run from its plan to its exported model: `run` trains and finalizes."""

    def __init__(
        self,
        plan: RunPlan,
        data: PreparedDataset,
        model: TrainableModel,
        args: CliArgs,
        previous_metadata: Mapping[str, Any] | None,
    ):
        """Write run.json, build the engine, at its start or where a checkpoint stood, and start the loggers."""
        self.plan, self.data, self.model = plan, data, model
        self.folder = folder = Path(plan.settings.run_folder)
        context, is_resumed = plan.dist_context, previous_metadata is not None
        source = None
        if is_resumed:
            source = context.on_rank_zero(lambda: run_folder.select_checkpoint(folder, args.resume, model))
        checkpoint_bytes = MIN_BYTES_PER_TRAINED_WEIGHT * model.metadata["trainable"]
        context.on_rank_zero(lambda: refuse_full_disk(folder, checkpoint_bytes))
        #: the content of run.json
        self.metadata: dict[str, Any] = context.on_rank_zero(
            lambda: run_folder.write_metadata(folder, plan, previous_metadata, source, args.allow_change)
        )
        self.engine, self.state = build_engine(plan, model, source)
        if is_resumed:  # before later rows go: after a kill in between rows are cut then, none is missing
            context.on_rank_zero(lambda: checkpoint.delete_checkpoints_after(folder / "checkpoints", self.state.step))
        self.metrics = MetricLogger(plan, data, self.metadata, self.state, is_resumed=is_resumed)
        self.checkpoints = CheckpointManager(
            folder / "checkpoints",
            context,
            save_total_limit=plan.settings.output.save_total_limit,
            identity={
                "run_id": self.metadata["run_id"],
                "mode": plan.settings.mode,
                "base": model.metadata["fingerprint"],
            },
            record_digests=self.metrics.record_digests,
        )
        if is_resumed:
            changes = self.metadata["resumed"]["changed"]
            self.metrics.log(resumed_event(plan, self.state, changes, source, self.metrics.num_truncated))
        self.generation_evaluator = GenerationEvaluator(self.engine, data, plan.settings)
        metadata = {**self.metadata, "resolved": plan.resolved()}
        previous_records = self.metrics.previous_records()
        self.callbacks = Callbacks(self.engine, metadata, self.generation_evaluator, previous_records)

    def run(self, signal_handler: SignalHandler) -> int:
        """Train and finalize; the exit code. Whatever happens, the loggers are closed with it."""
        exit_code = 1
        try:
            signal_exit_code = self.train(signal_handler)
            if not signal_exit_code:
                self.finalize()
            exit_code = signal_exit_code
            return exit_code
        finally:
            self.metrics.close(exit_code)

    def train(self, signal_handler: SignalHandler) -> int:
        """All steps, or those until a signal: 128 + its number, else 0."""
        context = self.plan.dist_context
        for event in self.callbacks.on_train_begin(self.state.step, self.state.elapsed_seconds):
            self.metrics.log(event)
        hang_timeout = self.plan.settings.engine.hang_timeout
        with signal_handler.defer_signals(), context.watchdog.watch_for_hangs(hang_timeout, self.folder):
            if not self.state.step and self.state.eval_pending:
                self._evaluate_other_splits(0)
            stream = train(
                self.engine, self.data, self.plan.schedule, self.state, self.checkpoints, signal_handler.stop_requested
            )
            self.state = self._consume(stream)
            signal_handler.check_launcher()  # another rank may have been the first to see that the launcher is gone
        signal_numbers = context.all_gather_object(signal_handler.signal_number)
        if not any(signal_numbers):
            return 0
        if context.rank == 0:
            run_folder.write_requeue_marker(self.folder, signal_numbers)
        return 128 + max(signal_numbers)

    def _consume(self, stream: Generator[Record, None, TrainState]) -> TrainState:
        """Log every record of the stream, and what the callbacks add; returns what the stream returned."""
        while True:
            try:
                record = next(stream)
            except StopIteration as end:
                return end.value
            start_time = time.perf_counter()
            self.metrics.log(record)
            self.callbacks.diagnostics.add_time("logging", time.perf_counter() - start_time)
            for event in self.callbacks.on_record(record):
                self.metrics.log(event)
                if event.event == "execution":  # run.json keeps every plan by which steps ran
                    self.metadata = {**self.metadata, "execution": [*self.metadata["execution"], event.facts]}
                    if self.plan.dist_context.rank == 0:
                        run_folder.write_run_json(self.folder, self.metadata)

    def _evaluate_other_splits(self, step: int) -> None:
        if self.plan.settings.output.export == "none":  # they are for what is exported
            return
        for split in OTHER_SPLITS:
            event = evaluate_other_split(self.plan, self.data, self.engine, split, self.state, step)
            if event is not None:
                self.metrics.log(event)

    def finalize(self) -> None:
        """Export, load the export again, and say how it went. TrainingError where the export is not what was run."""
        start_time = time.perf_counter()
        export = self._export() if self.plan.settings.output.export != "none" else None
        measurements = export.measurements if export else measure_memory(self.engine)
        summary = export.verification.summary() if export else "nothing exported"
        event = finished_event(
            self.plan,
            self.state,
            export_summary=summary,
            choice=export.choice if export else None,
            elapsed_seconds=self.state.elapsed_seconds + time.perf_counter() - start_time,
            measurements={"sample_seconds": self.generation_evaluator.elapsed_seconds, **measurements},
        )
        self.metrics.log(event)
        if export and export.verification.problems:
            raise TrainingError(f"{self.folder / 'model'}: {summary}; checkpoints and records are whole")

    def _export(self) -> RunExport:
        """Evaluate the other splits at the chosen weights, write and check the exported folder."""
        if any(len(getattr(self.data, split)) for split in OTHER_SPLITS):
            chosen = self.plan.dist_context.on_rank_zero(lambda: earlier_checkpoint_to_export(self.plan, self.state))
            if chosen is not None:
                load_for_evaluation(chosen, self.engine)
            self._evaluate_other_splits(chosen.step if chosen else self.state.step)
        return export_run(self.plan, self.data, self.model, self.engine, self.state, self.metadata)
