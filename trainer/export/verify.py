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

from trainer.data.dataset import Prepared
from trainer.data.sampler import eval_batches

#: Largest difference of the logits, as a share of the largest logit (of 1 where that is smaller). bf16 is autocast over
#: float32 weights, which answer here in float32; a model that trained in fp16 answers in that, with 11 bits.
LOGITS_BOUND, HALF_LOGITS_BOUND = 1e-5, 2e-2
#: Relative: another process may choose other kernels, which add in another order.
LOSS_BOUND = {"fp32": 1e-6, "bf16": 2e-3, "fp16": 2e-3}
ELSEWHERE = 10  # times that, where a run on a GPU is checked on a processor
WIDTH = 128  # tokens of a row whose logits are compared: more are hundreds of megabytes, and the loss sees them all


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the trained model is and answered, for the folder to be held against."""

    input_ids: np.ndarray  #: int64 [rows, width], fixed rows
    logits: np.ndarray  #: float32 [rows, width, vocabulary], of the trained model on them
    tied: bool  #: whether its input and output embeddings are one tensor
    loss: float | None  #: validation loss that was recorded of these weights; None where they were not evaluated
    data: Path | None  #: prepared data whose validation rows are evaluated again; None where it is gone
    no_data: str = ""  #: why there is none
    eval_batch: int
    device: str  #: `cpu` or `cuda`, of the fresh process
    precision: str  #: of the recorded loss
    threads: int
    half: bool = False  #: whether the trained model answered in float16
    elsewhere: bool = False  #: whether the loss was recorded on another kind of device


@dataclass(frozen=True, kw_only=True)
class Check:
    """What the reloaded folder answered; without `problems` it is the model that was trained."""

    logits_difference: float | None = None  #: largest, absolute; None where the folder could not be loaded
    largest_logit: float = 0.0  #: of the trained model, absolute
    loss: float | None = None  #: validation loss of the folder, nats per counted token
    recorded_loss: float | None = None
    no_loss: str = ""  #: why there is no loss to compare
    tied: bool | None = None
    tensors: int = 0
    dtype: str = ""
    problems: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for people and for the model card."""
        if self.logits_difference is None:
            return "CHECK FAILED: " + "; ".join(self.problems)
        verdict = "reloaded and checked" if not self.problems else "CHECK FAILED: " + "; ".join(self.problems)
        scale = f" (the largest is {self.largest_logit:.1f})" if self.logits_difference > LOGITS_BOUND else ""
        return (
            f"{verdict}: logits differ by at most {self.logits_difference:.1e}{scale}, {self._losses()}, {self.dtype}"
        )

    def _losses(self) -> str:
        if self.loss is None:
            return f"validation loss not evaluated again ({self.no_loss})"
        recorded = "" if self.recorded_loss is None else f"recorded {self.recorded_loss:.6f}"
        return f"validation loss {self.loss:.6f} ({recorded or self.no_loss})"


def fixed_rows(data: Prepared) -> np.ndarray:
    """int64 [1 or 2, width up to WIDTH]: the beginnings of the longest validation rows, as they are fed."""
    return next(eval_batches(data.val, 2, 0, 1, 0)).input_ids[:, :WIDTH]


def check_logits(module: Any, ids: np.ndarray, device: torch.device) -> np.ndarray:
    """Float32 logits [rows, width, vocabulary] of a model on fixed rows; all ranks must call under ZeRO-3."""
    was_training = module.training
    module.eval()
    with torch.no_grad():
        logits = module(input_ids=torch.from_numpy(ids).to(device), use_cache=False).logits.float().cpu().numpy()
    module.train(was_training)
    return logits


