import dataclasses
import random
import zlib

import pytest
import torch

from minids.data.tokenizer import ByteTokenizer
from minids.model.transformer import MiniDS
from minids.reasoning import r1_zero
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, RuleReward, read_response
from minids.reasoning.sft import (
    Example,
    ExampleStream,
    SFTTrainer,
    as_lines,
    careful_solutions,
    read_examples,
    sft_recipe,
)
from minids.reasoning.tasks import Problem, TraceTask
from minids.training.loss import IGNORED, LossDenominators, targets

TASK = TraceTask()
TOKENIZER = TASK.tokenizer
TEXT = r1_zero.pretraining_text(TASK, rows=20)
EXAMPLES = careful_solutions(TASK, random.Random(0), 7, (1, 2, 5), widths=(1,))


def small_model(seed=0):
    torch.manual_seed(seed)
    config = r1_zero.base_config(TOKENIZER.vocab_size)
    return MiniDS(config.replace(hidden_size=32, moe_intermediate_size=32, num_hidden_layers=2))


def stream(examples=EXAMPLES, **changes):
    return ExampleStream(examples, TOKENIZER, **dict(batch_size=3, seq_len=96, seed=0) | changes)


def trainer(examples=EXAMPLES, **changes):
    recipe = sft_recipe(len(examples), epochs=3, learning_rate=1e-2, batch_size=4)
    return SFTTrainer(small_model(), examples, TEXT, dataclasses.replace(recipe, evaluation_batches=1, **changes))


def answer_losses(model, examples):
    """The answers' losses one by one, each without padding: from the sequence, never from a mask."""
    losses = []
    for example in examples:
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(example.prompt)]
        first = len(ids)
        ids += [*TOKENIZER.encode(example.answer, allow_special=True), TOKENIZER.eos_id]
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logp[place - 1, ids[place]] for place in range(first, len(ids))]
    return torch.stack(losses)


# The rows and their mask


def test_the_targets_are_the_answers_and_their_ends():
    rows = stream().batch(0)
    for tokens, labels in zip(rows.tokens, targets(rows), strict=True):
        text = TOKENIZER.decode(tokens, skip_special=False)
        learned = TOKENIZER.decode(labels[labels != IGNORED], skip_special=False)
        prompt, question, rest = text.partition("?")
        assert prompt.startswith("<bos>") and question
        assert learned == rest.replace("<pad>", "")
        assert learned.startswith("<think>") and learned.endswith("</answer><eos>")


def test_an_answer_without_tags_and_an_empty_prompt_are_masked_alike():
    examples = [Example("", "<think></think>18"), Example("a7 b+8?", "")]
    labels = targets(stream(examples, batch_size=2, seq_len=12).batch(0))
    lengths = {TOKENIZER.decode(row[row != IGNORED], skip_special=False) for row in labels}
    assert lengths == {"<think></think>18<eos>", "<eos>"}


def test_loss_and_gradient_are_those_of_the_answers_one_by_one():
    learner = trainer()
    batch = learner.stream.batch(0)
    sums, _ = learner.backward(batch, mtp_weight=0.0)
    shown = [TOKENIZER.decode(row) for row in batch.tokens]
    examples = [next(e for e in EXAMPLES if text.startswith(e.prompt)) for text in shown]
    twin = small_model()
    expected = answer_losses(twin, examples).mean()
    expected.backward()
    assert sums.main.item() == pytest.approx(expected.item(), abs=1e-5)
    assert sums.mtp == 0 and sums.balance == 0
    for found, wanted in zip(learner.model.parameters(), twin.parameters(), strict=True):
        if found.requires_grad:
            torch.testing.assert_close(found.grad, wanted.grad, atol=1e-5, rtol=1e-4)


def test_micro_batches_do_not_change_the_gradient():
    gradients = []
    for size in (None, 1):
        learner = trainer(micro_batch_size=size)
        learner.backward(learner.stream.batch(0), mtp_weight=0.0)
        gradients.append([p.grad.clone() for p in learner.model.parameters() if p.requires_grad])
    for whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-4)


def test_what_stands_in_the_padding_does_not_matter():
    batch = stream().batch(0)
    model = small_model()
    scribbled = dataclasses.replace(
        batch, tokens=batch.tokens.where(batch.tokens != TOKENIZER.pad_id, torch.randint(0, 40, batch.tokens.shape))
    )
    labels = targets(batch)
    assert torch.equal(labels, targets(scribbled))
    found, wanted = (model(b.tokens[:, :-1]).logits[labels != IGNORED] for b in (scribbled, batch))
    torch.testing.assert_close(found, wanted)


# The order


