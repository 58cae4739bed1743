"""A Hugging Face folder that was reloaded and checked, with its model card."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer import reference
from trainer.data import load_tokenizer
from trainer.errors import RunFailed
from trainer.model import Model, location
from trainer.records import EpochRecord, EvalRecord, Record, perplexity

LOGITS_BOUND = 1e-5  # float32, largest absolute difference between the trained and the reloaded model
LOSS_BOUND = {"fp32": 1e-6, "bf16": 2e-3, "fp16": 2e-3}  # relative: kernels may differ between two processes


@dataclass(frozen=True, kw_only=True)
class Check:
    """What the reloaded folder answered."""

    logits_difference: float | None  #: None where no logits were handed over
    loss: float
    recorded_loss: float
    tied: bool
    dtype: str
    problems: tuple[str, ...]

    def line(self) -> str:
        """One line for people and for the model card."""
        logits = "" if self.logits_difference is None else f"logits differ by at most {self.logits_difference:.1e}, "
        verdict = "reloaded and checked" if not self.problems else "CHECK FAILED: " + "; ".join(self.problems)
        return f"{verdict}: {logits}validation loss {self.loss:.6f} (recorded {self.recorded_loss:.6f}), {self.dtype}"


def save_folder(folder: Path, model: Model, weights: Iterable[tuple[str, Tensor]], *, base: str, tokenizer: str | None) -> None:
    """Write weights and tokenizer into `folder`, whole or not at all; `weights` in the names of `model.module`.

    full: a folder that AutoModelForCausalLM loads, tied weights stored once; lora: an adapter that peft loads onto
    `base` (a hub id or folder). `tokenizer`: the model it comes from, None where the data were token ids. RunFailed where it cannot be written; an earlier export then stays.
    """
    named = dict(weights)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if model.is_adapter:
            for config in model.module.peft_config.values():
                config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
        model.module.save_pretrained(temporary, state_dict=named)
        if tokenizer is not None:
            load_tokenizer(tokenizer).save_pretrained(temporary)
        replace_folder(temporary, folder)
    except OSError as problem:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFailed(f"{folder} not written: {problem.strerror or problem}") from problem


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in the place of an older one."""
    older = final.parent / f".{final.name}.old.tmp"
    shutil.rmtree(older, ignore_errors=True)
    if final.exists():
        final.rename(older)
    temporary.rename(final)
    shutil.rmtree(older, ignore_errors=True)


def check_folder(
    folder: Path, *, data: Path, recorded_loss: float, eval_batch: int, device: str, precision: str, threads: int,
    logits: tuple[np.ndarray, np.ndarray] | None = None, vocabulary_tied: bool = True,
) -> Check:  # fmt: skip
    """Load the folder in a fresh process with plain transformers or peft and hold it against the trained model.

    `logits`: (input_ids [rows, width], float32 logits [rows, width, vocabulary]) of the trained model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        handed = ""
        if logits is not None:
            handed = str(Path(scratch) / "logits.npz")
            np.savez(handed, input_ids=logits[0], logits=logits[1])
        job = Path(scratch) / "job.json"
        job.write_text(json.dumps({
            "folder": str(folder), "data": str(data), "eval_batch": eval_batch, "device": device,
            "precision": precision, "threads": threads, "logits": handed,
        }))  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "trainer.verify", str(job)], capture_output=True, text=True, env=_plain_environment()
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RunFailed(f"{folder} could not be loaded again (exit code {done.returncode}): {lines[-1]}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    problems = list(_weight_problems(folder))
    difference = answer.get("logits_difference")
    if difference is not None and not difference <= LOGITS_BOUND:
        problems.append(f"logits differ by {difference:.1e}, more than {LOGITS_BOUND:.0e}")
    if not abs(answer["loss"] - recorded_loss) <= LOSS_BOUND[precision] * recorded_loss:
        problems.append(f"validation loss {answer['loss']:.6f}, recorded {recorded_loss:.6f}")
    if vocabulary_tied and not answer["tied"]:
        problems.append("input and output embeddings are no longer tied")
    return Check(
        logits_difference=difference, loss=answer["loss"], recorded_loss=recorded_loss, tied=answer["tied"],
        dtype=answer["dtype"], problems=tuple(problems),
    )  # fmt: skip


def _weight_problems(folder: Path) -> Iterable[str]:
    """What is wrong with the stored tensors themselves: an empty adapter, a B that never moved, a doubled embedding."""
    from safetensors import safe_open

    adapter = folder / "adapter_model.safetensors"
    for path in [adapter] if adapter.exists() else sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if not keys:
                yield f"{path.name} holds no tensors"
            empty = [key for key in keys if 0 in file.get_slice(key).get_shape()]
            if empty:
                yield f"{empty[0]} is empty"
            b = [key for key in keys if ".lora_B." in key]
            if b and not any(bool(file.get_tensor(key).any()) for key in b):
                yield "every adapter's B is zero: nothing was learnt"
            if "lm_head.weight" in keys and "transformer.wte.weight" in keys:
                yield "the tied embedding is stored twice"


def _plain_environment() -> dict[str, str]:
    """The environment without what a launcher set: the fresh process is nobody's rank."""
    ours = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "CROSS_RANK",
    )
    root = str(Path(__file__).parent.parent)
    kept = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("WANDB_")}
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH", "")])),
        "TRANSFORMERS_VERBOSITY": "error",
    }


