"""An exported folder, loaded by plain transformers or peft in a process of its own: `python -m
trainer.export.verify_worker JOB`.

Shares no model code with the training: what it says of the folder is what a user of the folder will see. Reads a job
(folder, logits of the trained model, prepared data, device, precision), prints one JSON object of facts; what they
are worth is judged by `trainer.export.verify`.
"""

import json
import math
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _exit_with_parent() -> None:
    """Nobody writes to our input: it ends when the process that asked has ended, and then nobody wants the answer."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":  # before the imports that take seconds, on a busy machine minutes
    threading.Thread(target=_exit_with_parent, daemon=True).start()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from trainer.data.dataset import load  # noqa: E402
from trainer.data.sampler import eval_batches  # noqa: E402
from trainer.model import quantization  # noqa: E402


def main(job_file: str) -> None:
    """Verify the folder that the job names; prints the answer as JSON."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    print(json.dumps(verify(job)))


def verify(job: Mapping[str, Any]) -> dict[str, Any]:
    """The facts about a job's folder: what is stored in it, and what the model in it answers."""
    folder = Path(job["folder"])
    model = load_folder(folder, job["base"], job["device"]).eval()
    embedding = model.get_input_embeddings().weight
    embedding_names = {name for name, p in model.named_parameters(remove_duplicate=False) if p is embedding}
    answer = inspect_tensors(folder, embedding_names)
    answer["tied"] = embedding is model.get_output_embeddings().weight
    reference = np.load(job["logits"])
    with torch.no_grad():
        logits = model(torch.from_numpy(reference["input_ids"]).to(job["device"]), use_cache=False).logits
    answer["logits_difference"] = float(np.abs(logits.float().cpu().numpy() - reference["logits"]).max())
    answer["loss"] = compute_validation_loss(model, job) if job["data"] else None
    return answer


def load_folder(folder: Path, base: str | None, device: str) -> Any:
    """The model of an exported folder: an adapter on its base in float32 or packed, or a plain one; in float32.

    A packed base is packed again by transformers from the untouched weights, on the device it computes on. `base`:
    where the weights of an adapter's base are, which the folder names without their place.
    """
    from transformers import AutoModelForCausalLM

    if base is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).to(device)
    from peft import PeftConfig, PeftModel

    quantization_file, options = folder / "base_quantization.json", {}
    if quantization_file.exists():
        from transformers import BitsAndBytesConfig

        config = json.loads(quantization_file.read_text(encoding="utf-8"))["quantization_config"]
        options = {"quantization_config": BitsAndBytesConfig(**config), "device_map": {"": device}}
    revision = PeftConfig.from_pretrained(folder).revision
    causal = AutoModelForCausalLM.from_pretrained(
        base, revision=revision or "main", dtype=torch.float32, trust_remote_code=False, **options
    )
    model = PeftModel.from_pretrained(causal.to(device) if not options else causal, folder)
    if options:
        quantization.disable_avx512_repacking(model)
    return model


def inspect_tensors(folder: Path, embedding_names: set[str]) -> dict[str, Any]:
    """Facts about the stored tensors themselves, read one at a time; `embedding_names`: all that the input embedding
    could be stored under."""
    from safetensors import safe_open

    config = folder / "config.json"
    tensor_info: dict[str, Any] = {
        "tensors": 0,
        "empty": [],
        "adapters": 0,
        "adapters_moved": 0,
        "embedding_copies": 0,
        "said_dtype": json.loads(config.read_text(encoding="utf-8")).get("dtype") if config.exists() else None,
    }
    dtypes = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                tensor_slice = file.get_slice(name)
                dtypes.add(tensor_slice.get_dtype())
                tensor_info["tensors"] += 1
                tensor_info["embedding_copies"] += name in embedding_names
                if 0 in tensor_slice.get_shape():
                    tensor_info["empty"].append(name)
                if ".lora_B." in name:
                    tensor_info["adapters"] += 1
                    tensor_info["adapters_moved"] += bool(file.get_tensor(name).any())
    return tensor_info | {"stored_dtypes": sorted(dtypes)}


@torch.no_grad()
def compute_validation_loss(model: Any, job: Mapping[str, Any]) -> float:
    """Token mean of the loss over the prepared validation rows, nats."""
    dataset = load(Path(job["data"])).val
    loss_sums = []
    for micro_batch in eval_batches(dataset, job["eval_batch"], 0, 1):
        labels = torch.from_numpy(micro_batch.labels)[:, 1:].flatten().to(job["device"])
        with torch.autocast(job["device"], torch.bfloat16, enabled=job["precision"] == "bf16"):
            logits = model(torch.from_numpy(micro_batch.input_ids).to(job["device"]), use_cache=False).logits[:, :-1]
        # Vocabulary last: over another dimension torch sums the softmax less exactly, 1e-6 of the loss.
        nll = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels, reduction="none")
        loss_sums.append(nll.double().sum().item())
    return math.fsum(loss_sums) / int(dataset.num_target_tokens().sum())


if __name__ == "__main__":
    main(sys.argv[1])