def test_every_epoch_takes_every_example_once_in_an_order_of_its_own():
    rows = stream(batch_size=1)
    epochs = [[TOKENIZER.decode(rows.batch(e * 7 + i).tokens[0]) for i in range(7)] for e in range(3)]
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2]) and epochs[0] != epochs[1] != epochs[2]
    wide = [TOKENIZER.decode(row) for n in range(7) for row in stream().batch(n).tokens]
    assert wide == epochs[0] + epochs[1] + epochs[2]


def test_a_position_is_of_these_examples_and_this_mask():
    state = stream().state_dict()
    other = [*EXAMPLES[:-1], dataclasses.replace(EXAMPLES[-1], answer="<think></think><answer>3</answer>")]
    with pytest.raises(ValueError, match="saved data position has loss mask"):
        stream(other).load_state_dict(state)
    moved = [Example("a7 b+8?1", "5"), Example("a7 b+8?", "15")]  # the same tokens, another mask
    first, second = (stream([e]).state_dict() for e in moved)
    assert first["corpus"] == second["corpus"]
    with pytest.raises(ValueError, match="saved data position has loss mask"):
        stream([moved[0]]).load_state_dict(second)
    follower = stream()
    follower.load_state_dict(state | {"position": 5})
    assert torch.equal(next(follower).tokens, stream().batch(5).tokens)


def test_bad_examples_are_refused():
    with pytest.raises(ValueError, match="examples: must contain at least one"):
        stream([])
    with pytest.raises(ValueError, match=r"seq_len=20: example 2 has \d+ tokens, a row holds 21"):
        stream([Example("a1?", "1"), Example("a2?", "2"), EXAMPLES[2]], seq_len=20)


def test_steps_cover_the_epochs():
    assert sft_recipe(10, epochs=3, learning_rate=1e-3, batch_size=8).steps == 4  # 30 rows, 4 batches of 8
    assert sft_recipe(16, epochs=2, learning_rate=1e-3, batch_size=8).steps == 4


# Training


def test_training_teaches_the_answers_and_resumes_exactly(tmp_path):
    whole = trainer(checkpoint_every=3)
    history = whole.run(directory=tmp_path / "whole", progress=False)
    assert history[-1]["loss"] < history[0]["loss"] - 0.5 and "validation_bits_per_byte" in history[-1]

    class Killed(Exception):
        pass

    def kill(metrics):
        if metrics["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        trainer(checkpoint_every=3).run(directory=tmp_path / "cut", progress=False, on_step=kill)
    resumed = trainer(checkpoint_every=3)
    rest = resumed.run(directory=tmp_path / "cut", progress=False)
    assert [m["step"] for m in rest] == [m["step"] for m in history[3:]]
    assert [m["loss"] for m in rest] == [m["loss"] for m in history[3:]]
    for found, wanted in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_router_biases_rest():
    learner = trainer()
    before = [router.bias.clone() for router in learner.model.routers()]
    learner.run(progress=False)
    assert before and all(torch.equal(b, r.bias) for b, r in zip(before, learner.model.routers(), strict=True))


# Files and authors


def test_examples_go_to_a_file_and_back(tmp_path):
    examples = [Example("a7?", "<think> 然后\u2028</think>"), Example("", "")]
    (tmp_path / "e.jsonl").write_text(as_lines(examples))
    assert read_examples(tmp_path / "e.jsonl") == examples


def test_careful_authors_are_right_well_formed_and_english():
    examples = careful_solutions(TASK, random.Random(1), 300, (1, 3, 6), widths=(0, 1, 2))
    reward = RuleReward(R1_ZERO_WEIGHTS)
    for example in examples:
        assert zlib.crc32(example.prompt.encode()) % 10  # not held out
        response = read_response(example.tokens(TOKENIZER)[1], TOKENIZER)
        (score,) = reward([Problem(example.prompt, _traced(example.prompt))], [response])
        assert set(score.parts.values()) == {1.0}
    assert {example.prompt.count(" ") for example in examples} == {1, 3, 6}


def _traced(prompt):
    """The answer by Python itself: instructions from left to right."""
    first, *steps = prompt.removesuffix("?").split()
    value = int(first[1:])
    for step in steps:
        value = eval(f"{value}{step[1:]}")
    return str(value)


def test_any_tokenizer_will_do():
    tokenizer = ByteTokenizer()
    rows = ExampleStream([Example("2+2?", "<answer>4</answer>")], tokenizer, batch_size=1, seq_len=16, seed=0).batch(0)
    labels = targets(rows)[0]
    assert tokenizer.decode(labels[labels != IGNORED], skip_special=False) == "<answer>4</answer><eos>"
    assert LossDenominators.of(rows).targets == 4
