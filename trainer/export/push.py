"""A checked folder on the hub: `launch/export.py --push NAMESPACE/NAME`. The token is huggingface_hub's business: it
reads HF_TOKEN or what `hf auth login` kept, and nothing here prints or writes it."""

import re
from pathlib import Path

from trainer.config.errors import TrainingError, UserError, first_line


def check_push(repo_id: str) -> None:
    """UserError where a push cannot work, found before anything slow: the name, the login, the hub."""
    import huggingface_hub

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id, re.ASCII) or len(repo_id) > 96:
        raise UserError(f"--push {repo_id}: expected NAMESPACE/NAME of letters, digits and . _ -")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"--push {repo_id}: HF_HUB_OFFLINE is set; unset it to reach the hub")
    if huggingface_hub.get_token() is None:
        raise UserError(f"--push {repo_id}: not logged in; expected HF_TOKEN, or `hf auth login` before")
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # of the hub, of httpx, of the network below it
        raise UserError(f"--push {repo_id}: the hub refuses the login ({_reason(error)})") from None


def push_folder(folder: Path, repo_id: str, *, is_private: bool) -> str:
    """Upload a folder, in one commit, to a repository that is made where there is none; returns its address.

    `is_private` counts for a new repository only. TrainingError where the hub does not take it; the folder stays.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(repo_id, private=is_private or None, exist_ok=True))
        api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload of a checked export")
    except Exception as error:
        raise TrainingError(f"--push {repo_id}: {_reason(error)}; the checked folder is {folder}") from None
    return address


def _reason(error: Exception) -> str:
    """Kind and first line of an error or of its cause."""
    error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return f"{type(error).__name__}: {first_line(error)}"
