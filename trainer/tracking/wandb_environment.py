"""What W&B's variables and files say of a run: its mode, its names, and whether somebody is logged in. Asks nobody."""

import configparser
import contextlib
import netrc
import os
import secrets
import string
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from trainer.config.errors import UserError
from trainer.config.fields import RunId, WandbProject, check_value
from trainer.config.schema import OutputSettings
from trainer.tracking.wandb_keys import run_group

#: Old and new names of the public server.
PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com", "forge.coreweave.com")
DEFAULT_PROJECT = "gpt2-full-vs-lora"
#: W&B's variables that name one run: a program that starts many must not hand them on.
RUN_VARIABLES = ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME")
WANDB_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def wandb_block(output: OutputSettings, source: str, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The `wandb` block of run.json for a new run: flags, then W&B's own variables, then what we choose.

    UserError where a variable holds what is no id or no project.
    """
    random_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    run_id = env.get("WANDB_RUN_ID") or random_id
    project = output.wandb_project or env.get("WANDB_PROJECT") or DEFAULT_PROJECT
    check_value(RunId, "WANDB_RUN_ID", run_id)
    check_value(WandbProject, "WANDB_PROJECT", project)
    return {
        "id": run_id,
        "project": project,
        "group": env.get("WANDB_RUN_GROUP") or run_group(source),
        "mode": wandb_mode(output.wandb, env),
    }


def wandb_mode(flag: str | None, env: Mapping[str, str] = os.environ) -> str:
    """online, offline or disabled: the flag, else WANDB_MODE, else online where logged in, else offline.

    Looks at the environment and at files only, so it asks nobody and needs no wandb. Online on demand of the
    flag without a login is a UserError, as wandb would ask for a key.
    """
    if flag == "online" and not is_logged_in(env):
        raise UserError("--wandb online: not logged in; run `wandb login`, set WANDB_API_KEY, or pass --wandb offline")
    if flag is not None:
        return flag
    if env.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):  # of transformers' Trainer, up to 4
        return "disabled"
    requested_modes = (env.get("WANDB_MODE", ""), _settings_entry("mode", env))
    mode = next((WANDB_MODES[name.lower()] for name in requested_modes if name.lower() in WANDB_MODES), "online")
    return "offline" if mode == "online" and not is_logged_in(env) else mode


def is_logged_in(env: Mapping[str, str] = os.environ) -> bool:
    """Whether wandb would find a key without asking: in the environment or in the netrc file."""
    if env.get("WANDB_API_KEY") or env.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(env.get("WANDB_BASE_URL") or _settings_entry("base_url", env)).netloc
    home = _home(env)
    for path in [Path(env["NETRC"]).expanduser()] if env.get("NETRC") else [home / ".netrc", home / "_netrc"]:
        try:
            entries = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError):
            continue
        return any(entries.hosts.get(name, ("", "", ""))[2] for name in ([host] if host else PUBLIC_HOSTS))
    return False


def _settings_entry(name: str, env: Mapping[str, str]) -> str:
    """An entry of wandb's settings files (`wandb offline` and `wandb login --host` write them), '' without one."""
    config_dir = Path(env.get("WANDB_CONFIG_DIR") or _home(env) / ".config" / "wandb")
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):  # what was read before that counts
        parser.read([config_dir / "settings", Path("wandb") / "settings"])
    return parser.get("default", name, fallback="")


def _home(env: Mapping[str, str]) -> Path:
    return Path(env.get("HOME") or Path.home())
