"""torch's private names are where `trainer.model.torch_internals` takes them; an upgrade that moves one shows here."""

from typing import Any

import torch

from trainer.model import torch_internals


def test_the_private_names_do_what_is_wanted_of_them():
    target, source = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.full((2,), 2.0)]
    torch_internals.foreach_copy_(target, source)
    torch_internals.foreach_add_(target, source)
    assert [tensor.tolist() for tensor in target] == [[2.0] * 3, [4.0] * 2]
    norms = torch_internals.foreach_norm(target)
    assert torch.allclose(torch.stack(list(norms)), torch.tensor([12.0, 32.0]).sqrt())
    names = []

    class Log(torch_internals.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch_internals.FakeTensorMode(), Log():
        assert isinstance(torch.zeros(3) + 1, torch_internals.FakeTensor)
    assert "aten.add.Tensor" in names
    assert hasattr(torch._C, "_cuda_endAllocateToPool")
    assert hasattr(torch._C, "_cuda_releasePool")
