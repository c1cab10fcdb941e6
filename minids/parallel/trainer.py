"""Training on many processes: the training loop of one, with each rank's part of the model and of every batch.

Notable choices:
- the loop, the recipe, the checks and the metrics are those of `Trainer`; what differs is who computes which gradient;
- every rank knows the whole global batch and takes its rows, so data needs no communication, and a checkpoint no
  position per rank;
- losses are sums over the global batch divided by its size, so that gradients, losses and loads of ranks are added up;
- a checkpoint looks as one process would have written it, whatever the layout, and is read by any other.
"""

import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from minids import cost
from minids.data.batches import Batch
from minids.files import save_tensors, written_whole
from minids.model.fp8_linear import convert_to_fp8
from minids.model.transformer import MiniDS
from minids.parallel.mesh import Layout, reshard, shard
from minids.parallel.pipeline import Pipeline, local
from minids.training.checkpoint import load_optimizer_tensors, write_state
from minids.training.loop import Recipe, TextData, Trainer, micro_batches, validation_batches
from minids.training.loss import IGNORED, Losses, Share, losses, targets
from minids.training.metrics import Metrics

try:
    import resource
except ImportError:  # Windows has none
    resource = None

KNOWN_PEAK = "NVIDIA H800"  # the only GPU whose peak is known from a source: cost.H800_PEAK_FLOPS


def save_shards(destination: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """`save_checkpoint` of tensors that are shared out over all ranks: they all call it and write together.

    Raises `OSError` where the disk refuses.
    """
    writes = dist.get_rank() == 0
    with written_whole(destination) if writes else nullcontext() as folder:
        message = [folder]
        dist.broadcast_object_list(message)
        for name, content in tensors.items():
            if any(isinstance(tensor, DTensor) for tensor in content.values()):
                _save_together(content, message[0] / name)
            elif writes:
                save_tensors(content, folder / f"{name}.safetensors")
        if writes:
            write_state(folder, state)
    dist.barrier()


def _save_together(content: dict[str, Tensor], path: Path) -> None:
    """Every rank writes its shards into a file of its own; rank 0 joins them to `path`.safetensors."""
    writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True, enable_consolidation=True)
    try:
        dcp.save(content, storage_writer=writer)
    except CheckpointException as error:  # no Exception, so that nobody would catch it
        raise OSError(f"{path} was not written: {next(iter(error.failures.values()))[0]}") from None
    if dist.get_rank() == 0:
        (path / "model-00001-of-00001.safetensors").rename(path.with_suffix(".safetensors"))
        shutil.rmtree(path)


