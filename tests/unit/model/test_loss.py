"""Summed negative log-likelihood: in pieces as whole, padding left out, in bf16 close to float32, for any architecture
whose head is a layer."""

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from trainer.data.sampler import IGNORE_INDEX
from trainer.model import attention
from trainer.model import loss as loss_module
from trainer.model.loss import CausalLMLoss, simulate_gpu

WIDTH, VOCAB = 20, 97


@pytest.fixture
def causal(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def limit_positions(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets of how many positions the logits may be there at one time."""
    return lambda number: monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", number * 4 * VOCAB)


def make_batch(num_rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length, padded on the right, of which the first few tokens do not count."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, VOCAB, (num_rows, WIDTH)))
    labels = ids.clone()
    for n in range(num_rows):
        labels[n, :n] = labels[n, WIDTH - 4 * n :] = IGNORE_INDEX
    return ids, labels


def losses_by_definition(causal: Any, ids: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """The sums of each row from the definition, token by token."""
    sums = []
    for row, row_labels in zip(ids, labels, strict=True):
        log_probs = torch.log_softmax(causal(row[None]).logits[0].detach(), -1)
        counted = [position for position in range(1, WIDTH) if row_labels[position] != IGNORE_INDEX]
        sums.append(-sum(float(log_probs[position - 1, row[position]]) for position in counted))
    return sums


def compute_gradients(module: CausalLMLoss, ids: Any, labels: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(sums of the rows, gradients of their sum)."""
    module.zero_grad()
    loss_sum, sums = module(ids, labels)
    loss_sum.backward()
    return sums, [p.grad.clone() for p in module.parameters()]


def hugging_face_gradients(causal: Any, ids: Any, labels: Any) -> list[torch.Tensor]:
    """Those of the model's own loss, as a sum."""
    causal.zero_grad()
    (causal(ids, labels=labels).loss * (labels[:, 1:] != IGNORE_INDEX).sum()).backward()
    return [p.grad.clone() for p in causal.parameters()]


# --- in pieces ---


@pytest.mark.parametrize(
    ("positions", "head"), [(1000, "tied"), (7, "tied"), (1, "its own"), (1000, "its own"), (7, "divided")]
)
def test_the_loss_sum_and_its_gradients_in_chunks_of_any_size_are_those_of_hugging_faces_own_loss(
    causal, monkeypatch, limit_positions, positions, head
):
    """Of a tied embedding, too, which gets some from the output layer and some from its rows; and where the output
    layer is not a plain one (ZeRO-3 divides it), and its logits are made twice."""
    if head == "its own":
        causal.config.tie_word_embeddings = False
        causal.lm_head.weight = torch.nn.Parameter(causal.lm_head.weight.detach().clone())
    limit_positions(positions)
    ids, labels = make_batch()
    ids[:2, 3:9] = labels[:2, 3:9] = 5  # a token that comes again and again
    module, expected = CausalLMLoss(causal, None), hugging_face_gradients(causal, ids, labels)
    if head == "divided":
        causal.lm_head.weight.ds_id = 0
    owner, name = (functional, "cross_entropy") if head == "divided" else (torch, "log_softmax")
    monkeypatch.setattr(owner, name, spy := Mock(wraps=getattr(owner, name)))
    sums, grads = compute_gradients(module, ids, labels)
    num_rows = [len(call.args[0]) for call in spy.call_args_list]
    assert max(num_rows) <= positions, "never more logits at one time"
    assert sum(num_rows) == 3 * WIDTH * (2 if head == "divided" else 1)
    assert sums.dtype == torch.float32
    assert sums.tolist() == pytest.approx(losses_by_definition(causal, ids, labels), rel=1e-5)
    for actual, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(module(ids, labels)[1], sums), "as in an evaluation"
    module(ids, labels)[0].backward()
    for parameter, once in zip(module.parameters(), grads, strict=True):  # twice adds twice as much
        torch.testing.assert_close(parameter.grad, 2 * once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("head", "dtype"), [("tied", None), ("divided", torch.bfloat16), ("unknown", None)])
def test_smoothed_labels_are_torchs_in_training_and_not_in_evaluation(causal, limit_positions, head, dtype):
    limit_positions(7)
    ids, labels = make_batch()
    module, plain = CausalLMLoss(causal, dtype, label_smoothing=0.3), CausalLMLoss(causal, dtype)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = causal(ids).logits[:, :-1].float().flatten(0, 1)
    targets = labels[:, 1:].flatten()
    expected = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.3)
    causal.zero_grad()
    expected.backward()
    gradients = [p.grad.clone() for p in causal.parameters()]
    if head == "divided":
        causal.lm_head.weight.ds_id = 0
    elif head == "unknown":
        module.uses_head = plain.uses_head = False
    sums, grads = compute_gradients(module.train(), ids, labels)
    rel, atol = (1e-5, 1e-5) if dtype is None else (5e-3, 2e-2)
    assert float(sums.sum()) == pytest.approx(float(expected.detach()), rel=rel)
    for actual, other in zip(grads, gradients, strict=True):
        torch.testing.assert_close(actual, other, rtol=rel, atol=atol * float(other.abs().max()))
    with torch.no_grad():
        assert torch.equal(module.eval()(ids, labels)[1], plain.eval()(ids, labels)[1])
        assert not torch.equal(module.train()(ids, labels)[1], plain(ids, labels)[1])


def test_a_step_reads_no_value_from_its_device():
    """A GPU would be waited for; transformers looks whether rows are packed."""
    causal = AutoModelForCausalLM.from_config(transformers.MistralConfig(**GROUPED, sliding_window=8))
    attention.install(causal)
    reads = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_local_scalar_dense" in str(func) or "is_nonzero" in str(func) or "nonzero" in str(func):
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        CausalLMLoss(causal, None)(*make_batch())[0].backward()
    assert reads == []


def test_a_tied_embedding_makes_one_gradient_and_not_two(causal):
    """The rows' are added where the output layer's lie: no second tensor of the vocabulary's size, no sum of two; by
    `index_add_`, which sums them in one order, however many threads there are."""
    total, _ = CausalLMLoss(causal, None)(*make_batch())
    with torch.profiler.profile(record_shapes=True, acc_events=True) as seen:
        total.backward()
    table = [event for event in seen.events() if event.input_shapes and [VOCAB, 16] in event.input_shapes]
    names = {event.name for event in table}
    assert "aten::index_add_" in names
    assert not names & {"aten::add", "aten::add_", "aten::embedding_dense_backward"}, names


# --- bf16 ---


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_of_likely_targets_keep_their_digits_in_bfloat16(smoothing):
    """p - 1 of a target that is nearly certain keeps its digits in bfloat16, where p alone would be 1."""
    logits = torch.zeros(1, 64)
    logits[0, 3] = 10.0
    exact = torch.softmax(logits.double(), 1)
    exact -= smoothing / 64
    exact[0, 3] -= 1 - smoothing
    gradients = logits.bfloat16()
    loss_module._nll_inplace(gradients, torch.tensor([3]), 64, needs_grad=True, smoothing=smoothing)
    torch.testing.assert_close(gradients.double(), exact, rtol=2**-8, atol=0)


# --- other architectures ---

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB}
GROUPED = SMALL | {"intermediate_size": 32, "num_key_value_heads": 2, "pad_token_id": 5}
OTHER_MODELS = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "llama, tied": transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=2.0),
    "phi": transformers.PhiConfig(**GROUPED),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=8, dropout=0.0),
    "granite": transformers.GraniteConfig(**GROUPED, logits_scaling=8.0),
    "cohere": transformers.CohereConfig(**GROUPED, logit_scale=0.25, eos_token_id=1),
    "bloom": transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=VOCAB, pad_token_id=5),
}


