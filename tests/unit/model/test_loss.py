"""Summed negative log-likelihood: in pieces as whole, padding left out, in bf16 close to float32."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from trainer.data.sampler import IGNORE_INDEX
from trainer.model import loss as loss_module
from trainer.model.loss import CausalLMLoss

WIDTH = 20


@pytest.fixture
def causal(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def make_batch(num_rows: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length, padded on the right, of which the first few tokens do not count."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(1, 97, (num_rows, WIDTH)))
    labels = ids.clone()
    for n in range(num_rows):
        labels[n, :n] = IGNORE_INDEX
        labels[n, WIDTH - 4 * n :] = IGNORE_INDEX
    return ids, labels


def losses_by_definition(causal, ids, labels) -> list[float]:
    """The sums of each row from the definition, token by token."""
    sums = []
    for row, row_labels in zip(ids, labels, strict=True):
        log_probs = torch.log_softmax(causal(row[None]).logits[0], -1)
        sums.append(
            -sum(
                float(log_probs[position - 1, row[position]].detach())
                for position in range(1, WIDTH)
                if row_labels[position] != IGNORE_INDEX
            )
        )
    return sums


def compute_gradients(module: CausalLMLoss, ids, labels) -> tuple[torch.Tensor, list[torch.Tensor]]:
    module.zero_grad()
    loss_sum, sums = module(ids, labels)
    loss_sum.backward()
    return sums, [p.grad.clone() for p in module.parameters()]


def test_the_loss_of_a_row_is_the_sum_over_its_target_tokens(causal):
    ids, labels = make_batch()
    total, sums = CausalLMLoss(causal, None)(ids, labels)
    assert total.item() == pytest.approx(sums.sum().item(), rel=1e-6)
    assert sums.shape == (3,)
    assert sums.dtype == torch.float32
    assert sums.tolist() == pytest.approx(losses_by_definition(causal, ids, labels), rel=1e-5)


def test_the_loss_sum_is_that_of_hugging_faces_own_loss(causal):
    ids, labels = make_batch()
    with torch.no_grad():
        theirs = causal(ids, labels=labels).loss * (labels[:, 1:] != IGNORE_INDEX).sum()
        assert float(CausalLMLoss(causal, None)(ids, labels)[0]) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("whole_layer", [True, False])
@pytest.mark.parametrize("positions", [1, 7, 19])
def test_linear_cross_entropy_in_chunks_of_any_size_gives_the_full_loss_and_gradients(
    causal, monkeypatch, positions, whole_layer
):
    """Also where the output layer is not a plain one (ZeRO-3 divides it), and its logits are made twice."""
    module = CausalLMLoss(causal, None)
    ids, labels = make_batch()
    whole, expected = compute_gradients(module, ids, labels)
    calls = []
    honest = torch.log_softmax if whole_layer else functional.cross_entropy
    spy = lambda *a, **k: calls.append(len(a[0])) or honest(*a, **k)  # noqa: E731
    monkeypatch.setattr(
        *((loss_module.torch, "log_softmax") if whole_layer else (loss_module.functional, "cross_entropy")),
        spy,
    )
    monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", positions * 4 * 97)
    if not whole_layer:
        causal.lm_head.weight.ds_id = 0
    sums, grads = compute_gradients(module, ids, labels)
    assert max(calls) <= positions, "never more logits at one time"
    assert sum(calls) == 3 * WIDTH * (1 if whole_layer else 2)
    torch.testing.assert_close(sums, whole, rtol=1e-6, atol=0)
    for actual, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-5, atol=1e-5)  # another order of float32 sums


def hugging_face_gradients(causal, ids, labels) -> list[torch.Tensor]:
    """The gradients of the model's own loss, as a sum."""
    causal.zero_grad()
    (causal(ids, labels=labels).loss * (labels[:, 1:] != IGNORE_INDEX).sum()).backward()
    return [p.grad.clone() for p in causal.parameters()]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", [7, 1000])
def test_the_loss_gradients_are_those_of_hugging_faces_own_loss(causal, monkeypatch, positions, tied):
    """Of the embedding, too, which gets some from the output layer and some from its rows; twice adds twice as much."""
    if not tied:
        causal.config.tie_word_embeddings = False
        causal.lm_head.weight = torch.nn.Parameter(causal.lm_head.weight.detach().clone())
    monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", positions * 4 * 97)
    ids, labels = make_batch()
    ids[0, 3:9] = ids[1, 3:9] = 5  # a token that comes again and again
    module = CausalLMLoss(causal, None)
    expected = hugging_face_gradients(causal, ids, labels)
    _, grads = compute_gradients(module, ids, labels)
    assert len(grads) == len(expected)
    for actual, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-5, atol=1e-5)
    module(ids, labels)[0].backward()
    for parameter, once in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * once, rtol=1e-6, atol=1e-6)


def test_a_tied_embedding_makes_one_gradient_and_not_two(causal):
    """The rows' are added where the output layer's lie: no second tensor of the vocabulary's size, no sum of two."""
    ids, labels = make_batch()
    total, _ = CausalLMLoss(causal, None)(ids, labels)
    with torch.profiler.profile(record_shapes=True, acc_events=True) as seen:
        total.backward()
    table = [event for event in seen.events() if event.input_shapes and [97, 16] in event.input_shapes]
    names = {event.name for event in table}
    assert "aten::_index_put_impl_" in names
    assert not names & {"aten::add", "aten::add_", "aten::embedding_dense_backward"}, names


