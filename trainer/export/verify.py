"""An exported folder is loaded as its user would, by plain transformers or peft in a process that has trained nothing,
and its answers are compared with the trained model's."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from trainer.config.choices import ExportDtype
from trainer.config.errors import first_line
from trainer.data.dataset import PreparedDataset, TokenDataset
from trainer.data.sampler import eval_batches, eval_order
from trainer.model import quantization
from trainer.model.build import get_max_positions
from trainer.model.lora import QUANTIZATION_FILE
from trainer.model.model_files import FLOATS
from trainer.training.checkpoint import Checkpoint

#: {dtype: (its name in torch and config.json, its name in a safetensors file)}
STORED_DTYPES = {"fp32": ("float32", "F32"), "bf16": ("bfloat16", "BF16"), "fp16": ("float16", "F16")}
#: Largest difference of the logits, as a share of the largest logit (of 1 where that is smaller).
LOGITS_BOUND = 1e-5
#: Relative: another process may choose other kernels, which add in another order.
LOSS_BOUND = {"fp32": 1e-6, "bf16": 2e-3, "fp16": 2e-3}
CROSS_DEVICE_FACTOR = 10  # times that, where the loss was recorded on another kind of device
#: Of a row, whose logits are compared: more are hundreds of megabytes, and the loss sees them all.
MAX_COMPARED_TOKENS = 128
NUM_RANDOM_TOKENS = 64  # of a row, where the run's data are gone


@dataclass(frozen=True, kw_only=True)
class VerificationResult:
    """What the reloaded folder answered; without `problems` it is the model that was trained. `summary`: one line for
    people; `loss`: its validation loss, nats per target token; `is_tied`: its input and output embeddings are one."""

    summary: str = ""
    problems: tuple[str, ...] = ()
    loss: float | None = None
    is_tied: bool | None = None


def fixed_input_ids(data: PreparedDataset | None, config: Any = None) -> np.ndarray:
    """int64 [1 or 2, width up to MAX_COMPARED_TOKENS]: the beginnings of the longest validation rows; without data
    made-up token ids of the model's `config`."""
    if data is not None:
        return next(eval_batches(data.val, 2, 0, 1)).input_ids[:, :MAX_COMPARED_TOKENS]
    width = min(NUM_RANDOM_TOKENS, get_max_positions(config) or NUM_RANDOM_TOKENS)
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, width))


@torch.no_grad()
def compute_logits(module: Any, input_ids: np.ndarray, device: torch.device) -> np.ndarray:
    """Float32 logits [rows, width, vocabulary] of a model, in evaluation mode, on fixed rows."""
    return module.eval()(input_ids=torch.from_numpy(input_ids).to(device), use_cache=False).logits.float().cpu().numpy()


def compare_logits(logits: np.ndarray, expected: np.ndarray) -> tuple[float, str]:
    """(largest absolute difference, what is wrong with it)."""
    difference = float(np.abs(logits - expected).max())
    bound = LOGITS_BOUND * max(1.0, float(np.abs(expected).max()))
    return difference, "" if difference <= bound else f"logits differ by {difference:.1e}, more than {bound:.1e}"


