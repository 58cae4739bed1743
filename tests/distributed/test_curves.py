"""Two short loss curves at full precision, committed: a refactor must leave them unchanged.

They were made by `PYTHONPATH=.:tests python tests/distributed/test_curves.py`, which writes curves/*.json anew: run it
only when the numbers are meant to change, and say in the commit why. Weights and data come from integer random
streams, so every machine starts from the same bits.

Not bitwise: another processor, BLAS or torch sums products in another order, 2^-24 = 6e-8 relative an operation in
float32, and ten steps of AdamW carry that along. Between AVX2 and no vector instructions beyond SSE 4 (set with
ATEN_CPU_CAPABILITY, MKL_ENABLE_INSTRUCTIONS and ONEDNN_MAX_CPU_ISA) the losses differed by 2e-7, the gradient norms
by 1.4e-6; on one machine they are bitwise those committed.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.matrix import launch_jobs, make_job, read_job_result
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv, write_records

CURVES = Path(__file__).parent / "curves"
RELATIVE_TOLERANCE = {"loss": 1e-6, "train_loss": 1e-6, "grad_norm": 1e-5}  # relative
RUNS = {
    "full": "--mode full --objective blocks --block-size 16 --lr 1e-3 --max-grad-norm 1.0",
    "lora": "--mode lora --objective completion --block-size 32 --lr 1e-2 --max-grad-norm 1.0 --weight-decay 0.1",
}
COMMON_FLAGS = (
    "--global-batch 4 --micro-batch 2 --eval-batch 4 --max-steps 10 --eval-every 5 --save-every never --seed 7"
)


def make_model(folder: Path) -> str:
    """The tiny model with weights from numpy's raw Philox stream, which never changes."""
    from safetensors.torch import load_file, save_file

    make_tiny_gpt2(folder, dropout=0.0)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    stream = np.random.Philox(np.random.SeedSequence([7]))
    for _, tensor in sorted(tensors.items()):
        if tensor.ndim == 2:
            bits = np.asarray(stream.random_raw(tensor.numel()), dtype=np.uint64) >> np.uint64(40)
            uniform = bits.astype(np.float32) / np.float32(2**24) - np.float32(0.5)  # exact: 24 bits
            tensor.copy_(type(tensor)(uniform.reshape(tensor.shape)))
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


def compute_curves(out: Path) -> dict[str, dict[str, Any]]:
    """{name: {flags, rows}} of both runs, one rank."""
    model = make_model(out / "base")
    train_file = write_records(out / "train.jsonl", num_records=14, seed=5)
    val_file = write_records(out / "val.jsonl", num_records=5, seed=6)
    jobs, results = [], {}
    for name, flags in RUNS.items():
        argv = tiny_argv(model, (train_file, val_file), f"{flags} {COMMON_FLAGS}")
        jobs.append(make_job(out, name, argv))
    launch_jobs(1, jobs)
    columns = ("kind", "step", "epoch", "samples", "tokens", "loss", "lr", "grad_norm", "eval_tokens", "train_loss")
    for name, flags in RUNS.items():
        rows = [row for row in read_job_result(out, name)[0] if row["kind"] != "event"]
        records = [{key: row[key] for key in columns if key in row} for row in rows]
        results[name] = {"flags": f"{flags} {COMMON_FLAGS}", "rows": records}
    return results


@pytest.fixture(scope="module")
def computed_curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return compute_curves(tmp_path_factory.mktemp("curves"))


@pytest.mark.parametrize("name", RUNS)
def test_the_committed_loss_curves_are_unchanged(name, computed_curves):
    committed = json.loads((CURVES / f"{name}.json").read_text())
    assert computed_curves[name]["flags"] == committed["flags"], "the curve is of other settings: make it anew"
    worst = dict.fromkeys(RELATIVE_TOLERANCE, 0.0)
    for now, then in zip(computed_curves[name]["rows"], committed["rows"], strict=True):
        assert now.keys() == then.keys()
        for key, value in now.items():
            if key in RELATIVE_TOLERANCE:
                worst[key] = max(worst[key], abs(value / then[key] - 1))
            else:  # places, counts and rates have no rounding of sums in them
                assert value == then[key], (now["kind"], now["step"], key)
    print(f"{name}: largest relative differences {worst}")
    assert all(worst[key] <= RELATIVE_TOLERANCE[key] for key in RELATIVE_TOLERANCE), worst


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name, curve in compute_curves(Path(scratch)).items():
            rows = ",\n  ".join(json.dumps(row) for row in curve["rows"])
            text = f'{{\n "flags": {json.dumps(curve["flags"])},\n "rows": [\n  {rows}\n ]\n}}\n'
            (CURVES / f"{name}.json").write_text(text)
    sys.exit(0)
