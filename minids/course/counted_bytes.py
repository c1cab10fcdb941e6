"""Count the bytes that a rank sends or receives in collectives, by purpose."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class CountedBytes(TorchDispatchMode):
    """Adds up the bytes of this rank's collectives inside the block, in `bytes`.

    An all-gather counts what comes from other ranks, a reduce-scatter what goes to them; an all-to-all and a send count
    all that they carry, also what stays on the rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name().removeprefix("c10d::").strip("_")
        if name == "allgather_base":
            self.bytes["weights gathered"] += args[0].nbytes - args[1].nbytes
        elif name == "reduce_scatter_base":
            self.bytes["gradients scattered"] += args[1].nbytes - args[0].nbytes
        elif name == "alltoall_base":
            self.bytes["rows to experts and back"] += args[1].nbytes
        elif name == "send":
            self.bytes["residual stream between stages"] += sum(tensor.nbytes for tensor in args[0])
        return operation(*args, **(kwargs or {}))
