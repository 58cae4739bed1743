"""torch's private names are where `trainer.model.torch_internals` takes them: its import fails where an upgrade moves
one; those of a GPU are looked up here, and what the others do shows in the tests of memory and stepper too."""

import torch

from trainer.model import torch_internals


def test_the_private_names_are_there_and_add_copy_and_measure_lists_of_tensors():
    target, source = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.full((2,), 2.0)]
    torch_internals.foreach_copy_(target, source)
    torch_internals.foreach_add_(target, source)
    norms = torch_internals.foreach_norm(target)
    assert torch.allclose(torch.stack(list(norms)), torch.tensor([12.0, 32.0]).sqrt())
    assert all(hasattr(torch._C, name) for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"))
