"""Memory that a model needs, compared with that of the machine before anything is allocated."""

import os
from pathlib import Path

import torch

from minids import cost
from minids.config import ModelConfig
from minids.training.pretrain import Recipe

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def training_bytes(config: ModelConfig, recipe: Recipe) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer states, without activations and without MTP modules if not trained."""
    count = cost.num_parameters(config) + (cost.mtp_parameters(config) if recipe.mtp_weight else 0)
    moments = 4 if recipe.moments == "bf16" or recipe.optimizer != "adamw" else 8  # Muon has one, AdamW two
    return cost.zero_bytes_per_gpu(count, 1, 0, weight=4, gradient=4, optimizer=moments)


def machine_bytes() -> float:
    """Bytes of memory that this process can use: the machine's, or a lower limit; infinite where it is unknown."""
    limits = [float("inf")]
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if CGROUP_LIMIT.is_file() and (words := CGROUP_LIMIT.read_text().strip()).isdecimal():  # of a container
        limits.append(int(words))
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        limits.append(limit if limit != resource.RLIM_INFINITY else float("inf"))
    return min(limits)


def check_training(config: ModelConfig, recipe: Recipe, device: str, local: int = 1, world: int = 1) -> None:
    """Raise `ValueError` where the memory cannot hold a run of `world` processes, `local` of them on this machine.

    The states are sharded over all processes, but each process creates all weights before that.
    """
    need = training_bytes(config, recipe)
    share = (1 if device == "cuda" else local) / world
    available = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else machine_bytes()
    parts = ", ".join(f"{name} {gigabytes(share * size)}" for name, size in need.items())
    what = f"training ({parts}; activations not counted)"
    check(share * sum(need.values()), what, available, "choose a smaller --preset, or more processes with torchrun")
    what = f"creating all weights in each of {local} processes"
    check(local * need["weights"], what, machine_bytes(), "choose a smaller --preset, or fewer processes per machine")


def check(need: float, what: str, available: float, remedy: str) -> None:
    """Raise `ValueError` where `what` needs more than the available bytes."""
    if need > available:
        raise ValueError(f"{what} needs at least {gigabytes(need)}, but there is only {gigabytes(available)}: {remedy}")


def gigabytes(size: float) -> str:
    """Format bytes in units of 10^9."""
    return f"{size / 1e9:,.2f} GB"
