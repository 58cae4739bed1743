"""`launch/judge.py`: models that anybody trained score the same records, are paired, and are judged as runs are.

The first contestant stands where a comparison of runs has full, each other one where it has LoRA; seeds are paired in
the order they were given. What is not known of a run here (its settings, cost and training data) is not asked.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.cli import parse_args
from trainer.config.errors import UserError
from trainer.config.files import expand_user_path, name_data, read_json_object
from trainer.config.settings import DataSettings, Settings
from trainer.data import hf_hub
from trainer.data.hf_hub import ADAPTER_CONFIG_FILE
from trainer.data.prepare import prepare
from trainer.data.tokenizer import ModelSource, find_model
from trainer.export.verify import compute_row_losses
from trainer.model.build import TrainableModel, build_model, get_max_positions, load_config
from trainer.model.lora import QUANTIZATION_FILE
from trainer.report.comparable import SeedGroup
from trainer.report.compare_cli import REFUSED_EXIT_CODE, print_verdict, refuse_foreign_answer
from trainer.report.judge import UNIT, parse_margin
from trainer.report.page import compare, write_report
from trainer.report.run_data import COLUMN_NAMES, RunData
from trainer.report.tables import Table
from trainer.tracking.eval_records import write_evaluation
from trainer.tracking.records import EpochRecord, EvalRecord, StepRecord

DATA_FACTS = ("source", "fingerprint", "val_fingerprint", "split", "tokenizer", "objective", "block_size", "split_by")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
EXPECTED_MODEL = "expected a folder or hub id of a whole model (config.json) or of an adapter (adapter_config.json)"


@dataclasses.dataclass
class Model:
    """One model of a contestant, or the base."""

    contestant: str
    name: str  #: as the user gave it
    seed: int  #: its place among the contestant's models, from 1
    source: ModelSource
    path: str  #: what is loaded: of an adapter its folder
    note: str = ""  #: what its answer must be read with
    data: Any = None  #: the records by its tokenizer, else the base's
    records: Any = None  #: a frame: what is known of each record, and its `nll` in nats


def judge(args: argparse.Namespace) -> int:
    """Score, compare, write and print; the exit code. UserError on a mistake, before any model is loaded."""
    margin = parse_margin(args.margin)
    files = refuse_foreign_answer(args.output_dir)
    values = {"mode": "full", "model": locate(args.base), "data": args.data, "global_batch": 1}
    values |= {field.name: value for field in dataclasses.fields(DataSettings) if (value := vars(args).get(field.name))}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    settings = parse_args([*flags, "--allow-leakage"]).settings
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, val_data=(settings.data.data,)))
    with tempfile.TemporaryDirectory(prefix="judge-") as folder:
        try:
            models = find_models(args, Path(folder))
            in_bytes = prepare_records(models, settings)
            if in_bytes and margin.kind == "nats":
                problem = "the models have different tokenizers, so only bits per byte can be compared"
                raise UserError(f"--margin {args.margin}: {problem}; expected 2% or 0.005bpb")
            base_facts = score(models, settings, args.eval_batch)
        except UserError as error:  # of the loaders, which call every model --model and read the file for training
            texts = (text.replace("--model ", "").replace(" training records", " records") for text in error.args)
            raise UserError(*texts) from None
        groups = make_groups(models, base_facts, in_bytes, Path(folder))
        runs = [run for group in groups for run in group.runs]
        rows = [
            [model.contestant, Path(model.name).name, "adapter" if model.source.adapter else "whole", f"{loss:.4f}"]
            for model, loss in zip(models[1:], (run.evals["loss"][1] for run in runs), strict=True)
        ]
        headings = ["name", "model", "kind", f"loss ({'bits per byte' if in_bytes else UNIT})"]
        table = Table(title="The models", headings=headings, rows=rows)
        comparison = compare(runs, with_reference=False, margin=margin, groups=groups, models=table)
        if (primary := comparison.verdict.primary) and primary.no_losses:  # of one record
            raise UserError(f"--data {args.data}: {primary.no_losses}; expected two or more")
    write_report(comparison, args.output_dir)
    print_verdict(comparison.verdict, [])
    print(f"report: {files[0]}")
    return REFUSED_EXIT_CODE if comparison.verdict.answer == "not ranked" else 0


def find_models(args: argparse.Namespace, folder: Path) -> list[Model]:
    """The base, and the models of each contestant in order; `folder`: for adapters whose base is not where they say."""
    base = Model("base", args.base, 1, find_model(locate(args.base)), locate(args.base))
    if not has_files(base.source):
        raise UserError(f"--base {args.base}: not here in full precision, nor on the Hub; {EXPECTED_MODEL}")
    if len(args.models) < 2:
        raise UserError(f"{args.models[0]}: is one model; expected two or more to judge")
    models = [base]
    for text in args.models:
        match = None if Path(text).exists() else re.fullmatch(r"([^=/]+)=([^,]+(?:,[^,]+)*)", text)
        names = match[2].split(",") if match else [text]
        for seed, name in enumerate(names, start=1):
            path = locate(name)
            source = find_model(path)
            contestant = match[1] if match else Path(name).absolute().name if Path(name).exists() else name
            model = Model(contestant, name, seed, source, path)
            if not has_files(source):
                if source.adapter is None:
                    raise UserError(f"{name}: not here in full precision, nor on the Hub; {EXPECTED_MODEL}")
                moved = folder / str(len(models))  # the adapter, naming --base as its base
                moved.mkdir()
                for file in source.adapter.iterdir():
                    if file.is_file() and file.name != ADAPTER_CONFIG_FILE:
                        (moved / file.name).symlink_to(file.absolute())
                config = source.adapter / ADAPTER_CONFIG_FILE
                content = read_json_object(config, f"{source.adapter}: {ADAPTER_CONFIG_FILE}")
                content |= {"base_model_name_or_path": base.source.path, "revision": base.source.revision}
                (moved / ADAPTER_CONFIG_FILE).write_text(json.dumps(content))
                model.path, model.source = str(moved), find_model(str(moved))
                named = f"{contestant} names the base {name_data(source.name)}"
                model.note = f"{named}, which is not here in full precision: --base was used"
            models.append(model)
    namesakes = Counter(model.contestant for model in models if model.seed == 1)
    if (most := namesakes.most_common(1)[0])[1] > 1:
        raise UserError(f"{most[0]}: {most[1]} models have this name; expected NAME=MODEL for each")
    return models


def locate(name: str) -> str:
    """The folder or hub id behind a name; of a run folder its exported model."""
    try:
        folder = Path(expand_user_path(name))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    folder = folder / "model" if (folder / "run.json").is_file() else folder
    if folder.is_dir() and not any((folder / file).exists() for file in ("config.json", ADAPTER_CONFIG_FILE)):
        raise UserError(f"{name}: holds no model; {EXPECTED_MODEL}")
    return str(folder) if folder.exists() else name


def has_files(source: ModelSource) -> bool:
    """Whether a whole model, of an adapter its base, is here or on the Hub, and not packed; downloads it."""
    if not Path(source.path).is_dir() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        with contextlib.suppress(UserError):  # a base that needs a login, or is gone: --base may stand for it
            hf_hub.download_model(source.path, with_weights=True, log=print, revision=source.revision)
    config = hf_hub.find_model_folder(source.path, source.revision) / "config.json"
    return config.exists() and "quantization_config" not in read_json_object(config)


def prepare_records(models: Sequence[Model], settings: Settings) -> bool:
    """Give each model the records as its tokenizer has them; whether these differ."""
    configs = [load_config(dataclasses.replace(settings.model, model=model.path)) for model in models]
    positions = min((n for config in configs if (n := get_max_positions(config))), default=None)
    if positions and settings.data.block_size and settings.data.block_size > positions:
        raise UserError(f"--block-size {settings.data.block_size}: expected at most {positions}, as a model takes them")
    data_settings = settings.data
    while True:
        for model in models:
            files = [Path(model.path) / name for name in TOKENIZER_FILES]
            has_none = files[0].parent.is_dir() and not any(file.exists() for file in files)
            tokenizer = models[0].path if has_none and model.source.adapter is None else model.path
            model.data = prepare(data_settings, model=tokenizer, global_batch=1, max_positions=positions)
        if len({model.data.metadata["val_fingerprint"] for model in models}) == 1:
            return False
        if models[0].data.metadata["objective"] != "blocks":
            return True
        data_settings = dataclasses.replace(data_settings, objective="completion")  # blocks hold other text for each


def score(models: Sequence[Model], settings: Settings, batch: int) -> dict[str, Any]:
    """Give each model the losses of the records, and a note where it is not on this base; the facts of the base."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(path: str) -> TrainableModel:
        adapter = find_model(path).adapter
        quant: Any = None
        if adapter and (adapter / QUANTIZATION_FILE).exists():  # of a run here
            packing = read_json_object(adapter / QUANTIZATION_FILE, QUANTIZATION_FILE)["quantization_config"]
            quant = "int8" if packing.get("load_in_8bit") else packing.get("bnb_4bit_quant_type")
        chosen = dataclasses.replace(settings.model, model=path, quant=quant)
        return build_model(dataclasses.replace(settings, mode="lora" if adapter else "full", model=chosen))

    base_facts: dict[str, Any] = {}
    for model in models:
        loaded, data = load(model.path), model.data
        facts = loaded.metadata
        base_facts = base_facts or facts
        if model.source.adapter and model.source.path != models[0].source.path:
            if load(model.source.path).metadata["fingerprint"] != base_facts["fingerprint"]:
                model.note = f"{model.contestant} is an adapter of another base, {name_data(model.source.name)}"
        elif any(facts[key] != base_facts[key] for key in ("class", "parameters")):
            shape = f"{facts['class']} of {facts['parameters']:,} weights"
            model.note = f"{model.contestant} is of another base, a {shape}"
        vocabulary = loaded.causal.get_input_embeddings().weight.shape[0]
        if (largest := int(data.val.ids.max())) >= vocabulary:
            raise UserError(f"{model.name}: its tokenizer has token {largest}, and its weights are of {vocabulary}")
        nll = compute_row_losses(loaded.module.to(device).eval(), data.val, batch, "fp32", device)
        if num_bad := int((~np.isfinite(nll)).sum()):
            raise UserError(f"{model.name}: the loss of {num_bad:,} of {len(nll):,} records is not finite")
        print(f"{model.contestant} ({model.name}): {len(nll):,} rows scored", flush=True)
        model.records = data.row_info("val").assign(nll=nll).set_index(["id", "occurrence"])
    return base_facts


