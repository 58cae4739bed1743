"""What the kernels of `trainer.model` gain over the plain form on this processor: CPU seconds of one thread.

Both forms of GPT-2 124M's shapes, forward and backward, in alternation; CPU time does not count other work here.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from trainer.config.schema import LoraSettings
from trainer.model.cpu_attention import Dropout, blockwise_attention
from trainer.model.fused_lora import FusedLoRALinear
from trainer.model.lora import add_adapters, find_fusable_layers
from trainer.model.loss import LinearCrossEntropy, _nll_and_grad_inplace, even_chunk_size
from trainer.tools.bench.tables import table_lines

WIDTH, NUM_HEADS, VOCABULARY, RANK = 768, 12, 50_257, 8  # of GPT-2, and of an adapter
ROWS, TOKENS = 2, 256
Form = Callable[[], Tensor]


def measure_kernels(args: argparse.Namespace) -> int:
    """Print Markdown, line by line as it comes: plain over ours, median (least to most) of the rounds; 0."""
    torch.set_num_threads(1)
    for line in table_lines(("kernel", "plain form", "plain / ours"), _measure(args.rounds), num_left=2):
        print(line, flush=True)
    return 0


def _measure(num_rounds: int) -> Iterator[list[str]]:
    for name, plain_name, build in _CASES:
        forms = build()
        rounds = [[_cpu_seconds(form) for form in forms] for _ in range(num_rounds + 1)][1:]  # the first warms up
        ratios = [plain / ours for plain, ours in rounds]
        yield [name, plain_name, f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]


def _cpu_seconds(form: Form) -> float:
    start = time.process_time()
    form().backward()
    return time.process_time() - start


def _heads(num_rows: int, num_tokens: int) -> list[Tensor]:
    """Query, key and value, each [rows, heads, tokens, width of a head]."""
    return [torch.randn(num_rows, NUM_HEADS, num_tokens, WIDTH // NUM_HEADS, requires_grad=True) for _ in range(3)]


def _attention() -> tuple[Form, Form]:
    query, key, value = _heads(ROWS, TOKENS)
    return (
        lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=0.1).sum(),
        lambda: blockwise_attention(query, key, value, (WIDTH // NUM_HEADS) ** -0.5, 0.1).sum(),
    )


def _dropout() -> tuple[Form, Form]:
    x, plain, ours = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True), nn.Dropout(0.1), Dropout(0.1)
    return lambda: plain(x).sum(), lambda: ours(x).sum()


def _causal_attention() -> tuple[Form, Form]:
    query, key, value = _heads(1, 1024)
    mask = torch.ones(1, 1, 1024, 1024, dtype=torch.bool).tril()
    return (
        lambda: functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum(),
        lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True).sum(),
    )


def _fused_lora() -> tuple[Form, Form]:
    causal = GPT2LMHeadModel(GPT2Config(n_layer=1, vocab_size=512, bos_token_id=0, eos_token_id=0))
    (layer,) = find_fusable_layers(add_adapters(causal, LoraSettings(rank=RANK), ["c_attn"]))
    x = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (lambda: layer(x).sum(), lambda: FusedLoRALinear.apply(x, base.weight, base.bias, a, b, 2.0, None).sum())


def _linear_cross_entropy() -> tuple[Form, Form]:
    num_positions = 128
    hidden = torch.randn(num_positions, WIDTH, requires_grad=True)
    weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5)
    targets = torch.arange(num_positions) * 7919 % VOCABULARY
    chunk_size = even_chunk_size(len(targets), 2**27 // (4 * VOCABULARY), is_gpu=False)
    return (
        lambda: functional.cross_entropy(functional.linear(hidden, weight), targets, reduction="sum"),
        lambda: LinearCrossEntropy.apply(hidden, weight, None, targets, chunk_size, _nll_and_grad_inplace, None, None)[
            0
        ],
    )


_CASES: list[tuple[str, str, Callable[[], tuple[Form, Form]]]] = [
    ("cpu_attention: attention, dropout 0.1", "torch's attention", _attention),
    ("cpu_attention: dropout", "nn.Dropout", _dropout),
    ("causal_attention: 1,024 tokens", "the mask that transformers makes", _causal_attention),
    ("fused_lora: c_attn, rank 8", "peft's layer", _fused_lora),
    ("linear_cross_entropy: 128 positions", "all logits, torch's loss", _linear_cross_entropy),
]