def make_other_model(name: str) -> Any:
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(OTHER_MODELS[name])
    for parameter in causal.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return causal


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_the_chunked_loss_of_other_models_is_that_of_their_own_logits(name, is_gpu, limit_positions):
    """Heads with a bias, a scale, a projection; tied embeddings with a padding row, which gets no gradient."""
    causal = make_other_model(name)
    module, (ids, labels) = CausalLMLoss(causal, None), make_batch()
    ids[1, 6:9] = labels[1, 6:9] = 5
    assert bool(module.verify()) == (name == "gemma2"), "a cap on the logits: they are all made at once"
    expected = hugging_face_gradients(causal, ids, labels)
    limit_positions(7)
    with simulate_gpu(is_gpu):
        sums, grads = compute_gradients(module, ids, labels)
    assert sums.tolist() == pytest.approx(losses_by_definition(causal, ids, labels), rel=1e-5)
    for actual, other in zip(grads, expected, strict=True):
        assert (actual - other).norm() <= 1e-5 * (other.norm() + 0.1)


def test_a_head_that_is_more_than_its_layer_is_found_at_the_start_and_all_logits_are_made(monkeypatch):
    causal = make_other_model("opt")
    original = causal.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = output.logits * 1.001  # what no configuration names
        return output

    monkeypatch.setattr(causal, "forward", forward)
    module, (ids, labels) = CausalLMLoss(causal, None), make_batch()
    line = module.verify()
    assert line.startswith("all logits of a micro-batch are made at once, 0.00037 MiB a token: its output layer gives")
    assert module(ids, labels)[1].tolist() == pytest.approx(losses_by_definition(causal, ids, labels), rel=1e-5)
    assert causal.training, "as it was"
