"""Keys, tokens and logins: they belong in the environment; no flag takes one and no message shows one."""

import os
import re
from collections.abc import Mapping

_SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
_MIN_SECRET_LENGTH = 12  # of a variable's value; shorter ones could be a word of any text
#: Tokens by their form: Hugging Face's, GitHub's, W&B's.
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|wandb_v\d_\w{30,})")
_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user:password of a URL
MASK = "***"


def mask_credentials(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with every secret of the environment, every token and every login of a URL as `***`."""
    for name, value in environ.items():
        if len(value) >= _MIN_SECRET_LENGTH and _SECRET_VARIABLE.search(name):
            text = text.replace(value, MASK)
    return _TOKEN.sub(MASK, _LOGIN.sub(MASK, text))