class ParallelTrainer(Trainer):
    """A model in training on all ranks of the process group; each makes one, from an equal model in CPU memory.

    Raises `ValueError` where the layout is impossible.
    """

    write_checkpoint = staticmethod(save_shards)

    def __init__(self, model: MiniDS, data: TextData, recipe: Recipe, layout: Layout, device: str = "cpu"):
        layout.check(model.config, recipe, dist.get_world_size())
        self.layout, self.writes_files = layout, dist.get_rank() == 0
        if recipe.precision == "fp8":
            convert_to_fp8(model)
        axes = layout.axes(device)
        self.device, self.row, self.data_group = device, axes.data.get_local_rank(), axes.data.get_group()
        schedule = layout.pipeline(recipe) if layout.pp > 1 else None
        self.parts = layout.parts(model, axes.pp.get_local_rank(), schedule)
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
        """Keep of what other ranks hold the names and shapes only."""
        held = {module for part in self.parts for module in part.modules()}
        for module in model.modules():
            if module not in held and not held & set(module.modules()):
                module.to("meta").requires_grad_(False)

    def backward(self, batch: Batch, mtp_weight: float, share: Share | None = None) -> tuple[Losses, Tensor | None]:
        share, mine = Share.of(batch), self.rows(batch)
        if self.pipeline is None:
            sums, loads = super().backward(mine, mtp_weight, share)
        else:
            sums, loads = self._run_pipeline(mine, mtp_weight, share)
        values = torch.stack([getattr(sums, f.name) for f in dataclasses.fields(Losses)])
        dist.all_reduce(values, group=self.data_group)
        if loads is not None:
            dist.all_reduce(loads, group=self.data_group)
        return Losses(*values), loads

    def _run_pipeline(self, batch: Batch, mtp_weight: float, share: Share) -> tuple[Losses, Tensor | None]:
        heard = torch.zeros(3, dtype=torch.float64, device=self.device)

        def loss(out, micro):
            part = losses(self.model, out, micro, share)
            total = part.total(mtp_weight)
            heard.add_(torch.stack((part.main, part.mtp, total)).detach())
            return total

        self.pipeline.loss = loss
        micros = list(micro_batches(self._on_device(batch), self.pipeline.shape[0]))
        total, loads, _ = self.pipeline.step([micro.tokens[:, :-1] for micro in micros], micros)
        dist.all_reduce(heard, group=self.pipeline.group)
        main, mtp, without_balance = heard
        return Losses(main, mtp, total - without_balance), loads if len(loads) else None

    def rows(self, batch: Batch) -> Batch:
        """This rank's rows; where they are not a multiple of the ranks, rows without a target fill up."""
        missing = -len(batch.tokens) % self.layout.replicas
        tokens, documents, domains = (
            torch.cat((part, part[:1].expand(missing, -1))) for part in (batch.tokens, batch.documents, batch.domains)
        )
        if missing:
            documents[-missing:] = torch.arange(documents.shape[1])  # every token a document of its own
        mine = slice(self.row, None, self.layout.replicas)
        return Batch(tokens[mine], documents[mine], domains[mine])

    def _on_device(self, batch: Batch) -> Batch:
        return Batch(batch.tokens.to(self.device), batch.documents.to(self.device), batch.domains)

    def clip_gradients(self) -> float:
        """The norm over all ranks, whose shards are disjoint; of a parameter on two ranks the lower one counts."""
        gradients = {name: local(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}
        twins = self.pipeline.twins.items() if self.pipeline else ()
        elsewhere = {name for rank, names in twins if rank < self.pipeline.rank for name in names}
        squares = (gradient.double().square().sum() for name, gradient in gradients.items() if name not in elsewhere)
        total = sum(squares, torch.zeros((), dtype=torch.float64, device=self.device))
        dist.all_reduce(total)
        norm = total.sqrt().item()
        torch._foreach_mul_(list(gradients.values()), min(self.recipe.clip_norm / (norm + 1e-6), 1.0))
        return norm

    def should_stop(self, requested: bool) -> bool:
        """All stop before the same step as soon as one was asked to."""
        asked = torch.tensor(int(requested))
        dist.all_reduce(asked)
        return bool(asked)

    def train_step(self) -> Metrics:
        """As in `Trainer`, and in the metrics what this rank alone can tell, of which rank 0's are written.

        `memory_gb`: the most that it has ever held, on a GPU of the GPU's memory. `mfu`: on an H800 (`cost.mfu` takes
        the peak of others). `exposed_communication`: the share of the step's time in which it waited for others, be it
        for their data or until they were ready; on CPUs, since a GPU's waits are not the host's.
        """
        with waits() as seconds:
            metrics = super().train_step()
        metrics |= memory(self.device)
        if self.device == "cpu":
            per_step = self.recipe.batch_size * self.recipe.seq_len
            metrics["exposed_communication"] = sum(seconds) * metrics["tokens_per_second"] / per_step
        elif torch.cuda.get_device_name() == KNOWN_PEAK:
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
            nats += self._summed_nats(self._on_device(self.rows(batch)))
            byte_count += token_bytes[labels[labels != IGNORED]].sum().item()
        reshard(self.parts)
        dist.all_reduce(nats, group=self.data_group)
        return nats.item() / math.log(2) / byte_count

    def _summed_nats(self, batch: Batch) -> float | Tensor:
        def nats(out, batch):
            return losses(self.model, out, batch, Share(1, 1)).main

        tokens = batch.tokens[:, :-1]
        return self.pipeline.evaluate(tokens, batch, nats) if self.pipeline else nats(self.model(tokens), batch)

    def load_tensors(self, folder: Path) -> None:
        """Each rank reads its shards. No step draws random numbers, so their state is left alone."""
        reader = dcp.HuggingFaceStorageReader(str(folder))
        stored = reader.read_metadata().state_dict_metadata
        model = {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta}
        wrong = [name for name, tensor in model.items() if name not in stored or stored[name].size != tensor.shape]
        if wrong:
            raise ValueError(f"{folder} is damaged: it has no {wrong[0]} of this model's shape")
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        optimizer = {}
        for key in stored:
            name, _, kind = key.rpartition("/")
            if name in trained:
                optimizer[key] = torch.zeros(1) if kind == "step" else torch.zeros_like(trained[name])
        dcp.load(model | optimizer, storage_reader=reader)
        load_optimizer_tensors(self.model, self.optimizers, optimizer)

    def run(self, **options: Any) -> list[Metrics]:
        """As in `Trainer`. Raises `ConnectionError` naming the ranks that died or do not answer."""
        try:
            return super().run(**options)
        except RuntimeError as error:
            silent = _silent_ranks()
            if not silent:
                raise
            who = ", ".join(f"rank {rank}" for rank in silent)
            reason = str(error).splitlines()[0]
            raise ConnectionError(f"{who} died or hangs since step {self.step + 1}: {reason}") from None


@contextmanager
def waits() -> Iterator[list[float]]:
    """The seconds of each wait of this process, while the block runs, for a message or a collective.

    All of them end in torch's `Work.wait`, which is replaced for so long.
    """
    wait, seconds = dist.Work.wait, []

    def timed(work: dist.Work, *arguments: Any) -> bool:
        began = time.perf_counter()
        try:
            return wait(work, *arguments)
        finally:
            seconds.append(time.perf_counter() - began)

    dist.Work.wait = timed
    try:
        yield seconds
    finally:
        dist.Work.wait = wait


def memory(device: str) -> Metrics:
    """The most that this process has held so far; on a CPU in all, where the system tells."""
    if device == "cuda":
        return {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    if resource is None:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def _silent_ranks(seconds: float = 5) -> list[int]:
    """Who does not say within `seconds` that it, too, has noticed that something is wrong."""
    store, ranks = dist.distributed_c10d._get_default_store(), range(dist.get_world_size())
    store.set(f"alive/{dist.get_rank()}", "")
    with suppress(RuntimeError):
        store.wait([f"alive/{rank}" for rank in ranks], timedelta(seconds=seconds))
    return [rank for rank in ranks if not store.check([f"alive/{rank}"])]
