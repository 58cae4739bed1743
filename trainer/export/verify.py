"""An exported folder is loaded in a process of its own and held against the trained model."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from trainer.config.choices import ExportDtype
from trainer.data.dataset import PreparedDataset
from trainer.data.sampler import eval_batches
from trainer.distributed.launch_environment import without_launcher


class StoredDtype(NamedTuple):
    """What a dtype is called in config.json and torch, and in a safetensors file."""

    config: str
    stored: str


STORED_DTYPES: dict[ExportDtype, StoredDtype] = {
    "fp32": StoredDtype("float32", "F32"), "bf16": StoredDtype("bfloat16", "BF16"),
    "fp16": StoredDtype("float16", "F16"),
}  # fmt: skip
#: Largest difference of the logits, as a share of the largest logit (of 1 where that is smaller). bf16 is autocast over
#: float32 weights, which answer here in float32; a model that trained in fp16 answers in that, with 11 bits.
LOGITS_BOUND, FP16_LOGITS_BOUND = 1e-5, 2e-2
#: Relative: another process may choose other kernels, which add in another order.
LOSS_BOUND = {"fp32": 1e-6, "bf16": 2e-3, "fp16": 2e-3}
CROSS_DEVICE_FACTOR = 10  # times that, where a run on a GPU is checked on a processor
MAX_COMPARED_TOKENS = (
    128  # tokens of a row whose logits are compared: more are hundreds of megabytes, and the loss sees them all
)


@dataclass(frozen=True, kw_only=True)
class ReferenceOutputs:
    """What the trained model is and answered, for the folder to be held against."""

    input_ids: np.ndarray  #: int64 [rows, width], fixed rows
    logits: np.ndarray  #: float32 [rows, width, vocabulary], of the trained model on them
    is_tied: bool  #: whether its input and output embeddings are one tensor
    loss: float | None  #: validation loss that was recorded of these weights; None where they were not evaluated
    data_folder: Path | None  #: prepared data whose validation rows are evaluated again; None where it is gone
    data_missing_reason: str = ""  #: why there is none
    no_loss_reason: str = "none was recorded"  #: beside a loss with none to compare; "" where it is said elsewhere
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
    num_tensors: int = 0
    dtype: str = ""
    problems: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people and for the model card."""
        if self.max_logits_difference is None:
            return "CHECK FAILED: " + "; ".join(self.problems)
        verdict = "reloaded and checked" if not self.problems else "CHECK FAILED: " + "; ".join(self.problems)
        scale = f" (the largest is {self.max_abs_logit:.1f})" if self.max_logits_difference > LOGITS_BOUND else ""
        return (
            f"{verdict}: logits differ by at most {self.max_logits_difference:.1e}{scale}, "
            f"{self._describe_losses()}, {self.dtype}"
        )

    def _describe_losses(self) -> str:
        if self.loss is None:
            return f"validation loss not evaluated again ({self.loss_missing_reason})"
        recorded = "" if self.recorded_loss is None else f"recorded {self.recorded_loss:.6f}"
        remark = recorded or self.loss_missing_reason
        return f"validation loss {self.loss:.6f}" + (f" ({remark})" if remark else "")


def fixed_input_ids(data: PreparedDataset) -> np.ndarray:
    """int64 [1 or 2, width up to MAX_COMPARED_TOKENS]: the beginnings of the longest validation rows."""
    return next(eval_batches(data.val, 2, 0, 1, 0)).input_ids[:, :MAX_COMPARED_TOKENS]


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
        job_file.write_text(json.dumps({
            "folder": str(folder), "base": base_path, "logits": str(logits_file),
            "data": str(reference_outputs.data_folder or ""),
            "eval_batch": reference_outputs.eval_batch, "device": reference_outputs.device,
            "precision": reference_outputs.precision,
            "threads": reference_outputs.num_threads,
        }))  # fmt: skip
        process = run_worker(job_file)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["it said nothing"]
        return VerificationResult(
            problems=(f"it could not be loaded again (exit code {process.returncode}): {lines[-1][:300]}",)
        )
    return compare_with_reference(json.loads(process.stdout.strip().splitlines()[-1]), reference_outputs)


