"""Process groups: of torchrun's processes, of forks of a notebook or a test, and of ranks that do not exist."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

RUN = "minids/run"  # the key in torchrun's store

# Processes that torchrun started -------------------------------------------------------------------------------------


@contextmanager
def processes(device: str, patience: float = 60) -> Iterator[int]:
    """Join the process group of torchrun's processes; yield their number, 1 without torchrun.

    `patience` is the timeout of every collective, in seconds.
    """
    if not dist.is_torchelastic_launched():
        yield 1
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The store still contains the addresses of killed processes, so every attempt has its own prefix.
    store = dist.PrefixStore(f"attempt{os.environ['TORCHELASTIC_RESTART_COUNT']}", _store())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=patience))
    yield world
    dist.barrier()  # a rank that exits first would break the others' connections
    dist.destroy_process_group()


def creates_run() -> bool:
    """Return whether this process creates or resumes the run: rank 0, unless the run was announced before a restart."""
    return not dist.is_torchelastic_launched() or dist.get_rank() == 0 and not _store().check([RUN])


def announce_run(directory: Path) -> None:
    """Send the run's folder to all other ranks."""
    if dist.is_torchelastic_launched():
        _store().set(RUN, str(directory))


def wait_for_run() -> Path:
    """Wait until rank 0 has announced the run's folder, and return it."""
    store = _store()
    store.wait([RUN], timedelta(days=1))  # rank 0 may have to fetch and tokenize the text first
    return Path(store.get(RUN).decode())


def _store() -> dist.Store:
    """Return torchrun's store, which outlives the processes."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False)


# Forks of this process -----------------------------------------------------------------------------------------------


def launch(work: Callable[[int], Any], ranks: int) -> list[Any]:
    """Run `work(rank)` in `ranks` forked processes that form a gloo group (CPU only); return the results by rank.

    Raises `RuntimeError` naming the first rank that failed or was killed, and why; no process is left behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(_member, (work, ranks, Path(folder)), ranks, join=False, start_method="fork")
        try:
            while not context.join(grace_period=1):
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            reason = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
            raise RuntimeError(f"rank {error.error_index} failed: {reason}") from error
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(ranks)]


def _member(rank: int, work: Callable[[int], Any], ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(minutes=3)  # of every collective; no action takes as long, even on a busy machine
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout, ranks, rank)
    try:
        torch.save(work(rank), folder / f"{rank}.pt")
    except Exception as error:
        cause = error.__cause__ or error  # torch wraps errors of a stage
        raise RuntimeError(f"{type(cause).__name__}: {cause}") from error
    dist.barrier()  # a rank that exits first would break the others' connections
    dist.destroy_process_group()


# One rank among many that do not exist -------------------------------------------------------------------------------


@contextmanager
def one_of_many(rank: int, world: int) -> Iterator[None]:
    """Be rank `rank` of `world` in a process group without other processes, for code that runs on more than there are.

    Meshes, groups and shards are those of a real run. Collectives return at once and exchange nothing, so no value that
    depends on another rank is meaningful.
    """
    from minids.parallel._torch_private import fake_store, forget_shardings  # slow to import; only this needs it

    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        forget_shardings()  # else this process and its forks would shard as this rank does
