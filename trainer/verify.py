"""An exported folder, loaded by plain transformers or peft in a process of its own: `python -m trainer.verify JOB.json`.

Shares no model code with the training: what it says of the folder is what a user of the folder will see. Reads a job
(folder, rows, device, precision), prints one JSON object: the largest difference of the logits, and the loss.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.data import eval_batches, load


def main(job_file: str) -> None:
    """Verify the folder that the job names; prints the answer as JSON."""
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    model = load_folder(Path(job["folder"])).to(job["device"]).eval()
    answer: dict[str, Any] = {"tied": tied(model), "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    if job["logits"]:
        kept = np.load(job["logits"])
        with torch.no_grad():
            logits = model(torch.from_numpy(kept["input_ids"]).to(job["device"]), use_cache=False).logits
        answer["logits_difference"] = float(np.abs(logits.float().cpu().numpy() - kept["logits"]).max())
    if job["data"]:
        answer["loss"] = validation_loss(model, job)
    print(json.dumps(answer))


def load_folder(folder: Path) -> Any:
    """The model of an exported folder in float32: an adapter on its base, or a plain one."""
    if (folder / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tied(model: Any) -> bool:
    """Whether input and output embeddings are one tensor."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@torch.no_grad()
def validation_loss(model: Any, job: dict[str, Any]) -> float:
    """Token mean of the loss over the prepared validation rows."""
    rows = load(Path(job["data"])).val
    sums = []
    for micro in eval_batches(rows, job["eval_batch"], 0, 1, 0):
        labels = torch.from_numpy(micro.labels)[:, 1:].to(job["device"])
        with torch.autocast(job["device"], torch.bfloat16, enabled=job["precision"] == "bf16"):
            logits = model(torch.from_numpy(micro.input_ids).to(job["device"]), use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        sums += nll.double().sum(1).tolist()
    return math.fsum(sums) / int(rows.counted().sum())


if __name__ == "__main__":
    main(sys.argv[1])
