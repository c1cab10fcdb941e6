"""Train on many processes: the training loop of one process, on each rank's part of the model and of every batch.

Notable choices:
- the loop, the recipe, the checks and the metrics are those of `Trainer`; only the division of the work differs;
- every rank has the whole global batch and takes its rows, so data needs no communication, and a checkpoint stores no
  position per rank;
- losses are sums divided by the size of the global batch, so gradients, losses and token counts add up over the ranks;
- a checkpoint has the format of a single process, whatever the layout, and is read with any other layout.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from minids import cost
from minids.config import require
from minids.data.batches import Batch
from minids.files import atomic_directory, save_tensors
from minids.fp8.linear import convert_to_fp8
from minids.model.transformer import MiniDS
from minids.parallel._torch_private import default_store, scale_in_place
from minids.parallel.fsdp import axes_of, reshard, shard
from minids.parallel.layout import Layout
from minids.parallel.pipeline import Pipeline, local, stages_of_rank
from minids.training.checkpoint import load_optimizer_tensors, present_name, write_state
from minids.training.loss import IGNORED, LossDenominators, Losses, losses, targets
from minids.training.metrics import Metrics
from minids.training.pretrain import Recipe, TextData, Trainer, validation_batches

KNOWN_PEAK = "NVIDIA H800"  # the only GPU whose peak is known from a source: cost.H800_PEAK_FLOPS


def save_shards(destination: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors that are sharded over the ranks, as `save_checkpoint` does; every rank calls it.

    Raises `OSError` where the disk refuses.
    """
    writes = dist.get_rank() == 0
    with atomic_directory(destination) if writes else nullcontext(destination) as folder:
        message = [folder]
        dist.broadcast_object_list(message)  # rank 0's folder, which gets its name after this block
        for name, content in tensors.items():
            if any(isinstance(tensor, DTensor) for tensor in content.values()):
                _save_together(content, message[0] / name)
            elif writes:
                save_tensors(content, folder / f"{name}.safetensors")
        if writes:
            write_state(folder, state)
    dist.barrier()


def _save_together(content: dict[str, Tensor], path: Path) -> None:
    """Write each rank's shards to a file of its own; rank 0 then joins the files to `path`.safetensors."""
    writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True, enable_consolidation=True)
    try:
        dcp.save(content, storage_writer=writer)
    except CheckpointException as error:  # derives from BaseException: re-raise as OSError
        raise OSError(f"{path} was not written: {next(iter(error.failures.values()))[0]}") from None
    if dist.get_rank() == 0:
        (path / "model-00001-of-00001.safetensors").rename(path.with_suffix(".safetensors"))
        shutil.rmtree(path)


