"""Training with sparse attention: the warm-up of the indexers, the sparse stage, and what each of them trains."""

import dataclasses

import pytest
import torch
from training.helpers import RECIPE, counting_data, nano

from minids.fp8.linear import Fp8Linear
from minids.model.kv_cache import IndexerTraining
from minids.training import loss as loss_module
from minids.training.loss import LossDenominators, losses
from minids.training.pretrain import Trainer, train, training_batches

SPARSE = dict(index_topk=6, index_n_heads=16, index_head_dim=8)
WARM_UP = dataclasses.replace(RECIPE, index_stage="dense_warmup", learning_rate=1e-2)


def changed(before, model):
    """Names of the parameters that are not what they were."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def warmed():
    """A model that has learned to count densely, before and after a warm-up of its indexers; and the metrics."""
    torch.manual_seed(0)
    model, data = nano(index_topk=1000, index_n_heads=16, index_head_dim=8), counting_data()
    train(model, data, dataclasses.replace(RECIPE, steps=30, learning_rate=1e-2), progress=False)
    before = copied(model)
    history = train(model, data, dataclasses.replace(WARM_UP, steps=20), progress=False)
    return before, model, history


def test_warm_up_changes_the_indexers_and_nothing_else(warmed):
    before, model, history = warmed
    assert changed(before, model) == {name for name in before if ".indexer." in name}
    assert history[-1]["indexer_loss"] < 0.6 * history[0]["indexer_loss"]


def test_sparse_stage_trains_everything_after_a_warm_up(warmed):
    _, model, _ = warmed
    before = copied(model)
    trainer = Trainer(model, counting_data(), RECIPE)  # the same model, still frozen by the warm-up
    trainer.train_step()
    assert changed(before, model) == before.keys()


def test_loss_of_the_indexers_falls_in_the_sparse_stage_too():
    history = train(nano(**SPARSE), counting_data(), dataclasses.replace(RECIPE, steps=20), progress=False)
    assert history[-1]["indexer_loss"] < history[0]["indexer_loss"]


def test_without_its_loss_an_indexer_never_learns(monkeypatch):
    """The planted mistake: the choice of tokens passes no gradient, so only the loss can train an indexer."""

    def indexers_learn():
        model = nano(**SPARSE)
        before = copied(model)
        Trainer(model, counting_data(), dataclasses.replace(RECIPE, weight_decay=0.0)).train_step()
        return any(".indexer." in name for name in changed(before, model))

    assert indexers_learn()

    def without(self, mtp_weight):
        return self.main + mtp_weight * self.mtp + self.balance

    monkeypatch.setattr(loss_module.Losses, "total", without)
    assert not indexers_learn()


def test_the_loss_is_a_sum_over_layers_and_a_mean_over_queries():
    model = nano(**SPARSE, num_nextn_predict_layers=1)
    batch = training_batches(counting_data(), RECIPE).batch(0)
    share = LossDenominators.of(batch)
    whole = model(batch.tokens[:, :-1], mtp=True, indexer=IndexerTraining("sparse"))
    assert len(whole.indexer_losses) == 3
    expected = losses(model, whole, batch, share).indexer
    torch.testing.assert_close(expected, sum(whole.indexer_losses))
    parts = [
        losses(model, model(part.tokens[:, :-1], mtp=True, indexer=IndexerTraining("sparse")), part, share).indexer
        for part in batch.micro_batches(1)
    ]
    torch.testing.assert_close(sum(parts), expected)


@pytest.mark.parametrize("stage", ["dense_warmup", "sparse"])
def test_micro_batches_equal_the_big_batch(stage):
    recipe = dataclasses.replace(RECIPE, index_stage=stage)
    gradients = []
    for size in (None, 1, 3):
        torch.manual_seed(0)
        trainer = Trainer(nano(**SPARSE), counting_data(), dataclasses.replace(recipe, micro_batch_size=size))
        sums, _ = trainer.backward(trainer.stream.batch(0), 0.3)
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
        gradients[-1]["indexer loss"] = sums.indexer
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", ["dense_warmup", "sparse"])
def test_resumed_equals_uninterrupted(tmp_path, stage):
    recipe = dataclasses.replace(RECIPE, index_stage=stage, steps=5)

    def run(directory, **options):
        torch.manual_seed(0)
        model = nano(**SPARSE)
        history = train(model, counting_data(), recipe, directory=tmp_path / directory, progress=False, **options)
        return model, [metrics["indexer_loss"] for metrics in history]

    def stop(metrics):
        if metrics["step"] == 4:  # the newest checkpoint is that of step 3
            raise KeyboardInterrupt

    whole, figures = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", on_step=stop)
    resumed, later = run("cut")
    assert later == figures[3:]
    assert not changed(copied(whole), resumed)


def test_metrics_name_the_loss_where_there_are_indexers():
    assert "indexer_loss" in Trainer(nano(**SPARSE), counting_data(), RECIPE).train_step()
    assert "indexer_loss" not in Trainer(nano(), counting_data(), RECIPE).train_step()


def test_a_warm_up_without_indexers_is_refused():
    with pytest.raises(ValueError, match="^index_stage='dense_warmup': needs a model with indexers, so an index_topk$"):
        Trainer(nano(), counting_data(), WARM_UP)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("stage", ["dense_warmup", "sparse"])
def test_fewer_bits_train_too(stage, precision):
    model = nano(**SPARSE)
    recipe = dataclasses.replace(RECIPE, index_stage=stage, precision=precision)
    metrics = Trainer(model, counting_data(), recipe).train_step()
    assert 0 < metrics["indexer_loss"] < 10
    indexer = model.layers[0].attention.indexer
    assert isinstance(indexer.q_proj, Fp8Linear) == (precision == "fp8")
    assert indexer.head_weights.dtype == torch.float32
