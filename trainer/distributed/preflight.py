"""Before the first step of a run on several ranks: whatever must be the same on all of them is compared.

A rank with other data, another base model, other flags or another version would train a mixture without a word.
"""

import contextlib
import hashlib
import json
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.files import open_plain_file
from trainer.distributed.process_group import DistContext

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "numpy", "safetensors", "tokenizers")
MAX_DIFFERENCES_SHOWN = 5
_NAMES_IN_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def refuse_differences(context: DistContext, facts: Mapping[str, Any]) -> None:
    """UserError on every rank, naming both values and where they are, for facts that differ; all ranks must call.

    A fact of None is that of a rank that need not know it.
    """
    facts_of_ranks = context.all_gather_object(dict(facts))
    differences = []
    for name in dict.fromkeys(name for other in facts_of_ranks for name in other):
        known = [(rank, other[name]) for rank, other in enumerate(facts_of_ranks) if other.get(name) is not None]
        if other := next(((rank, value) for rank, value in known if value != known[0][1]), None):
            values = (f"{value} on {context.name_of(rank)}" for rank, value in (known[0], other))
            differences.append(f"{name} is {' and '.join(values)}")
    if differences:
        shown = differences[:MAX_DIFFERENCES_SHOWN]
        if num_more := len(differences) - len(shown):
            shown.append(f"and {num_more} more")
        raise UserError(f"{'; '.join(shown)}: all ranks must have the same")


def program_facts(context: DistContext, settings: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """What is known before anything is read: the program's own files, what is installed, every setting, what was asked
    for beside them (`request`, by flag), and the content of the files that settings name. All ranks must call."""
    facts = {name: package_version(name) or "missing" for name in PACKAGES} | {"Python": platform.python_version()}
    facts["this program"] = context.on_rank_zero(_source_version, per_node=True)
    for group, fields in settings.items():
        if isinstance(fields, Mapping):
            facts |= {f"the setting {group}.{name}": repr(value) for name, value in fields.items()}
        elif isinstance(fields, str):
            facts[f"the setting {group}"] = fields
    facts |= {f"the flag {flag}": repr(value) for flag, value in request.items()}
    named = {"--ds-config": settings.get("engine", {}).get("ds_config")}
    named["--chat-template"] = settings.get("data", {}).get("chat_template")
    for flag, name in named.items():
        with contextlib.suppress(OSError):  # who reads it says why it cannot be read
            if name:
                with open_plain_file(Path(name)) as file:
                    facts[f"the content of {flag} {name}"] = short_digest(file.read())
    return facts


def _source_version() -> str:
    """Of the program's files: a checkout may have been changed since its commit."""
    package_dir, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package_dir.rglob("*.py")):
        digest.update(str(path.relative_to(package_dir)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"version {digest.hexdigest()[:12]}"


def config_digest(config: Any) -> str:
    """Of a model's configuration, as transformers has it: what changes its numbers, not where it lies, nor what every
    configuration has by default, where a later version of transformers has more."""
    content = {key: value for key, value in config.to_diff_dict().items() if key not in _NAMES_IN_CONFIG}
    return short_digest(json.dumps(content, sort_keys=True, default=str).encode())


def short_digest(content: bytes) -> str:
    """Enough of a hash to tell two contents apart."""
    return hashlib.sha256(content).hexdigest()[:12]


def package_version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def refuse_full_disk(folder: Path, checkpoint_bytes: float) -> None:
    """UserError where the disk of the run folder cannot take a checkpoint."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < checkpoint_bytes:
        raise UserError(
            f"{folder}: {free_bytes / 2**20:,.0f} MiB are free and a checkpoint takes {checkpoint_bytes / 2**20:,.0f}; "
            "name another folder with --output-dir"
        )
