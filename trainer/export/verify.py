"""An exported folder is loaded in a process of its own and held against the trained model."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.choices import ExportDtype
from trainer.data.dataset import PreparedDataset
from trainer.data.sampler import eval_batches
from trainer.distributed.launch_environment import without_launcher

#: {dtype: (its name in torch and config.json, its name in a safetensors file)}
STORED_DTYPES: dict[ExportDtype, tuple[str, str]] = {
    "fp32": ("float32", "F32"),
    "bf16": ("bfloat16", "BF16"),
    "fp16": ("float16", "F16"),
}
#: Largest difference of the logits, as a share of the largest logit (of 1 where that is smaller). bf16 is autocast over
#: float32 weights, which answer here in float32; a model that trained in fp16 answers in that, with 11 bits.
LOGITS_BOUND, FP16_LOGITS_BOUND = 1e-5, 2e-2
#: Relative: another process may choose other kernels, which add in another order.
LOSS_BOUND = {"fp32": 1e-6, "bf16": 2e-3, "fp16": 2e-3}
CROSS_DEVICE_FACTOR = 10  # times that, where a run on a GPU is checked on a processor
#: Of a row, whose logits are compared: more are hundreds of megabytes, and the loss sees them all.
MAX_COMPARED_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class ReferenceOutputs:
    """What the trained model is and answered, for the folder to be held against."""

    input_ids: np.ndarray  #: int64 [rows, width], fixed rows
    logits: np.ndarray  #: float32 [rows, width, vocabulary], of the trained model on them
    is_tied: bool  #: whether its input and output embeddings are one tensor
    loss: float | None  #: validation loss that was recorded of these weights; None where they were not evaluated
    data_folder: Path | None  #: prepared data whose validation rows are evaluated again; None where it is gone
    loss_missing_reason: str = "none was recorded"  #: why no loss is compared; "" where it is said elsewhere
    eval_batch: int
    device: str  #: `cpu` or `cuda`, of the fresh process
    precision: str  #: of the recorded loss
    num_threads: int
    is_fp16: bool = False  #: whether the trained model answered in float16
    is_cross_device: bool = False  #: whether the loss was recorded on another kind of device
    stored_dtype: ExportDtype = "fp32"  #: of the folder's weights; the answers above are of weights rounded to it


@dataclass(frozen=True, kw_only=True)
class VerificationResult:
    """What the reloaded folder answered; without `problems` it is the model that was trained."""

    max_logits_difference: float | None = None  #: largest, absolute; None where the folder could not be loaded
    max_abs_logit: float = 0.0  #: of the trained model, absolute
    loss: float | None = None  #: validation loss of the folder, nats per counted token
    recorded_loss: float | None = None
    loss_missing_reason: str = ""  #: why there is no loss to compare
    is_tied: bool | None = None
    dtype: str = ""
    problems: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people and for the model card."""
        verdict = "reloaded and checked" if not self.problems else "CHECK FAILED: " + "; ".join(self.problems)
        if self.max_logits_difference is None:
            return verdict
        scale = f" (the largest is {self.max_abs_logit:.1f})" if self.max_logits_difference > LOGITS_BOUND else ""
        return (
            f"{verdict}: logits differ by at most {self.max_logits_difference:.1e}{scale}, "
            f"{self._describe_losses()}, {self.dtype}"
        )

    def _describe_losses(self) -> str:
        if self.loss is None:
            return f"validation loss not evaluated again ({self.loss_missing_reason})"
        remark = self.loss_missing_reason if self.recorded_loss is None else f"recorded {self.recorded_loss:.6f}"
        return f"validation loss {self.loss:.6f}" + (f" ({remark})" if remark else "")


def fixed_input_ids(data: PreparedDataset) -> np.ndarray:
    """int64 [1 or 2, width up to MAX_COMPARED_TOKENS]: the beginnings of the longest validation rows."""
    return next(eval_batches(data.val, 2, 0, 1)).input_ids[:, :MAX_COMPARED_TOKENS]


def compute_logits(module: Any, input_ids: np.ndarray, device: torch.device) -> np.ndarray:
    """Float32 logits [rows, width, vocabulary] of a model on fixed rows; all ranks must call under ZeRO-3."""
    was_training = module.training
    module.eval()
    with torch.no_grad():
        logits = module(input_ids=torch.from_numpy(input_ids).to(device), use_cache=False).logits.float().cpu().numpy()
    module.train(was_training)
    return logits