def verify_folder(
    folder: Path,
    source: Checkpoint,
    *,
    input_ids: np.ndarray,
    logits: np.ndarray,
    is_tied: bool,
    device: torch.device,
    base_path: str | None = None,
    dtype: ExportDtype = "fp32",
    val: TokenDataset | None = None,
    eval_batch: int = 1,
    loss_missing_reason: str = "",
    loss_changes: Sequence[str] = (),
) -> VerificationResult:
    """Load the folder and judge its answers, and its loss by that of the checkpoint; never raises for a bad folder.

    `logits`: float32 [rows, width, vocabulary] of the trained model on `input_ids`; `base_path`: where the base of an
    adapter is; `dtype`: in which the weights must be stored; `val`: rows to evaluate, None where they are gone, for
    `loss_missing_reason`; `loss_changes`: what the export did to the weights, so that the losses may differ.
    """
    recorded_loss, precision, expected = source.val_loss, source.metadata["precision"], STORED_DTYPES[dtype]
    try:
        model = load_folder(folder, base_path, device)
        embedding = model.get_input_embeddings().weight
        is_tied_now = embedding is model.get_output_embeddings().weight
        difference, problem = compare_logits(compute_logits(model, input_ids, device), logits)
        loss = None
        if val is not None:
            row_nll = compute_row_losses(model, val, eval_batch, precision, device)
            loss = math.fsum(row_nll) / int(val.num_target_tokens.sum())
        stored: dict[str, str] = {}  # {name of a tensor: its type}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                stored |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # no mapping
        config = folder / "config.json"  # an adapter's config names no dtype
        config_dtype = json.loads(config.read_text(encoding="utf-8")).get("dtype") if config.exists() else expected[0]
        tied_names = {n for n, p in model.named_parameters(remove_duplicate=False) if is_tied and p is embedding}
    except Exception as error:  # as many kinds as there are ways to damage a folder
        problem = f"it could not be loaded again: {first_line(error)}"
        return VerificationResult(summary=f"CHECK FAILED: {problem}", problems=(problem,))
    problems = [problem] if problem else []
    dtypes = ", ".join(sorted({type for type in stored.values() if type in FLOATS}))  # indices are none
    if (config_dtype, dtypes) != expected:
        problems.append(f"stored as {dtypes}, its config says {config_dtype}, expected {expected[0]}")
    if (num_copies := len(tied_names & stored.keys())) > 1:
        problems.append(f"the tied embedding is stored {num_copies} times")
    if is_tied_now != is_tied:
        problems.append(f"input and output embeddings are {'no longer' if is_tied else 'now'} tied")
    change = "" if recorded_loss is not None else " (none was recorded)"
    if loss is not None and recorded_loss is not None:
        change = f" (recorded {recorded_loss:.6f})"
        bound = LOSS_BOUND[precision] * (CROSS_DEVICE_FACTOR if source.metadata["device"] != device.type else 1)
        if loss_changes:
            change = f", before {recorded_loss:.6f} ({loss - recorded_loss:+.6f})"
        elif not abs(loss - recorded_loss) <= bound * recorded_loss:
            problems.append(f"validation loss {loss:.6f}, recorded {recorded_loss:.6f}")
    losses = f"validation loss not evaluated again ({loss_missing_reason})"
    losses = losses if loss is None else f"validation loss {loss:.6f}{change}"
    verdict = "reloaded and checked" if not problems else "CHECK FAILED: " + "; ".join(problems)
    scale = f" (the largest is {float(np.abs(logits).max()):.1f})" if difference > LOGITS_BOUND else ""
    changes = f"; {' and '.join(loss_changes)}: " if loss_changes else ", "
    summary = f"{verdict}: logits differ by at most {difference:.1e}{scale}, {expected[0]}{changes}{losses}"
    return VerificationResult(summary=summary, problems=tuple(problems), loss=loss, is_tied=is_tied_now)


def load_folder(folder: Path, base_path: str | None, device: torch.device) -> Any:
    """The model of an exported folder in float32: a plain one, or an adapter on its base, which lies at `base_path`; a
    packed base is packed again by transformers from the untouched weights, on the device it computes on."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    if base_path is not None:
        options["revision"] = PeftConfig.from_pretrained(folder).revision or "main"
    packing = folder / QUANTIZATION_FILE
    if is_packed := packing.exists():
        config = json.loads(packing.read_text(encoding="utf-8"))["quantization_config"]
        options |= {"quantization_config": BitsAndBytesConfig(**config), "device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(base_path or folder, **options)
    if base_path is not None:
        model = PeftModel.from_pretrained(model, folder)
    if is_packed:
        quantization.disable_avx512_repacking(model)
    return model.eval() if is_packed else model.to(device).eval()


@torch.no_grad()
def compute_row_losses(
    model: Any, dataset: TokenDataset, eval_batch: int, precision: str, device: torch.device
) -> np.ndarray:
    """Summed negative log-likelihood of each row in nats, float64 [rows]."""
    row_nll, order = np.zeros(len(dataset)), eval_order(dataset)
    for micro_batch in eval_batches(dataset, eval_batch, 0, 1):
        labels = torch.from_numpy(micro_batch.labels)[:, 1:].flatten().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(torch.from_numpy(micro_batch.input_ids).to(device), use_cache=False).logits[:, :-1]
        # Vocabulary last: over another dimension torch sums the softmax less exactly, 1e-6 of the loss.
        nll = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels, reduction="none")
        rows = order[micro_batch.index : micro_batch.index + eval_batch]
        row_nll[rows] = nll.double().view(len(rows), -1).sum(dim=1).cpu().numpy()
    return row_nll
