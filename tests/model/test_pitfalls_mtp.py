"""Multi-token prediction: planted mistakes in what a depth reads, caught (PITFALLS 17, 18)."""

import dataclasses
from types import SimpleNamespace

import plain_model as plain
import torch
import torch.nn.functional as F
from pitfalls import after_init, assert_caught, close, each_mistake
from plain_model import NANO, build, random_stream, random_tokens
from torch import nn

from minids.model.mtp import MTPModule
from minids.model.transformer import MiniDS

# 17. The order of the two halves that the MTP projection reads -----------------------------------------------------


def check_17_projection_reads_hidden_then_embedding():
    model = build()
    module, context = model.mtp[0], model.attention_context(random_tokens(1, 4))
    hidden, embedding, other = (random_stream(1, 4, 64, seed=s) for s in (1, 2, 3))
    weight = module.proj.weight.detach().clone()
    module.proj.weight.data[:, 64:] = 0  # only the first half reads
    close(module(hidden, embedding, context)[0], module(hidden, other, context)[0], 0)
    assert (module(hidden, embedding, context)[0] - module(other, embedding, context)[0]).abs().max() > 0.01
    module.proj.weight.data.copy_(weight)[:, :64] = 0  # only the second half
    close(module(hidden, embedding, context)[0], module(other, embedding, context)[0], 0)
    assert (module(hidden, embedding, context)[0] - module(hidden, other, context)[0]).abs().max() > 0.01
    module.proj.weight.data.copy_(weight)
    check_18_equals_plain(depths=1)


def plant_module(mp, hidden=lambda self, h: self.hidden_norm(h), embedding=lambda self, e: self.embedding_norm(e),
                 join=lambda h, e: (h, e), step_of=lambda context: context):  # fmt: skip
    def forward(self, h, e, context, cache=None):
        joined = torch.cat(join(hidden(self, h), embedding(self, e)), -1)
        return self.block(self.proj(joined), step_of(context), cache)

    mp.setattr(MTPModule, "forward", forward)


def plant_embedding_before_hidden(mp):
    plant_module(mp, join=lambda h, e: (e, h))


def plant_no_norm_on_the_hidden_state(mp):
    plant_module(mp, hidden=lambda self, h: h)


def plant_no_norm_on_the_embedding(mp):
    plant_module(mp, embedding=lambda self, e: e)


# 18. Which tokens a depth reads, and what it may not see -----------------------------------------------------------


DEEP = NANO.replace(num_nextn_predict_layers=2)


def check_18_depth_k_reads_token_i_plus_k_and_not_its_label():
    model, tokens = build(DEEP), random_tokens(1, 7)
    with torch.no_grad():
        base = model(tokens, mtp=True)
        for j in range(2, 7):
            other = tokens.clone()
            other[0, j] = (tokens[0, j] + 1) % 272
            out = model(other, mtp=True)
            pairs = zip([base.logits, *base.mtp_logits], [out.logits, *out.mtp_logits], strict=True)
            for k, (x, y) in enumerate(pairs):
                moved = (x - y).abs().amax(-1)[0]
                assert (moved[: j - k] < 1e-9).all(), "an output moved that must not know this token"
                assert moved[j - k] > 1e-6, "the first output that may know this token does not"


def check_18_equals_plain(depths=2):
    model, tokens = build(NANO.replace(num_nextn_predict_layers=depths)), random_tokens(1, 6)
    with torch.no_grad():
        out = model(tokens, mtp=True)
        logits, further, _ = plain.forward(model, tokens[0].tolist())
    close(out.logits[0], logits)
    for got, want in zip(out.mtp_logits, further, strict=True):
        close(got[0], want)


def plant_block_without_a_causal_mask(mp):
    def unmasked(context):
        batch, seq = context.positions.shape
        return dataclasses.replace(context, mask=torch.zeros(batch, 1, seq, seq, dtype=torch.float64))

    plant_module(mp, step_of=unmasked)


def plant_embedding_ignored(mp):
    plant_module(mp, embedding=lambda self, e: torch.zeros_like(e))


def plant_hidden_ignored(mp):
    plant_module(mp, hidden=lambda self, h: torch.zeros_like(h))


