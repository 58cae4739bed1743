"""What a GPU takes in place of a processor's forms, as far as it can be shown without one."""

import torch

from trainer.model import loss as loss_module
from trainer.model.loss import accumulate_matmul, even_chunk_size, matmul_fp32, simulate_gpu


def test_products_are_summed_in_float32_where_the_device_shows_that_it_does_and_rounded_elsewhere():
    """torch has it for no processor: the plain form there. A GPU's operations, by their shapes and types alone."""
    left, right = torch.randn(8, 32).bfloat16(), torch.randn(32, 8).bfloat16()
    assert not loss_module.sums_in_fp32(left.device, left.dtype)
    assert torch.equal(matmul_fp32(left, right), (left @ right).float())
    out = torch.ones(8, 8)
    accumulate_matmul(out, left, right, overwrite=False)
    assert torch.equal(out, 1 + (left @ right).float())
    accumulate_matmul(out, left, right, overwrite=True)
    assert torch.equal(out, (left @ right).float())


def test_pieces_on_a_gpu_are_whole_tiles():
    assert even_chunk_size(2046, 667, is_gpu=True) == 512
    assert even_chunk_size(2046, 667, is_gpu=False) == 512
    assert even_chunk_size(2046, 334, is_gpu=True) == 384
    assert even_chunk_size(60, 7, is_gpu=False) == 7


def test_the_gpu_form_rounds_slopes_of_likely_targets_once():
    """p - 1 of a target that is nearly certain keeps its digits in bfloat16, where p alone would be 1."""
    logits = torch.zeros(1, 64)
    logits[0, 3] = 10.0
    exact = torch.softmax(logits.double(), 1)
    exact[0, 3] -= 1
    with simulate_gpu():
        slopes = logits.bfloat16()
        loss_module._nll_and_grad_inplace(slopes, torch.tensor([3]))
    torch.testing.assert_close(slopes.double(), exact, rtol=2**-8, atol=0)