class ParallelTrainer(Trainer):
    """Trainer of a model on all ranks of the process group; each rank creates one, from an equal model in CPU memory.

    Raises `ValueError` where the layout is impossible.
    """

    write_checkpoint = staticmethod(save_shards)

    def __init__(
        self,
        model: MiniDS,
        data: TextData,
        recipe: Recipe,
        layout: Layout,
        device: str = "cpu",
        profile: bool = False,
    ):
        layout.check(model.config, recipe, dist.get_world_size())
        rule = "a warm-up of the indexers runs without torchrun"  # FSDP reduces no gradients where outputs have none
        require(recipe.index_stage == "sparse", "index_stage", recipe.index_stage, rule)
        self.layout, self.writes_files, self.profile = layout, dist.get_rank() == 0, profile
        if recipe.precision == "fp8":
            convert_to_fp8(model)
        axes = axes_of(layout, device)
        self.device, self.row, self.data_group = device, axes.data.get_local_rank(), axes.data.get_group()
        schedule = layout.pipeline(recipe) if layout.pp > 1 else None
        self.parts = stages_of_rank(model, axes.pp.get_local_rank(), schedule)
        shard(self.parts, axes)
        self.pipeline = None
        if schedule is not None:
            shape = (recipe.batch_size // layout.replicas // schedule.micro_batches, recipe.seq_len)
            self.pipeline = Pipeline(model, schedule, None, shape, axes.pp.get_group(), layout.replicas)
            for runner in self.pipeline.runners:
                runner.autocast = torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16")
            self._release_other_parts(model)
        super().__init__(model, data, recipe)

    def _release_other_parts(self, model: MiniDS) -> None:
        """Move the modules that only other ranks hold to the meta device, which keeps names and shapes."""
        held = {module for part in self.parts for module in part.modules()}
        for module in model.modules():
            if module not in held and not held & set(module.modules()):
                module.to("meta").requires_grad_(False)

    def backward(
        self, batch: Batch, mtp_weight: float, denominators: LossDenominators | None = None
    ) -> tuple[Losses, Tensor | None]:
        denominators, mine = LossDenominators.of(batch), self.rows(batch)
        if self.pipeline is None:
            sums, tokens_per_expert = super().backward(mine, mtp_weight, denominators)
        else:
            sums, tokens_per_expert = self._run_pipeline(mine, mtp_weight, denominators)
        values = torch.stack([sums.main, sums.mtp, sums.balance, sums.indexer])
        dist.all_reduce(values, group=self.data_group)
        if tokens_per_expert is not None:
            dist.all_reduce(tokens_per_expert, group=self.data_group)
        return Losses(*values), tokens_per_expert

    def _run_pipeline(
        self, batch: Batch, mtp_weight: float, denominators: LossDenominators
    ) -> tuple[Losses, Tensor | None]:
        assert self.pipeline is not None
        loss_sums = torch.zeros(3, dtype=torch.float64, device=self.device)

        def loss(out, micro):
            part = losses(self.model, out, micro, denominators)
            total = part.total(mtp_weight)
            loss_sums.add_(torch.stack((part.main, part.mtp, total)).detach())
            return total

        self.pipeline.loss = loss
        micros = list(batch.to(self.device).micro_batches(self.pipeline.shape[0]))
        total, tokens_per_expert, _ = self.pipeline.step([micro.tokens[:, :-1] for micro in micros], micros)
        dist.all_reduce(loss_sums, group=self.pipeline.group)
        main, mtp, without_balance = loss_sums
        none = torch.zeros_like(main)  # a pipeline trains no indexers (`Layout.check`)
        return Losses(main, mtp, total - without_balance, none), tokens_per_expert if len(tokens_per_expert) else None

    def rows(self, batch: Batch) -> Batch:
        """Return this rank's rows, padded with rows without targets to a multiple of the ranks."""
        missing = -len(batch.tokens) % self.layout.replicas
        if missing:
            first = torch.zeros(missing, dtype=torch.int64)  # copies of the first row, outside the loss mask
            tokens, documents, domains = (
                torch.cat((part, part[first])) for part in (batch.tokens, batch.documents, batch.domains)
            )
            mask = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.loss_mask is None else batch.loss_mask
            loss_mask = torch.cat((mask, torch.zeros_like(mask[first])))
            batch = Batch(tokens, documents, domains, loss_mask)
        return batch.rows(slice(self.row, None, self.layout.replicas))

    def clip_gradients(self) -> float:
        """Clip the global gradient norm over all ranks; return the norm before clipping.

        Shards are disjoint; a parameter that two ranks share counts on the lower rank only.
        """
        gradients = {name: local(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}
        elsewhere: set[str] = set()
        if self.pipeline is not None:
            shared = self.pipeline.shared_parameters
            elsewhere.update(*(names for rank, names in shared.items() if rank < self.pipeline.rank))
        squares = (gradient.double().square().sum() for name, gradient in gradients.items() if name not in elsewhere)
        total = sum(squares, torch.zeros((), dtype=torch.float64, device=self.device))
        dist.all_reduce(total)
        norm = total.sqrt().item()
        scale_in_place(list(gradients.values()), min(self.recipe.clip_norm / (norm + 1e-6), 1.0))
        return norm

    def should_stop(self, requested: bool) -> bool:
        """Return whether any rank got a request to stop, so that all ranks stop before the same step."""
        requests = torch.tensor(int(requested))
        dist.all_reduce(requests)
        return bool(requests)

    def train_step(self) -> Metrics:
        """Take a step as `Trainer` does; add metrics of this rank, of which those of rank 0 are written.

        `memory_gb`: peak memory of the process, on a GPU that of the GPU. `mfu`: on an H800 only (`cost.mfu` takes the
        peak of others). `exposed_communication`, with `profile`: the fraction of the step's time spent waiting for
        other ranks, for their data or until they were ready; on CPUs only, since a GPU's waits are not the host's.
        """
        with waits() if self.profile else nullcontext() as seconds:
            metrics = super().train_step()
        metrics |= memory(self.device)
        if seconds is not None and self.device == "cpu":
            per_step = self.recipe.batch_size * self.recipe.seq_len
            metrics["exposed_communication"] = sum(seconds) * metrics["tokens_per_second"] / per_step
        if self.device == "cuda" and torch.cuda.get_device_name() == KNOWN_PEAK:
            flops = cost.training_flops_per_token(self.model.config, self.recipe.seq_len)
            metrics["mfu"] = cost.mfu(metrics["tokens_per_second"] / self.layout.world, flops)
        return metrics

    @torch.no_grad()
    def evaluate(self) -> float:
        self.model.eval()
        token_bytes = self.data.tokenizer.token_bytes()
        nats, byte_count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in validation_batches(self.data, self.recipe):
            labels = targets(batch)
            nats += self._summed_cross_entropy(self.rows(batch).to(self.device))
            byte_count += int(token_bytes[labels[labels != IGNORED]].sum())
        reshard(self.parts)
        dist.all_reduce(nats, group=self.data_group)
        return nats.item() / math.log(2) / byte_count

    def _summed_cross_entropy(self, batch: Batch) -> float | Tensor:
        def nats(out, batch):
            return losses(self.model, out, batch, LossDenominators(1, 1)).main

        tokens = batch.tokens[:, :-1]
        return self.pipeline.evaluate(tokens, batch, nats) if self.pipeline else nats(self.model.states(tokens), batch)

    def load_tensors(self, folder: Path) -> None:
        """Read this rank's shards. The random state is not restored, because no step uses it."""
        reader = dcp.HuggingFaceStorageReader(str(folder))
        stored = reader.read_metadata().state_dict_metadata
        key_of = {present_name(key): key for key in stored}
        tensors = {key: entry for key, entry in stored.items() if isinstance(entry, dcp.TensorStorageMetadata)}
        shape_of = {present_name(key): entry.size for key, entry in tensors.items()}
        held = {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta}
        wrong = [name for name, tensor in held.items() if shape_of.get(name) != tensor.shape]
        if wrong:
            raise ValueError(f"{folder} is damaged: it has no {wrong[0]} of this model's shape")
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        optimizer = {}
        for key in key_of:
            name, _, kind = key.rpartition("/")
            if name in trained:
                optimizer[key] = torch.zeros(1) if kind == "step" else torch.zeros_like(trained[name])
        dcp.load({key_of[name]: tensor for name, tensor in (held | optimizer).items()}, storage_reader=reader)
        load_optimizer_tensors(self.model, self.optimizers, optimizer)

    def run(
        self,
        *,
        directory: Path | None = None,
        progress: bool = True,
        tensorboard: bool = False,
        on_step: Callable[[Metrics], None] | None = None,
    ) -> list[Metrics]:
        """Run as `Trainer` does. Raises `ConnectionError` naming the ranks that died or do not answer."""
        try:
            return super().run(directory=directory, progress=progress, tensorboard=tensorboard, on_step=on_step)
        except RuntimeError as error:
            silent = _silent_ranks()
            if not silent:
                raise
            who = ", ".join(f"rank {rank}" for rank in silent)
            reason = str(error).splitlines()[0]
            raise ConnectionError(f"{who} died or hangs since step {self.step + 1}: {reason}") from None


@contextmanager
def waits() -> Iterator[list[float]]:
    """Record the seconds of each wait of this process for a message or a collective inside the block.

    Every wait ends in torch's `Work.wait`, which is replaced inside the block.
    """
    wait, seconds = dist.Work.wait, []

    def timed(work: dist.Work, *arguments: Any) -> bool:
        began = time.perf_counter()
        try:
            return wait(work, *arguments)
        finally:
            seconds.append(time.perf_counter() - began)

    with patch.object(dist.Work, "wait", timed):
        yield seconds


def memory(device: str) -> Metrics:
    """Return the peak memory of this process in GB: on a GPU the GPU's, on a CPU where the system reports it."""
    if device == "cuda":
        return {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    try:
        import resource
    except ImportError:  # Windows has none
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def _silent_ranks(seconds: float = 5) -> list[int]:
    """Return the ranks that do not report within `seconds` that they, too, have noticed the failure."""
    store, ranks = default_store(), range(dist.get_world_size())
    store.set(f"alive/{dist.get_rank()}", "")
    with suppress(RuntimeError):
        store.wait([f"alive/{rank}" for rank in ranks], timedelta(seconds=seconds))
    return [rank for rank in ranks if not store.check([f"alive/{rank}"])]