def make_groups(models: Sequence[Model], base_facts: dict[str, Any], in_bytes: bool, folder: Path) -> list[SeedGroup]:
    """A group of runs for each contestant, each model as a run of one step, on records that all models take whole."""
    base, *contestants = models
    common = functools.reduce(lambda index, model: index.intersection(model.records.index), models, base.records.index)
    if not len(common):
        raise UserError("no record fits every model; raise --block-size")
    rows, notes = base.records.loc[common].drop(columns="nll").reset_index(), [model.note for model in models]
    if num_left_out := len(base.records) - len(common):
        notes.append(f"{num_left_out:,} records that not every model takes whole are left out")
    rows["is_seen"] = False  # the file is its own training data here
    if in_bytes:
        rows["targets"] = rows["bytes"]
    losses = [model.records.loc[common, "nll"].to_numpy() / (np.log(2) if in_bytes else 1) for model in models]
    metadata = {
        "data": {name: base.data.metadata.get(name) for name in DATA_FACTS},
        "model": {"name": base.source.name, "fingerprint": base_facts["fingerprint"]},
        "judged": {"unit": "bits per byte" if in_bytes else UNIT, "notes": [*dict.fromkeys(filter(None, notes))]},
    }
    runs: dict[str, list[RunData]] = {}
    for number, (model, nll) in enumerate(zip(contestants, losses[1:], strict=True)):
        place, by_step = folder / f"records-{number}", {0: losses[0], 1: nll}
        for step, values in by_step.items():
            write_evaluation(place, rows, step=step, split="test", nll=values)
        columns = {name: np.full(2, np.nan) for name in COLUMN_NAMES[EvalRecord]}
        means = [values.sum() / rows["targets"].sum() for values in by_step.values()]
        run = RunData(
            source=model.name,
            run_id=name_data(model.name),
            name=f"{model.contestant} ({model.seed})",
            mode="full" if model.contestant == contestants[0].contestant else "lora",
            metadata=metadata | {"settings": {"train": {"seed": model.seed}}},
            steps={name: np.empty(0) for name in COLUMN_NAMES[StepRecord]},
            evals=columns | {"step": np.array([0.0, 1.0]), "loss": np.array(means)},
            epochs={name: np.empty(0) for name in COLUMN_NAMES[EpochRecord]},
            eval_records_path=place,
        )
        runs.setdefault(model.contestant, []).append(run)
    return [SeedGroup(name, members[0].mode, tuple(members)) for name, members in runs.items()]
