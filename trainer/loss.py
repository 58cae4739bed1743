"""Summed negative log-likelihood, without a full logits tensor where it would be large.

Sums and counts are kept apart everywhere and divided once, by the number of counted tokens of the *global* batch:
so the loss does not depend on how rows are spread over micro-batches and ranks.
"""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

IGNORED = -100  # label of a position that is not counted, as in Hugging Face's models
LARGEST_LOGITS = 2**27  # bytes of float32 logits at one time; above it they are made and dropped in pieces


class TokenLoss(nn.Module):
    """A causal LM as a function from rows to the summed negative log-likelihood of each row, in float32."""

    def __init__(self, causal: PreTrainedModel, autocast: torch.dtype | None):
        super().__init__()
        self.causal = causal
        self.autocast = autocast

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Ids and labels [rows, width] (labels not shifted, -100 where not counted) -> [rows] sums in nats.

        No attention mask: rows are padded on the right only, where a causal model cannot look; and with a mask
        or a cache the packed rows of newer models would silently attend otherwise.
        """
        # Inside forward, because DeepSpeed's engine switches off an autocast that stands around it.
        precision = torch.autocast(input_ids.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with precision:
            targets = labels[:, 1:].reshape(-1)
            if self.causal.config.model_type != "gpt2":  # others may scale or cap their logits: ask the model itself
                logits = self.causal(input_ids=input_ids, use_cache=False).logits[:, :-1]
                return _nll(logits.flatten(0, 1), targets).view(len(labels), -1).sum(1)
            hidden = self.causal.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
            return self._head_nll(hidden.flatten(0, 1), targets).view(len(labels), -1).sum(1)

    def _head_nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Hidden states [positions, d], targets [positions] -> nll [positions]; 0 where not counted."""
        piece = LARGEST_LOGITS // (4 * self.causal.config.vocab_size)
        if len(targets) <= piece:
            return self._piece_nll(hidden, targets)
        return torch.cat(
            [
                checkpoint(self._piece_nll, h, t, use_reentrant=False)
                if torch.is_grad_enabled()
                else self._piece_nll(h, t)
                for h, t in zip(hidden.split(piece), targets.split(piece), strict=True)
            ]
        )

    def _piece_nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return _nll(self.causal.get_output_embeddings()(hidden), targets)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
