import dataclasses
import json
import shutil
import signal

import pytest
import torch
from training.helpers import RECIPE, counting_data, nano

from minids.data.batches import Batch
from minids.training.checkpoint import latest_checkpoint
from minids.training.loop import Diverged
from minids.training.metrics import cut_metrics
from minids.training.pretrain import Recipe, Trainer, train
from minids.training.run import load_run

SAME_WHEN_RESUMED = ("step", "loss", "mtp_loss", "balance_loss", "gradient_norm", "max_violation", "learning_rate")


def figures(history):
    return [{key: m[key] for key in SAME_WHEN_RESUMED} for m in history]


def test_the_model_learns_to_count():
    history = train(nano(), counting_data(), dataclasses.replace(RECIPE, steps=120, learning_rate=1e-2), progress=False)
    assert history[0]["loss"] > 5 and history[-1]["loss"] < 1.0
    assert history[-1]["validation_bits_per_byte"] < 1.5


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_equal_the_big_batch(micro_batch_size):
    """Gradients, losses, loads and so the balancing bias: PITFALLS 13."""
    torch.manual_seed(0)
    whole = Trainer(nano(aux_loss_alpha=0.1), counting_data(), RECIPE)
    torch.manual_seed(0)
    cut = Trainer(
        nano(aux_loss_alpha=0.1), counting_data(), dataclasses.replace(RECIPE, micro_batch_size=micro_batch_size)
    )
    batch = whole.stream.batch(0)
    losses, loads = whole.backward(batch, 0.3)
    cut_losses, cut_loads = cut.backward(batch, 0.3)
    assert torch.equal(loads, cut_loads)
    for field in dataclasses.fields(losses):
        torch.testing.assert_close(getattr(cut_losses, field.name), getattr(losses, field.name), rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)
    whole.train_step()
    cut.train_step()
    for a, b in zip(whole.model.routers(), cut.model.routers(), strict=True):
        assert a.bias.abs().max() > 0
        assert torch.equal(a.bias, b.bias)


def test_the_bias_moves_once_a_step_by_its_speed():
    trainer = Trainer(nano(), counting_data(), dataclasses.replace(RECIPE, micro_batch_size=1))
    trainer.train_step()
    for router in trainer.model.routers():
        moves = router.bias.abs()
        assert torch.all((moves == 0) | (moves == torch.tensor(0.001))) and moves.any()


def test_evaluation_moves_nothing():
    trainer = Trainer(nano(), counting_data(), RECIPE)
    trainer.train_step()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    position = trainer.stream.position
    assert trainer.evaluate() == trainer.evaluate()
    assert trainer.stream.position == position
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop_after", [3, 7])
def test_stopped_and_resumed_is_undisturbed(tmp_path, optimizer, stop_after):
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer)
    undisturbed = train(nano(), counting_data(), recipe, directory=tmp_path / "a", progress=False)

    def interrupt(metrics):
        if metrics["step"] == stop_after:
            signal.raise_signal(signal.SIGINT)

    torch.manual_seed(0)
    first = train(nano(), counting_data(), recipe, directory=tmp_path / "b", progress=False, on_step=interrupt)
    assert len(first) == stop_after
    torch.manual_seed(1)  # the model that is resumed into has other weights
    second = train(nano(), counting_data(), recipe, directory=tmp_path / "b", progress=False)
    assert figures(first + second) == figures(undisturbed)
    written = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert figures(written) == figures(undisturbed)


def test_a_line_half_written_when_killed_is_cut(tmp_path):
    train(nano(), counting_data(), RECIPE, directory=tmp_path, progress=False)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:8]) + lines[8][:20])
    cut_metrics(path, 6)
    assert path.read_text() == "".join(lines[:6])


def test_only_the_two_newest_checkpoints_stay(tmp_path):
    train(nano(), counting_data(), RECIPE, directory=tmp_path, progress=False)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000012"


