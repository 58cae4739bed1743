"""Summed negative log-likelihood: in pieces as whole, padding left out, in bf16 close to float32."""

import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from trainer.data.sampler import IGNORED
from trainer.kernels import linear_cross_entropy
from trainer.kernels.linear_cross_entropy import TokenLoss

WIDTH = 20


@pytest.fixture
def causal(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny)


def rows(count: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length, padded on the right, of which the first few tokens do not count."""
    dice = np.random.default_rng(seed)
    ids = torch.from_numpy(dice.integers(1, 97, (count, WIDTH)))
    labels = ids.clone()
    for n in range(count):
        labels[n, :n] = IGNORED
        labels[n, WIDTH - 4 * n :] = IGNORED
    return ids, labels


def by_hand(causal, ids, labels) -> list[float]:
    """The sums of each row from the definition, token by token."""
    sums = []
    for row, wanted in zip(ids, labels, strict=True):
        chances = torch.log_softmax(causal(row[None]).logits[0], -1)
        sums.append(-sum(float(chances[at - 1, row[at]]) for at in range(1, WIDTH) if wanted[at] != IGNORED))
    return sums


def gradients(module: TokenLoss, ids, labels) -> tuple[torch.Tensor, list[torch.Tensor]]:
    module.zero_grad()
    total, sums = module(ids, labels)
    total.backward()
    return sums, [p.grad.clone() for p in module.parameters()]


def test_each_row_sums_its_counted_tokens(causal):
    ids, labels = rows()
    total, sums = TokenLoss(causal, None)(ids, labels)
    assert total.item() == pytest.approx(sums.sum().item(), rel=1e-6)
    assert sums.shape == (3,)
    assert sums.dtype == torch.float32
    assert sums.tolist() == pytest.approx(by_hand(causal, ids, labels), rel=1e-5)


def test_the_sum_is_that_of_hugging_faces_own_loss(causal):
    ids, labels = rows()
    with torch.no_grad():
        theirs = causal(ids, labels=labels).loss * (labels[:, 1:] != IGNORED).sum()
        assert float(TokenLoss(causal, None)(ids, labels)[0]) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("whole_layer", [True, False])
@pytest.mark.parametrize("positions", [1, 7, 19])
def test_pieces_of_any_size_give_the_whole_loss_and_its_gradients(causal, monkeypatch, positions, whole_layer):
    """Also where the output layer is not a plain one (ZeRO-3 divides it), and its logits are made twice."""
    module = TokenLoss(causal, None)
    ids, labels = rows()
    whole, expected = gradients(module, ids, labels)
    calls = []
    honest = torch.log_softmax if whole_layer else functional.cross_entropy
    spy = lambda *a, **k: calls.append(len(a[0])) or honest(*a, **k)  # noqa: E731
    monkeypatch.setattr(
        *(
            (linear_cross_entropy.torch, "log_softmax")
            if whole_layer
            else (linear_cross_entropy.functional, "cross_entropy")
        ),
        spy,
    )
    monkeypatch.setattr(linear_cross_entropy, "LARGEST_LOGITS", positions * 4 * 97)
    if not whole_layer:
        causal.lm_head.weight.ds_id = 0
    sums, found = gradients(module, ids, labels)
    assert max(calls) <= positions, "never more logits at one time"
    assert sum(calls) == 3 * WIDTH * (1 if whole_layer else 2)
    torch.testing.assert_close(sums, whole, rtol=1e-6, atol=0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # another order of float32 sums


def of_hugging_face(causal, ids, labels) -> list[torch.Tensor]:
    """The gradients of the model's own loss, as a sum."""
    causal.zero_grad()
    (causal(ids, labels=labels).loss * (labels[:, 1:] != IGNORED).sum()).backward()
    return [p.grad.clone() for p in causal.parameters()]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", [7, 1000])
def test_the_gradients_are_those_of_hugging_faces_own_loss(causal, monkeypatch, positions, tied):
    """Of the embedding, too, which gets some from the output layer and some from its rows; twice adds twice as much."""
    if not tied:
        causal.config.tie_word_embeddings = False
        causal.lm_head.weight = torch.nn.Parameter(causal.lm_head.weight.detach().clone())
    monkeypatch.setattr(linear_cross_entropy, "LARGEST_LOGITS", positions * 4 * 97)
    ids, labels = rows()
    ids[0, 3:9] = ids[1, 3:9] = 5  # a token that comes again and again
    module = TokenLoss(causal, None)
    expected = of_hugging_face(causal, ids, labels)
    _, found = gradients(module, ids, labels)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    module(ids, labels)[0].backward()
    for parameter, once in zip(module.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * once, rtol=1e-6, atol=1e-6)


def test_a_tied_embedding_makes_one_gradient_and_not_two(causal):
    """The rows' are added where the output layer's lie: no second tensor of the vocabulary's size, no sum of two."""
    ids, labels = rows()
    total, _ = TokenLoss(causal, None)(ids, labels)
    with torch.profiler.profile(record_shapes=True) as seen:
        total.backward()
    table = [event for event in seen.events() if event.input_shapes and [97, 16] in event.input_shapes]
    names = {event.name for event in table}
    assert "aten::index_add_" in names
    assert not names & {"aten::add", "aten::add_", "aten::embedding_dense_backward"}, names


def test_pieces_in_bf16_are_as_close_as_the_whole(causal, monkeypatch):
    ids, labels = rows()
    _, exact = gradients(TokenLoss(causal, None), ids, labels)
    _, whole = gradients(TokenLoss(causal, torch.bfloat16), ids, labels)
    monkeypatch.setattr(linear_cross_entropy, "LARGEST_LOGITS", 7 * 4 * 97)
    _, pieces = gradients(TokenLoss(causal, torch.bfloat16), ids, labels)

    def error(found):
        return sum(float((a - b).norm() ** 2) for a, b in zip(found, exact, strict=True)) ** 0.5

    assert error(pieces) < 1.1 * error(whole)


def test_a_frozen_output_layer_gets_no_gradient_and_passes_the_same_one_on(causal, monkeypatch):
    """As with LoRA: what is below it learns all the same."""
    causal.lm_head.weight.requires_grad_(False)
    trained = causal.transformer.h[1].mlp.c_fc.weight
    ids, labels = rows()
    found = []
    for largest in (2**27, 7 * 4 * 97):
        monkeypatch.setattr(linear_cross_entropy, "LARGEST_LOGITS", largest)
        trained.grad = None
        TokenLoss(causal, None)(ids, labels)[0].mul(0.25).backward()
        found.append(trained.grad.clone())
    assert causal.lm_head.weight.grad is None
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_pieces_without_gradients_too(causal, monkeypatch):
    """As in an evaluation."""
    module = TokenLoss(causal, None)
    ids, labels = rows()
    sizes = []
    honest = linear_cross_entropy._losses
    monkeypatch.setattr(
        linear_cross_entropy, "_losses", lambda logits, at: sizes.append(tuple(logits.shape)) or honest(logits, at)
    )
    with torch.no_grad():
        _, whole = module(ids, labels)
        monkeypatch.setattr(linear_cross_entropy, "LARGEST_LOGITS", 7 * 4 * 97)
        torch.testing.assert_close(module(ids, labels)[1], whole, rtol=1e-6, atol=0)
    assert sizes == [(60, 128), *[(7, 128)] * 8, (4, 128)], "logits at one time, in rows of 128"


def test_logits_lie_in_aligned_rows(causal, monkeypatch):
    """97 words in rows of 128: a processor's product with odd rows takes nearly twice as long."""
    strides = []
    honest = linear_cross_entropy._slopes
    monkeypatch.setattr(
        linear_cross_entropy, "_slopes", lambda logits, at: strides.append(logits.stride()) or honest(logits, at)
    )
    TokenLoss(causal, None)(*rows())
    assert strides == [(128, 1)]


def test_the_form_for_a_compiler_is_the_same_function():
    dice = torch.Generator().manual_seed(0)
    logits, targets = 4 * torch.randn(9, 31, generator=dice), torch.tensor([0, 30, IGNORED, 4, 4, 7, IGNORED, 1, 2])
    sums, slopes = linear_cross_entropy._slopes_for_compiler(logits, targets)
    torch.testing.assert_close(linear_cross_entropy._slopes(logits, targets), sums, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits, slopes, rtol=1e-6, atol=1e-7)  # they stand in the place of the logits


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling for a processor needs a C++ compiler")
@pytest.mark.parametrize("autocast", [None, pytest.param(torch.bfloat16, marks=pytest.mark.sweep)])
def test_compiled_blocks_give_the_same_loss_and_gradients(causal, monkeypatch, autocast):
    """Within the rounding of fused operations; rows of another shape stay eager, and the training goes on in both."""
    from torch._dynamo.utils import counters

    module = TokenLoss(causal, autocast)
    ids, labels = rows()
    whole, expected = gradients(module, ids, labels)
    monkeypatch.setattr(linear_cross_entropy, "LARGEST_LOGITS", 7 * 4 * 97)
    module.compile_for({tuple(ids.shape)})
    before = counters["stats"]["unique_graphs"]
    sums, found = gradients(module, ids, labels)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > before
    again, _ = gradients(module, ids, labels)
    assert module.told == []
    assert torch.equal(again, sums)
    torch.testing.assert_close(sums, whole, rtol=1e-5 if autocast is None else 2e-2, atol=0)
    if autocast is None:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    module(ids[:1], labels[:1])
    assert counters["stats"]["unique_graphs"] == compiled, "neither the second call nor another shape compiles anew"


def test_where_compiling_fails_it_is_said_once_and_the_steps_are_eager(causal, monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed

    module = TokenLoss(causal, None)
    ids, labels = rows()
    whole, _ = gradients(module, ids, labels)

    def broken(*_, **__):
        raise BackendCompilerFailed(None, RuntimeError("no compiler\nhere"), None)

    monkeypatch.setattr(linear_cross_entropy.torch, "compile", lambda *_, **__: broken)
    module.compile_for({tuple(ids.shape)})
    for _ in range(2):
        assert torch.equal(gradients(module, ids, labels)[0], whole)
    (line,) = module.told
    assert line.startswith("steps are not compiled: ")
    assert "no compiler here" in line


def test_padding_is_neither_counted_nor_looked_at(causal):
    module = TokenLoss(causal, None)
    ids, labels = rows()
    other = ids.clone()
    other[2, WIDTH - 8 :] = 5
    assert torch.equal(module(other, labels)[1][2], module(ids, labels)[1][2])
    _, alone = module(ids[2:, : WIDTH - 8], labels[2:, : WIDTH - 8])
    torch.testing.assert_close(alone[0], module(ids, labels)[1][2], rtol=1e-6, atol=0)


def test_a_row_of_nothing_but_padding_is_zero_and_moves_nothing(causal):
    module = TokenLoss(causal, None)
    sums, found = gradients(module, torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), IGNORED))
    assert sums.tolist() == [0.0]
    assert all(not gradient.any() for gradient in found)


def test_a_token_of_padding_id_counts_where_it_ends_a_text(causal):
    ids, labels = rows(1)
    ids[0, -1] = labels[0, -1] = 0  # the end-of-text token, which also pads
    shorter = labels.clone()
    shorter[0, -1] = IGNORED
    module = TokenLoss(causal, None)
    assert float(module(ids, labels)[0]) > float(module(ids, shorter)[0]) + 1e-3


def test_bf16_is_close_and_is_not_float32(causal):
    ids, labels = rows()
    exact, close = (TokenLoss(causal, dtype)(ids, labels)[1] for dtype in (None, torch.bfloat16))
    assert close.dtype == torch.float32
    torch.testing.assert_close(close, exact, rtol=2e-2, atol=0)  # 8 bits of mantissa: 2^-8 an operation
    assert not torch.equal(close, exact)
    assert all(p.dtype == torch.float32 for p in causal.parameters())


def test_other_models_go_through_their_own_logits():
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    causal = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=97, **shape))
    ids, labels = rows()
    assert TokenLoss(causal, None)(ids, labels)[1].tolist() == pytest.approx(by_hand(causal, ids, labels), rel=1e-5)