def verify_folder(
    folder: Path, reference_outputs: ReferenceOutputs, *, base_path: str | None = None
) -> VerificationResult:
    """Load the folder in a fresh process (`trainer.export.verify_worker`) and judge its answers; never raises for a
    bad folder. `base_path`: where the base of an adapter is."""
    with tempfile.TemporaryDirectory() as scratch:
        logits_file, job_file = Path(scratch) / "logits.npz", Path(scratch) / "job.json"
        np.savez(logits_file, input_ids=reference_outputs.input_ids, logits=reference_outputs.logits)
        job_file.write_text(
            json.dumps(
                {
                    "folder": str(folder),
                    "base": base_path,
                    "logits": str(logits_file),
                    "data": str(reference_outputs.data_folder or ""),
                    "eval_batch": reference_outputs.eval_batch,
                    "device": reference_outputs.device,
                    "precision": reference_outputs.precision,
                    "threads": reference_outputs.num_threads,
                }
            )
        )
        process = run_worker(job_file)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["it said nothing"]
        return VerificationResult(
            problems=(f"it could not be loaded again (exit code {process.returncode}): {lines[-1][:300]}",)
        )
    return compare_with_reference(json.loads(process.stdout.strip().splitlines()[-1]), reference_outputs)


def run_worker(job_file: Path) -> "subprocess.CompletedProcess[str]":
    """Run the verification, as nobody's rank; it ends with us: it reads from a pipe of which we hold the other end."""
    environment = {name: value for name, value in without_launcher(os.environ).items() if not name.startswith("WANDB_")}
    root = str(Path(__file__).parents[2])
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")])),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",  # a base of the hub is in its local cache: this process's parent has just used it
    }
    read_end, write_end = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-m", "trainer.export.verify_worker", str(job_file)],
            stdin=read_end,
            capture_output=True,
            text=True,
            env=environment,
        )
    finally:
        os.close(read_end)
        os.close(write_end)


def compare_with_reference(answer: Mapping[str, Any], reference_outputs: ReferenceOutputs) -> VerificationResult:
    """Hold the answers of `trainer.export.verify_worker` against the trained model."""
    return VerificationResult(
        max_logits_difference=answer["logits_difference"],
        max_abs_logit=float(np.abs(reference_outputs.logits).max()),
        loss=answer["loss"],
        recorded_loss=reference_outputs.loss,
        loss_missing_reason=reference_outputs.loss_missing_reason,
        is_tied=answer["tied"],
        dtype=STORED_DTYPES[reference_outputs.stored_dtype][0],
        problems=tuple(_find_problems(answer, reference_outputs)),
    )


def _find_problems(answer: Mapping[str, Any], expected: ReferenceOutputs) -> Iterator[str]:
    """What is wrong with the folder, each a half sentence; the first ones explain the later ones."""
    if not answer["tensors"]:
        yield "it holds no tensors"
    if answer["empty"]:
        yield f"{answer['empty'][0]} is empty"
    if answer["adapters"] and not answer["adapters_moved"]:
        yield "every adapter's B is zero: nothing was learnt"
    torch_dtype, safetensors_dtype = STORED_DTYPES[expected.stored_dtype]
    config_dtype = answer["said_dtype"]  # an adapter's config says nothing
    if answer["stored_dtypes"] != [safetensors_dtype] or config_dtype not in (None, torch_dtype):
        stored = ", ".join(answer["stored_dtypes"])
        yield f"stored as {stored}, its config says {config_dtype}, expected {torch_dtype}"
    if answer["tied"] != expected.is_tied:
        yield f"input and output embeddings are {'no longer' if expected.is_tied else 'now'} tied"
    if expected.is_tied and answer["embedding_copies"] > 1:
        yield f"the tied embedding is stored {answer['embedding_copies']} times"
    bound = FP16_LOGITS_BOUND if expected.is_fp16 else LOGITS_BOUND
    bound *= max(1.0, float(np.abs(expected.logits).max()))
    if not answer["logits_difference"] <= bound:
        yield f"logits differ by {answer['logits_difference']:.1e}, more than {bound:.1e}"
    if expected.loss is not None and answer["loss"] is not None:
        bound = LOSS_BOUND[expected.precision] * expected.loss
        bound *= CROSS_DEVICE_FACTOR if expected.is_cross_device else 1
        if not abs(answer["loss"] - expected.loss) <= bound:
            yield f"validation loss {answer['loss']:.6f}, recorded {expected.loss:.6f}"