def test_an_exploding_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    model = nano()

    def poison(metrics):
        if metrics["step"] == 5:
            with torch.no_grad():
                model.head.weight[0, 0] = float("nan")

    with pytest.raises(Diverged, match="step 6 .*learning_rate"):
        train(model, counting_data(), RECIPE, directory=tmp_path, progress=False, on_step=poison)
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000003"
    resumed = train(nano(), counting_data(), RECIPE, directory=tmp_path, progress=False)
    assert [m["step"] for m in resumed] == list(range(4, 13))


def test_a_loss_far_worse_than_guessing_is_an_explosion():
    trainer = Trainer(nano(), counting_data(), RECIPE)
    with torch.no_grad():
        trainer.model.head.weight.mul_(1e4)
    before = trainer.model.head.weight.clone()
    with pytest.raises(Diverged, match="step 1"):
        trainer.train_step()
    assert torch.equal(before, trainer.model.head.weight)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_fewer_bits_train_close_to_float32(precision):
    fewer = train(nano(), counting_data(), dataclasses.replace(RECIPE, precision=precision), progress=False)
    torch.manual_seed(0)
    full = train(nano(), counting_data(), RECIPE, progress=False)
    assert fewer[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=0.02)
    assert [m["loss"] for m in fewer] != [m["loss"] for m in full]


def test_fp8_resumes_undisturbed_and_is_loaded_as_fp8(tmp_path):
    recipe = dataclasses.replace(RECIPE, precision="fp8", moments="bf16", checkpoint_every=5)
    data = counting_data()
    undisturbed = train(nano(), data, recipe, directory=tmp_path / "a", progress=False)
    shutil.rmtree(tmp_path / "a" / "checkpoints" / f"step-{recipe.steps:08d}")
    resumed = train(nano(), data, recipe, directory=tmp_path / "a", progress=False)
    assert figures(resumed) == figures(undisturbed[-len(resumed) :]) and 0 < len(resumed) < recipe.steps
    data.tokenizer.save(tmp_path / "a")
    model, _ = load_run(tmp_path / "a")
    assert sum(precision.startswith("E4M3") for precision in model.precision_report().values()) > 5


def test_a_resume_with_other_settings_is_refused(tmp_path):
    train(nano(), counting_data(), dataclasses.replace(RECIPE, steps=3), directory=tmp_path, progress=False)
    with pytest.raises(ValueError, match="seq_len=16: the run was started with 32"):
        other = dataclasses.replace(RECIPE, steps=3, seq_len=16)
        train(nano(), counting_data(), other, directory=tmp_path, progress=False)
    with pytest.raises(ValueError, match="another config"):
        recipe = dataclasses.replace(RECIPE, steps=3)
        train(nano(n_shared_experts=2), counting_data(), recipe, directory=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("seq_len", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", 0.0),
        ("clip_norm", -1.0),
        ("weight_decay", -0.1),
        ("mtp_weight", float("inf")),
        ("micro_batch_size", 0),
        ("checkpoint_every", 0),
    ],
)
def test_bad_recipes_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        dataclasses.replace(Recipe(), **{field: value})


def test_a_step_gives_every_group_of_every_optimizer_its_learning_rate():
    trainer = Trainer(nano(), counting_data(), dataclasses.replace(RECIPE, optimizer="muon"))
    trainer.optimizer_step(0.5)
    assert len(trainer.optimizers) == 2
    assert {group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups} == {0.5}


def test_text_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="seq_len=32: the context holds 16"):
        Trainer(nano(max_position_embeddings=16), counting_data(), RECIPE)
    with pytest.raises(ValueError, match="vocab_size=256: the tokenizer has 265"):
        Trainer(nano(vocab_size=256), counting_data(), RECIPE)


def test_micro_batches_cover_the_batch_in_order():
    batch = Batch(*(torch.arange(10).view(5, 2) + 100 * i for i in range(3)))
    parts = list(batch.micro_batches(2))
    assert [len(part.tokens) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.domains for part in parts]), batch.domains)
