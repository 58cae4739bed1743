"""Forward and backward by the plan in force, which gives way where a part of it fails, or where another is faster."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from trainer.distributed.compiled_steps import CompiledStepRunner
from trainer.distributed.cuda_graphs import NUM_WARMUP_CALLS, CUDAGraphRunner
from trainer.distributed.execution import ExecutionPlan, PlanChange
from trainer.distributed.execution_tuner import ExecutionTuner
from trainer.distributed.process_group import DistContext
from trainer.distributed.steppers import DeepSpeedStepper, NativeStepper
from trainer.model.loss import CausalLMLoss


class StepExecution:
    """Runs micro-batches; all ranks begin their steps in one order."""

    def __init__(
        self,
        dist_context: DistContext,
        loss_module: CausalLMLoss,
        stepper: NativeStepper | DeepSpeedStepper,
        trainable_params: Sequence[nn.Parameter],
        plan: ExecutionPlan,
        tuner: ExecutionTuner | None = None,
        *,
        head_problem: str = "",
    ):
        """`plan`: the first; `tuner`: what looks for a faster one over the first steps; `head_problem`: why logits are
        not made in pieces.

        Parameters: an engine's parts, by which it runs its steps.
        """
        self.dist_context = dist_context
        self.loss_module = loss_module
        self.stepper = stepper
        self.trainable_params = list(trainable_params)
        self.tuner = tuner
        self.changes: list[PlanChange] = []  #: plans that took the place of others, in order
        self._has_chunked_loss = not head_problem
        self._past_checks: list[str] = []
        self._compiled: CompiledStepRunner | None = None
        self._graphs: CUDAGraphRunner | None = None
        self._set_plan(plan)
        if head_problem:
            self.changes.append(PlanChange(step=0, plan=self.plan, reason=head_problem))

    def _set_plan(self, plan: ExecutionPlan) -> None:
        self.plan = replace(plan, chunked_loss=self._has_chunked_loss)
        self._past_checks, self._compiled, self._graphs = self.checks, None, None
        backward, forward = self.stepper.backward, self.stepper.forward
        self.loss_module.compile_for_shapes(set())
        if plan.compiled_shapes:
            self._compiled = CompiledStepRunner(
                self.loss_module,
                self.trainable_params,
                backward,
                forward,
                shapes=set(plan.compiled_shapes),
                precision=plan.precision,
            )
            backward, forward = self._compiled.backward, self._compiled.forward
        if plan.cuda_graphs:
            assert isinstance(self.stepper, NativeStepper)
            self._graphs = CUDAGraphRunner(
                self.loss_module,
                self.trainable_params,
                backward,
                forward,
                precision=plan.precision,
                static_grads=self.stepper.flat_grads,
            )

    def use_plan(self, plan: ExecutionPlan) -> None:
        """Run by another plan from here on, one that differs in path and compiled shapes alone.

        What was recorded or compiled for the last one is dropped, with the memory that it holds.
        """
        if self.dist_context.device.type == "cuda":
            torch.cuda.synchronize(self.dist_context.device)  # a replay of what is dropped may still be under way
        self._set_plan(plan)

    @property
    def checks(self) -> list[str]:
        """A line for each shape that was compiled or recorded, and verified."""
        runners = [runner for runner in (self._compiled, self._graphs) if runner is not None]
        return [*self._past_checks, *(check for runner in runners for check in runner.checks)]

    @property
    def checked_to(self) -> float:
        """The largest difference from eager calls among the shapes that were verified under this plan."""
        return max((runner.checked_to for runner in (self._compiled, self._graphs) if runner is not None), default=0.0)

    @property
    def num_warmup_steps(self) -> int:
        """Steps after which the following ones take as long as all later ones."""
        return NUM_WARMUP_CALLS + 2 if self.plan.cuda_graphs else 1

    @property
    def runner(self) -> CUDAGraphRunner | CompiledStepRunner | NativeStepper | DeepSpeedStepper:
        """What has `backward` and `forward` of a micro-batch: the stepper itself unless steps are recorded or compiled.

        `backward(ids, labels, loss_weight)` adds the gradient of the rows' summed loss times `loss_weight`; both
        return each row's sum.
        """
        return self._graphs or self._compiled or self.stepper

    def begin_step(self, step: int) -> None:
        """Before a step is launched: take up a plan without what has failed, or the next one that is to be timed."""
        if self._compiled is not None and self._compiled.error:
            self._fall_back(step, replace(self.plan, compiled_shapes=()), self._compiled.error)
        if self._graphs is not None and self._graphs.capture_error:
            # Whether gradients leave in buckets stays as it is: on another rank the recording may have worked.
            self._fall_back(step, replace(self.plan, cuda_graphs=False), self._graphs.capture_error)
        if self.tuner is None:
            return
        self.tuner.note_check(self.checked_to)
        if self.tuner.is_complete:
            fastest, reason, timings = self.tuner.decide(self.dist_context.all_gather_object)
            self.tuner = None
            self.use_plan(fastest)
            self.changes.append(PlanChange(step=step, plan=fastest, reason=reason, timings=timings))
        elif (next_plan := self.tuner.next_plan(step)) is not None:
            self.use_plan(next_plan)

    def end_step(self, step: int, num_positions: int, elapsed_seconds: float) -> None:
        """Once a step is done: its time, for the tuner."""
        if self.tuner is not None:
            self.tuner.add(step, elapsed_seconds / num_positions)

    def _fall_back(self, step: int, plan: ExecutionPlan, reason: str) -> None:
        self.use_plan(plan)
        if self.tuner is not None:
            self.tuner.note_failure(reason)
        else:
            self.changes.append(PlanChange(step=step, plan=plan, reason=reason))