def test_linear_cross_entropy_in_chunks_in_bf16_is_as_close_as_the_full_loss(causal, monkeypatch):
    ids, labels = make_batch()
    _, exact = compute_gradients(CausalLMLoss(causal, None), ids, labels)
    _, whole = compute_gradients(CausalLMLoss(causal, torch.bfloat16), ids, labels)
    monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", 7 * 4 * 97)
    _, pieces = compute_gradients(CausalLMLoss(causal, torch.bfloat16), ids, labels)

    def error(grads):
        return sum(float((a - b).norm() ** 2) for a, b in zip(grads, exact, strict=True)) ** 0.5

    assert error(pieces) < 1.1 * error(whole)


def test_a_frozen_output_layer_gets_no_gradient_and_passes_the_same_one_on(causal, monkeypatch):
    """As with LoRA: what is below it learns all the same."""
    causal.lm_head.weight.requires_grad_(False)
    trained = causal.transformer.h[1].mlp.c_fc.weight
    ids, labels = make_batch()
    actual = []
    for largest in (2**27, 7 * 4 * 97):
        monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", largest)
        trained.grad = None
        CausalLMLoss(causal, None)(ids, labels)[0].mul(0.25).backward()
        actual.append(trained.grad.clone())
    assert causal.lm_head.weight.grad is None
    torch.testing.assert_close(actual[1], actual[0], rtol=1e-5, atol=1e-6)


def test_linear_cross_entropy_in_chunks_without_gradients_gives_the_full_loss(causal, monkeypatch):
    """As in an evaluation."""
    module = CausalLMLoss(causal, None)
    ids, labels = make_batch()
    sizes = []
    honest = loss_module._nll_without_grad
    monkeypatch.setattr(
        loss_module,
        "_nll_without_grad",
        lambda logits, at: sizes.append(tuple(logits.shape)) or honest(logits, at),
    )
    with torch.no_grad():
        _, whole = module(ids, labels)
        monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", 7 * 4 * 97)
        torch.testing.assert_close(module(ids, labels)[1], whole, rtol=1e-6, atol=0)
    assert sizes == [(60, 128), *[(7, 128)] * 8, (4, 128)], "logits at one time, in rows of 128"


def test_logits_of_a_chunk_lie_in_aligned_rows(causal, monkeypatch):
    """97 words in rows of 128: a processor's product with odd rows takes nearly twice as long."""
    strides = []
    honest = loss_module._nll_and_grad_inplace
    monkeypatch.setattr(
        loss_module,
        "_nll_and_grad_inplace",
        lambda logits, at: strides.append(logits.stride()) or honest(logits, at),
    )
    CausalLMLoss(causal, None)(*make_batch())
    assert strides == [(128, 1)]


def test_padding_changes_no_loss(causal):
    module = CausalLMLoss(causal, None)
    ids, labels = make_batch()
    other = ids.clone()
    other[2, WIDTH - 8 :] = 5
    assert torch.equal(module(other, labels)[1][2], module(ids, labels)[1][2])
    _, alone = module(ids[2:, : WIDTH - 8], labels[2:, : WIDTH - 8])
    torch.testing.assert_close(alone[0], module(ids, labels)[1][2], rtol=1e-6, atol=0)


def test_a_row_of_padding_alone_has_loss_zero_and_no_gradient(causal):
    module = CausalLMLoss(causal, None)
    sums, grads = compute_gradients(module, torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), IGNORE_INDEX))
    assert sums.tolist() == [0.0]
    assert all(not gradient.any() for gradient in grads)


def test_an_end_of_text_token_with_the_padding_id_is_a_target(causal):
    ids, labels = make_batch(1)
    ids[0, -1] = labels[0, -1] = 0  # the end-of-text token, which also pads
    shorter = labels.clone()
    shorter[0, -1] = IGNORE_INDEX
    module = CausalLMLoss(causal, None)
    assert module(ids, labels)[0].item() > module(ids, shorter)[0].item() + 1e-3


def test_the_loss_in_bf16_is_close_to_float32_and_different(causal):
    ids, labels = make_batch()
    exact, close = (CausalLMLoss(causal, dtype)(ids, labels)[1] for dtype in (None, torch.bfloat16))
    assert close.dtype == torch.float32
    torch.testing.assert_close(close, exact, rtol=2e-2, atol=0)  # 8 bits of mantissa: 2^-8 an operation
    assert not torch.equal(close, exact)
    assert all(p.dtype == torch.float32 for p in causal.parameters())


def test_gradients_of_likely_targets_keep_their_digits_in_bfloat16():
    """p - 1 of a target that is nearly certain keeps its digits in bfloat16, where p alone would be 1."""
    logits = torch.zeros(1, 64)
    logits[0, 3] = 10.0
    exact = torch.softmax(logits.double(), 1)
    exact[0, 3] -= 1
    gradients = logits.bfloat16()
    loss_module._nll_and_grad_inplace(gradients, torch.tensor([3]))
    torch.testing.assert_close(gradients.double(), exact, rtol=2**-8, atol=0)