def plant_rolled_positions(mp):
    """The rotation rolled along with the tokens, so that the last position becomes the first."""

    def rolled(context):
        positions, rotation = context.positions.roll(-1, 1), context.rotation.roll(-1, 1)
        return dataclasses.replace(context, positions=positions, rotation=rotation)

    plant_module(mp, step_of=rolled)


def plant_further(mp, following=lambda t, k: t[:, k:], before=None, logits=None):
    """Prediction modules that read other tokens, continue from another stream or end in another head."""

    def predict_further(self, tokens, out, indexer=None):
        hidden = out.hidden
        for k, module in enumerate(self.mtp, start=1):
            read = following(tokens, k)
            start = hidden[:, :-1] if before is None else before(self, out, k)
            hidden, routing = module(start, self.embedding(read), self.attention_context(read))
            out.mtp_logits.append((logits or (lambda s, m, h: s.head(m.norm(h))))(self, module, hidden))
            out.routings.append(routing)

    mp.setattr(MiniDS, "_predict_further", predict_further)


def plant_embedding_of_the_label(mp):
    plant_further(mp, lambda tokens, k: tokens.roll(-k - 1, 1)[:, : tokens.shape[1] - k])


def plant_embedding_of_the_token_before(mp):
    plant_further(mp, lambda tokens, k: tokens[:, k - 1 : -1])


def plant_every_depth_reads_the_next_token(mp):
    plant_further(mp, lambda tokens, k: tokens[:, 1 : tokens.shape[1] - k + 1])


def plant_every_depth_starts_from_the_main_model(mp):
    plant_further(mp, before=lambda self, out, k: out.hidden[:, :-k])


def plant_stream_after_the_final_norm(mp):
    plant_further(mp, before=lambda self, out, k: self.norm(out.hidden)[:, :-k])


def plant_final_norm_of_the_main_model(mp):
    plant_further(mp, logits=lambda self, module, hidden: self.logits(hidden))


def check_18_embedding_and_head_are_the_main_models():
    model, tokens = build(DEEP), random_tokens(1, 6)
    shaped_by_vocabulary = [name for name, p in model.mtp.named_parameters() if 272 in p.shape]
    assert shaped_by_vocabulary == []
    before = model(tokens, mtp=True).mtp_logits
    model.head.weight.data.mul_(2)
    for old, new in zip(before, model(tokens, mtp=True).mtp_logits, strict=True):
        close(new, 2 * old)


def plant_own_head(mp):
    def add(self):
        self.own_head = nn.Linear(64, 272, bias=False)

    after_init(mp, MTPModule, add)
    plant_further(mp, logits=lambda self, module, hidden: module.own_head(module.norm(hidden)))


def plant_copied_head(mp):
    """The head's values at the start, not the head: invisible to a count of vocabulary-sized parameters."""
    after_init(mp, MiniDS, lambda self: setattr(self, "copied", SimpleNamespace(weight=self.head.weight.data.clone())))
    plant_further(
        mp, logits=lambda self, module, h: F.linear(module.norm(h), self.copied.weight.to(self.head.weight.dtype))
    )


# The table ---------------------------------------------------------------------------------------------------------

PITFALLS = [
    (17, check_17_projection_reads_hidden_then_embedding, {
        "[embedding; hidden]": plant_embedding_before_hidden,
        "hidden not normalised": plant_no_norm_on_the_hidden_state,
        "embedding not normalised": plant_no_norm_on_the_embedding,
    }),
    (18, check_18_depth_k_reads_token_i_plus_k_and_not_its_label, {
        "no causal mask": plant_block_without_a_causal_mask,
        "embedding ignored": plant_embedding_ignored,
        "reads its label": plant_embedding_of_the_label,
        "reads t_{i+k-1}": plant_embedding_of_the_token_before,
        "every depth reads t_{i+1}": plant_every_depth_reads_the_next_token,
    }),
    (18, check_18_equals_plain, {
        "hidden state ignored": plant_hidden_ignored,
        "positions rolled": plant_rolled_positions,
        "depths in parallel": plant_every_depth_starts_from_the_main_model,
        "stream after the final norm": plant_stream_after_the_final_norm,
        "the main model's final norm": plant_final_norm_of_the_main_model,
    }),
    (18, check_18_embedding_and_head_are_the_main_models, {
        "a head of its own": plant_own_head,
        "a copy of the head": plant_copied_head,
    }),
]  # fmt: skip


@each_mistake(PITFALLS)
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)