def run_worker(job_file: Path) -> "subprocess.CompletedProcess[str]":
    """Run the verification; it ends with us, because it reads from a pipe of which we hold the other end."""
    write_end, read_end = os.pipe()[::-1]
    try:
        return subprocess.run(
            [sys.executable, "-m", "trainer.export.verify_worker", str(job_file)],
            stdin=read_end, capture_output=True, text=True, env=_environment_without_launcher(),
        )  # fmt: skip
    finally:
        os.close(read_end)
        os.close(write_end)


def _environment_without_launcher() -> dict[str, str]:
    """The environment without what a launcher set: the fresh process is nobody's rank."""
    root = str(Path(__file__).parent.parent.parent)
    environment = {name: value for name, value in without_launcher(os.environ).items() if not name.startswith("WANDB_")}
    return environment | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")])),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",  # a base of the hub is in its local cache: this process's parent has just used it
    }


def compare_with_reference(answer: Mapping[str, Any], reference_outputs: ReferenceOutputs) -> VerificationResult:
    """Hold the answers of `trainer.export.verify_worker` against the trained model."""
    loss_missing_reason = (
        reference_outputs.data_missing_reason
        if reference_outputs.data_folder is None
        else ""
        if reference_outputs.loss is not None
        else reference_outputs.no_loss_reason
    )
    return VerificationResult(
        max_logits_difference=answer["logits_difference"],
        max_abs_logit=float(np.abs(reference_outputs.logits).max()),
        loss=answer["loss"],
        recorded_loss=reference_outputs.loss,
        loss_missing_reason=loss_missing_reason,
        is_tied=answer["tied"],
        num_tensors=answer["tensors"],
        dtype=STORED_DTYPES[reference_outputs.stored_dtype].config,
        problems=tuple(_find_problems(answer, reference_outputs)),
    )


def _find_problems(answer: Mapping[str, Any], reference_outputs: ReferenceOutputs) -> Iterator[str]:
    """What is wrong with the folder, each a half sentence; the first ones explain the later ones."""
    if not answer["tensors"]:
        yield "it holds no tensors"
    if answer["empty"]:
        yield f"{answer['empty'][0]} is empty"
    if answer["adapters"] and not answer["adapters_moved"]:
        yield "every adapter's B is zero: nothing was learnt"
    config_dtype = answer["said_dtype"]  # an adapter's config says nothing
    expected, stored = STORED_DTYPES[reference_outputs.stored_dtype], answer["stored_dtypes"]
    if stored != [expected.stored] or config_dtype not in (None, expected.config):
        yield f"stored as {', '.join(stored)}, its config says {config_dtype}, expected {expected.config}"
    if answer["tied"] != reference_outputs.is_tied:
        yield f"input and output embeddings are {'no longer' if reference_outputs.is_tied else 'now'} tied"
    if reference_outputs.is_tied and answer["embedding_copies"] > 1:
        yield f"the tied embedding is stored {answer['embedding_copies']} times"
    bound = (FP16_LOGITS_BOUND if reference_outputs.is_fp16 else LOGITS_BOUND) * max(
        1.0, float(np.abs(reference_outputs.logits).max())
    )
    if not answer["logits_difference"] <= bound:
        yield f"logits differ by {answer['logits_difference']:.1e}, more than {bound:.1e}"
    if reference_outputs.loss is not None and answer["loss"] is not None:
        bound = (
            LOSS_BOUND[reference_outputs.precision]
            * reference_outputs.loss
            * (CROSS_DEVICE_FACTOR if reference_outputs.is_cross_device else 1)
        )
        if not abs(answer["loss"] - reference_outputs.loss) <= bound:
            yield f"validation loss {answer['loss']:.6f}, recorded {reference_outputs.loss:.6f}"