def check_folder(folder: Path, expected: Expected) -> Check:
    """Load the folder in a fresh process (`trainer.export.verify_worker`) and judge its answers; never raises for a bad folder."""
    with tempfile.TemporaryDirectory() as scratch:
        handed, job = Path(scratch) / "logits.npz", Path(scratch) / "job.json"
        np.savez(handed, input_ids=expected.input_ids, logits=expected.logits)
        job.write_text(json.dumps({
            "folder": str(folder), "logits": str(handed), "data": str(expected.data or ""),
            "eval_batch": expected.eval_batch, "device": expected.device, "precision": expected.precision,
            "threads": expected.threads,
        }))  # fmt: skip
        done = _fresh_process(job)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        return Check(problems=(f"it could not be loaded again (exit code {done.returncode}): {lines[-1][:300]}",))
    return judge(json.loads(done.stdout.strip().splitlines()[-1]), expected)


def _fresh_process(job: Path) -> "subprocess.CompletedProcess[str]":
    """Run the verification; it ends with us, because it reads from a pipe of which we hold the other end."""
    ours, its = os.pipe()[::-1]
    try:
        return subprocess.run(
            [sys.executable, "-m", "trainer.export.verify_worker", str(job)],
            stdin=its, capture_output=True, text=True, env=_plain_environment(),
        )  # fmt: skip
    finally:
        os.close(its)
        os.close(ours)


def _plain_environment() -> dict[str, str]:
    """The environment without what a launcher set: the fresh process is nobody's rank."""
    launcher = (
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "MASTER_ADDR",
        "MASTER_PORT",
    )  # fmt: skip
    root = str(Path(__file__).parent.parent.parent)
    kept = {name: value for name, value in os.environ.items() if name not in launcher and not name.startswith("WANDB_")}
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH", "")])),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",  # a base of the hub is in its local cache: this process's parent has just used it
    }


def judge(answer: Mapping[str, Any], expected: Expected) -> Check:
    """Hold the answers of `trainer.export.verify_worker` against the trained model."""
    no_loss = expected.no_data if expected.data is None else "" if expected.loss is not None else "none was recorded"
    return Check(
        logits_difference=answer["logits_difference"],
        largest_logit=float(np.abs(expected.logits).max()),
        loss=answer["loss"],
        recorded_loss=expected.loss,
        no_loss=no_loss,
        tied=answer["tied"],
        tensors=answer["tensors"],
        dtype=answer["dtype"],
        problems=tuple(_problems(answer, expected)),
    )


def _problems(answer: Mapping[str, Any], expected: Expected) -> Iterator[str]:
    """What is wrong with the folder, each a half sentence; the first ones explain the later ones."""
    if not answer["tensors"]:
        yield "it holds no tensors"
    if answer["empty"]:
        yield f"{answer['empty'][0]} is empty"
    if answer["adapters"] and not answer["adapters_moved"]:
        yield "every adapter's B is zero: nothing was learnt"
    said = answer["said_dtype"]  # an adapter's config says nothing
    if answer["stored_dtypes"] != ["F32"] or answer["dtype"] != "float32" or said not in (None, "float32"):
        yield f"stored as {', '.join(answer['stored_dtypes'])}, its config says {said}, expected float32"
    if answer["tied"] != expected.tied:
        yield f"input and output embeddings are {'no longer' if expected.tied else 'now'} tied"
    if expected.tied and answer["embedding_copies"] > 1:
        yield f"the tied embedding is stored {answer['embedding_copies']} times"
    bound = (HALF_LOGITS_BOUND if expected.half else LOGITS_BOUND) * max(1.0, float(np.abs(expected.logits).max()))
    if not answer["logits_difference"] <= bound:
        yield f"logits differ by {answer['logits_difference']:.1e}, more than {bound:.1e}"
    if expected.loss is not None and answer["loss"] is not None:
        bound = LOSS_BOUND[expected.precision] * expected.loss * (ELSEWHERE if expected.elsewhere else 1)
        if not abs(answer["loss"] - expected.loss) <= bound:
            yield f"validation loss {answer['loss']:.6f}, recorded {expected.loss:.6f}"
