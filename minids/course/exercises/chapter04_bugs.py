"""What the tests of exercises 4.6 and 4.7 are called with: an MTP module and a verification, correct or not."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minids.config import ModelConfig
from minids.model.transformer import MiniDS


@functools.cache
def small_model() -> MiniDS:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ModelConfig.preset("nano", vocab_size=16, num_hidden_layers=1, first_k_dense_replace=1)
        return MiniDS(config).double().eval()


def predictor(received: Callable = lambda t: t[:, 1:], masked: bool = True, weight: float = 1.0) -> Callable:
    """A function from tokens to the logits of depth 1, correct or not; `received` picks the module's input tokens."""

    @torch.no_grad()
    def predict(tokens: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens_less_1 vocab"]:
        model, module = small_model(), small_model().mtp[0]
        hidden, following = model.trunk(tokens[None])[0][:, :-1], received(tokens[None])
        context = model.attention_context(following)
        if not masked:
            context = replace(context, mask=hidden.new_zeros(1, 1, hidden.shape[1], hidden.shape[1]))
        hidden, _ = module(hidden, weight * model.embedding(following), context)
        return model.head(module.norm(hidden))[0]

    return predict


def verify_with(keeps: Callable, in_order: bool = True) -> Callable:
    """A `verify` that accepts drafts by another rule, and draws the token after them from the model's distribution."""

    def verify(drafts, draft_chances, chances, generator=None):
        p, q = (c[:, : drafts.shape[1]].gather(-1, drafts[..., None])[..., 0] for c in (chances, draft_chances))
        fits = keeps(p, q, torch.rand(drafts.shape, generator=generator)).long()
        kept = (fits.cumprod(1) if in_order else fits).sum(1)
        final = torch.multinomial(chances[torch.arange(len(drafts)), kept], 1, generator=generator)
        return torch.cat((drafts, final), 1).scatter(1, kept[:, None], final), kept + 1

    return verify
