"""torch's private names are where `trainer.model.torch_internals` takes them; an upgrade that moves one shows here."""

import torch

from trainer.model import torch_internals


def test_the_foreach_names_do_what_is_wanted_of_them():
    target, source = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.full((2,), 2.0)]
    torch_internals.foreach_copy_(target, source)
    torch_internals.foreach_add_(target, source)
    assert [tensor.tolist() for tensor in target] == [[2.0] * 3, [4.0] * 2]
    norms = torch_internals.foreach_norm(target)
    assert torch.allclose(torch.stack(list(norms)), torch.tensor([12.0, 32.0]).sqrt())


def test_a_failed_captures_pool_can_be_released():
    assert hasattr(torch._C, "_cuda_endAllocateToPool")
    assert hasattr(torch._C, "_cuda_releasePool")
