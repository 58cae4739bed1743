"""A CUDA graph's capture that fails: generator, stream and allocator are put back, on a stand-in for the device."""

import pytest
import torch

from trainer.distributed import execution


class FakeState:
    """Of CUDA's generator: drawing from one that is capturing, while nothing captures, raises."""

    def __init__(self, offset: int = 0):
        self.offset, self.is_capturing = offset, False


class FakeCudaDevice:
    """The default generator, the current stream and the allocator, as torch 2.11 leaves them when a capture fails.

    `torch.cuda.graph` asks for the end of the capture first; where that raises, neither the allocator's and the
    generator's epilogue nor the return to the stream before is reached, and the graph's end does not release its pool.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.state, self.stream, self.gives_to_pool, self.pool_users = FakeState(), "main", False, 0
        patch.setattr(torch.cuda, "default_generators", [self])
        patch.setattr(torch.cuda, "current_stream", lambda _: self.stream)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate)
        patch.setattr(torch._C, "_cuda_releasePool", self.release_pool)

    def end_allocate(self, index: int, pool: str) -> None:
        if not self.gives_to_pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.gives_to_pool = False

    def release_pool(self, index: int, pool: str) -> None:
        self.pool_users -= 1

    def clone_state(self) -> FakeState:
        return FakeState(self.state.offset)

    def graphsafe_set_state(self, state: FakeState) -> None:
        self.state = state

    def dropout(self) -> None:
        if self.state.is_capturing and self.stream == "main":
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state.offset += 4

    def capture(self, failing: str) -> None:
        self.stream = "side"
        if failing == "begin":
            raise RuntimeError("capture_begin failed")
        self.state.is_capturing = self.gives_to_pool = True
        self.pool_users += 1
        self.dropout()
        try:
            if failing == "inside":
                raise RuntimeError("operation not permitted when stream is capturing")
            if failing == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            if failing in ("inside", "end"):
                raise RuntimeError("operation failed due to a previous error during capture")
            self.end_allocate(0, "pool")
            self.release_pool(0, "pool")  # as the graph that had its end does when it is dropped
            self.state.is_capturing, self.stream = False, "main"


@pytest.mark.parametrize("failing", ["begin", "inside", "end", "memory"])
def test_after_a_capture_that_fails_anywhere_the_next_dropout_draws_as_if_there_had_been_none(failing, monkeypatch):
    device = FakeCudaDevice(monkeypatch)
    device.dropout()
    with pytest.raises(RuntimeError), execution._restored_on_failure(torch.device("cuda", 0), "pool"):
        device.capture(failing)
    device.dropout()
    assert (device.state.offset, device.stream) == (8, "main")
    assert (device.gives_to_pool, device.pool_users) == (False, 0), "its memory can be had again"