def write_card(folder: Path, run: Mapping[str, Any], records: Iterable[Record], check: Check) -> None:
    """README.md of the folder, in the Hub's form: settings, training table, what it was compared with."""
    (folder / "README.md").write_text(card_text(run, list(records), check))


def card_text(run: Mapping[str, Any], records: list[Record], check: Check) -> str:
    """The model card's Markdown."""
    settings, resolved, data, model = run["settings"], run["resolved"], run["data"], run["model"]
    train = settings["train"]
    base = model["name"]
    head = ["---", "library_name: peft" if model["lora_targets"] else "library_name: transformers"]
    if base != "demo-base" and not Path(base).exists():
        head.append(f"base_model: {base}")
    head += ["pipeline_tag: text-generation", f"tags: [{', '.join(['gpt2', run['mode'], 'deepspeed'])}]", "---", ""]
    what = "every weight" if run["mode"] == "full" else (
        f"LoRA adapters, rank {settings['lora']['rank']}, alpha {settings['lora']['alpha']:g}, on {', '.join(model['lora_targets'])}"
    )  # fmt: skip
    lines = [
        f"# {run['name']}", "",
        f"`{base}` fine-tuned on `{data['source']}` ({what}: {model['trainable']:,} of {model['parameters']:,} parameters, "
        f"{100 * model['share']:.2f}%).", "",
        f"Exported weights: {check.line()}.", "",
        "## Training", "",
        "| setting | value |", "|---|---|",
        *(f"| {name} | {value} |" for name, value in (
            ("learning rate", f"{train['lr']:g}, linear to 0, {train['warmup_steps']} warm-up steps"),
            ("optimizer", f"AdamW, betas ({train['beta1']}, {train['beta2']}), epsilon {train['epsilon']:g}, weight decay {train['weight_decay']:g}"),
            ("gradient clipping", f"{train['clip']:g}"),
            ("batch", f"{resolved['micro_batch']} micro-batch x {resolved['accumulation']} accumulation x {resolved['ranks']} ranks = {resolved['global_batch']}"),
            ("epochs", f"{train['epochs']:g} ({resolved['total_steps']:,} steps)"),
            ("seed", train["seed"]),
            ("precision", resolved["precision"]),
            ("ZeRO file", resolved["ds_config"]),
            ("rows", f"{settings['data']['objective']} of {settings['data']['block_size']} tokens, {data['train']['examples']:,} for training, {data['val']['examples']:,} for validation"),
            ("versions", ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers", "deepspeed", "peft"))),
        )), "",
        "| epoch | step | train loss | validation loss | perplexity |", "|--:|--:|--:|--:|--:|",
        *_table(records), "",
        f"Compared with the card `{reference.NAME}` (validation loss "
        + ", ".join(f"{row.val_loss}" for row in reference.CURVE) + "): not comparable, for these reasons: "
        + "; ".join(run["not_comparable_with_card"]) + ".", "",
    ]  # fmt: skip
    return "\n".join(head + lines)


def _table(records: list[Record]) -> list[str]:
    means = {r.step: r.train_loss for r in records if isinstance(r, EpochRecord)}
    return [
        f"| {r.epoch:g} | {r.step:,} | {means[r.step]:.4f} | {r.loss:.4f} | {perplexity(r.loss):.3f} |"
        if r.step in means
        else f"| {r.epoch:g} | {r.step:,} | | {r.loss:.4f} | {perplexity(r.loss):.3f} |"
        for r in records
        if isinstance(r, EvalRecord) and (r.step in means or r.step == 0)
    ]


def base_of(model: Model, run_folder: Path) -> str:
    """Where an adapter finds its base: the hub id or folder, or the copy of random weights that the run kept."""
    kept = run_folder / "base"
    return str(kept) if kept.is_dir() else location(model.facts["name"])


def check_logits(module: Any, ids: np.ndarray, device: torch.device) -> np.ndarray:
    """Float32 logits [rows, width, vocabulary] of the trained model on fixed rows; all ranks must call under ZeRO-3."""
    was_training = module.training
    module.eval()
    with torch.no_grad():
        logits = module(input_ids=torch.from_numpy(ids).to(device), use_cache=False).logits.float().cpu().numpy()
    module.train(was_training)
    return logits
