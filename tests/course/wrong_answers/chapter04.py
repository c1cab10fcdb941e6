"""Wrong answers to the exercises of chapter 04."""

import torch
import torch.nn.functional as F

from minids.course.exercises.chapter04 import align, check_draft, import_projection, mtp_loss, speculate


def apply_released(eh_proj, enorm, hnorm):
    """Applies the projection to the gains in place of folding them in."""
    return torch.cat((hnorm, enorm)) @ eh_proj.T


def shared_reads(keep, sequences=8, per_sequence=False, layers=40):
    """An experiment in which the second token keeps each expert of the first with probability `keep`."""

    def measured(seed):
        generator = torch.Generator().manual_seed(seed)
        firsts = boths = 0
        for _ in range(layers):
            first, both = [], []
            for _ in range(sequences):
                order = torch.randperm(256, generator=generator).tolist()
                first.append(set(order[:8]))
                both.append(first[-1] | set(order[8 : 8 + int((torch.rand(8, generator=generator) >= keep).sum())]))
            firsts += sum(map(len, first)) if per_sequence else len(set().union(*first))
            boths += sum(map(len, both)) if per_sequence else len(set().union(*both))
        return boths / firsts

    return measured


def loss_of_means(logits, tokens, mtp_weight):
    losses = [F.cross_entropy(rows, tokens[k + 1 :]) for k, rows in enumerate(logits, start=1)]
    return mtp_weight * sum(losses) / len(losses)


def loss_by_wrong_depth(logits, tokens, mtp_weight):
    losses = [F.cross_entropy(rows, tokens[k + 1 :], reduction="sum") for k, rows in enumerate(logits)]
    return mtp_weight * sum(losses) / (len(tokens) - 1) / len(losses)


def draft_without_bool(p, q, draft, u):
    verdict, rest = check_draft(p, q, draft, u)
    return torch.tensor(verdict), rest


def draft_after_verdict(p, q, draft, u):
    verdict, rest = check_draft(p, q, draft, u)
    return verdict, p if verdict else rest


def speculate_with_a_pass_per_draft(best, draft, prompt, new_tokens):
    """Verifies one draft after the other, but counts a pass per round."""
    text, passes = list(prompt), 0
    while len(text) - len(prompt) < new_tokens:
        passes += 1
        for token in draft(text):
            wanted = best(text)[-1]
            text.append(wanted)
            if token != wanted:
                break
        else:
            text.append(best(text)[-1])
    return text[len(prompt) :][:new_tokens], passes


def speculate_with_two_passes_a_round(best, draft, prompt, new_tokens):
    text, passes = list(prompt), 0
    while len(text) - len(prompt) < new_tokens:
        drafts, passes = draft(text), passes + 1
        kept = 0
        while kept < len(drafts) and drafts[kept] == best(text + drafts)[len(text) - 1 + kept]:
            kept += 1
        text += drafts[:kept] + [best(text + drafts[:kept])[-1]]
    return text[len(prompt) :][:new_tokens], passes


def speculate_off_by_one(best, draft, prompt, new_tokens):
    text, passes = list(prompt), 0
    while len(text) - len(prompt) < new_tokens:
        drafts = draft(text)
        wanted = best(text + drafts)[len(text) :]
        passes, kept = passes + 1, 0
        while kept < len(drafts) and drafts[kept] == wanted[kept]:
            kept += 1
        text += wanted[: kept + 1]
    return text[len(prompt) :][:new_tokens], passes


def speculate_in_place(best, draft, prompt, new_tokens):
    tokens, passes = speculate(best, draft, prompt, new_tokens)
    prompt += tokens
    return tokens, passes


def plain_decoding(best, draft, prompt, new_tokens):
    text = list(prompt)
    for _ in range(new_tokens):
        text.append(best(text)[-1])
    return text[len(prompt) :], new_tokens


def only_the_last_token(predict):
    tokens = torch.tensor([3, 1, 4, 1, 5])
    changed = torch.tensor([3, 1, 4, 1, 9])
    assert torch.allclose(predict(tokens)[:3], predict(changed)[:3])


def only_the_shape(predict):
    assert predict(torch.arange(5)).shape == (4, 16)


def expects_a_main_model(predict):
    """Row i of the module may see token i + 1; this test forbids it."""
    tokens = torch.tensor([3, 1, 4, 1, 5])
    changed = torch.tensor([3, 1, 4, 1, 9])
    assert torch.allclose(predict(tokens), predict(changed))


def anything_moves(predict):
    assert not torch.equal(predict(torch.tensor([3, 1, 4, 1, 5])), predict(torch.tensor([3, 1, 4, 9, 5])))


def only_a_wrong_draft(verify):
    sure = torch.eye(4)[None]
    settled, count = verify(torch.tensor([[2]]), sure[:, [2]], sure[:, [3, 0]])
    assert count.item() == 1 and settled[0, 0] == 3


def only_two_drafts(verify):
    sure = torch.eye(4)[None]
    _, count = verify(torch.tensor([[2, 1]]), sure[:, [2, 1]], sure[:, [3, 1, 0]])
    assert count.item() == 1


def too_narrow_a_band(verify):
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.8])
    drafts = torch.multinomial(q, 200, replacement=True)[:, None]
    settled, _ = verify(drafts, q.expand(200, 1, 2), p.expand(200, 2, 2))
    assert abs((settled[:, 0] == 0).float().mean() - 0.5) < 1e-6


def expects_the_drafts_back(verify):
    sure = torch.eye(4)[None]
    settled, _ = verify(torch.tensor([[2]]), sure[:, [2]], sure[:, [3, 0]])
    assert settled[0, 0] == 2


WRONG = {
    "4.1": [
        ("one result", lambda t, k: t[k:-1], "should be a tuple of 2: the input tokens, the labels"),
        ("labels one too late", lambda t, k: (t[k:-1], F.pad(t[k + 2 :], (0, 1))), "the labels: .*differ"),
        ("all positions", lambda t, k: (t[k:], t[k:]), r"the input tokens should have shape \(6,\), got \(7,\)"),
        ("lists", lambda t, k: tuple(x.tolist() for x in align(t, k)), "the input tokens should be a tensor"),
        (
            "two mistakes: own label as input, the main model's label",
            lambda t, k: (t[k + 1 :], t[1 : len(t) - k]),
            "the module receives its own label and the label is the main model's",
        ),
    ],
    "4.2": [
        (
            "two mistakes: released order, gains exchanged",
            lambda w, e, h: torch.cat((w[:, : len(h)] * h, w[:, len(h) :] * e), -1),
            "the halves keep the released order and each half is scaled by the gain of the other norm",
        ),
        ("the halves of the rows", lambda w, e, h: w.roll(len(h) // 2, 0), "values differ"),
        ("applied to the gains", apply_released, r"should have shape \(4, 8\), got \(4,\)"),
        (
            "gains of the whole",
            lambda w, e, h: import_projection(w, (e + h) / 2, (e + h) / 2),
            "the result: .*values differ",
        ),
        (
            "in place",
            lambda w, e, h: w.copy_(import_projection(w, e, h)),
            "your code changed the argument `eh_proj`; return a new value instead",
        ),
    ],
    "4.3": [
        ("means", loss_of_means, "each depth is divided by its own number of labels"),
        ("a float", lambda *a: mtp_loss(*a).item(), "the result should be a tensor, got"),
        ("no gradient", lambda *a: mtp_loss(*a).detach(), "the gradient of the result with respect to `logits`"),
        ("depths from 0", loss_by_wrong_depth, "your code raised ValueError"),
        ("a loss per depth", lambda *a: mtp_loss(*a).expand(len(a[0])), r"should have shape \(\), got \(2,\)"),
        (
            "two mistakes: summed over depths, without the weight",
            lambda *a: mtp_loss(*a, average=False, weighted=False),
            "the depths are added up and not averaged and the loss is not multiplied by `mtp_weight`",
        ),
        (
            "divided by T + 1",
            lambda *a: mtp_loss(*a) * (len(a[1]) - 1) / len(a[1]),
            "by the T . 1 tokens, not by the T",
        ),
        ("base 2", lambda *a: mtp_loss(*a) / 0.6931, "the result: got .*, expected"),
    ],
    "4.4": [
        ("a tensor of bool", draft_without_bool, "the verdict: the value is correct, but return a bool, not a tensor"),
        ("p after an accepted draft", draft_after_verdict, "the distribution after a rejection: .*differ"),
        ("the verdict only", lambda *a: check_draft(*a)[0], "should be a tuple of 2: the verdict, the distribution"),
        (
            "the rejected token removed from p",
            lambda p, q, d, u: (bool(u < p[d] / q[d]), p.index_fill(0, torch.tensor(d), 0) / (1 - p[d])),
            "a rejection is drawn from p without the rejected token",
        ),
        ("not normalised", lambda p, q, d, u: (bool(u < p[d] / q[d]), (p - q).clamp(min=0)), "does not sum to 1"),
        (
            "two mistakes: inverted, |p - q|",
            lambda p, q, d, u: (bool(u < q[d] / p[d]), (p - q).abs() / (p - q).abs().sum()),
            "the ratio is inverted, q / p and a rejection is drawn from",
        ),
        (
            "softmax of the rest",
            lambda p, q, d, u: (check_draft(p, q, d, u)[0], (p - q).softmax(0)),
            "after a rejection",
        ),
    ],
    "4.5": [
        (
            "a pass per draft",
            speculate_with_a_pass_per_draft,
            "it reports . passes and calls `best` .* times; a call is a",
        ),
        ("two passes a round", speculate_with_two_passes_a_round, "the result is correct, but it reports"),
        ("the prompt grows", speculate_in_place, "your code changed the argument `prompt`; return a new value instead"),
        ("off by one", speculate_off_by_one, "the new tokens.*got .*, expected|your code raised IndexError"),
        ("plain decoding", plain_decoding, r"the number of passes: got 9, expected"),
        ("with the prompt", lambda b, d, p, n: (p + speculate(b, d, p, n)[0], 0), "the new tokens should have 9 parts"),
        ("a tensor", lambda *a: (torch.tensor(speculate(*a)[0]), 5), "the new tokens should be a list of 9"),
        (
            "two mistakes: unverified, over the limit",
            lambda *a: speculate(*a, verified=False, cut=False),
            "the drafts are accepted without verification and the last round runs over the limit",
        ),
    ],
    "4.6": [
        ("only the last token", only_the_last_token, "it misses a bug; hint: row i must depend on token i . 1"),
        ("only the shape", only_the_shape, "it accepts everything so far"),
        ("too strict", expects_a_main_model, "it rejects the correct implementation"),
        ("anything moves", anything_moves, "it misses a bug; hint: change the last token"),
    ],
    "4.7": [
        ("a wrong draft only", only_a_wrong_draft, "it misses a bug; hint: count the first token of many rounds"),
        ("two drafts only", only_two_drafts, "it misses a bug; hint: count the first token"),
        ("too narrow a band", too_narrow_a_band, "it rejects the correct implementation"),
        ("too strict: a rejected draft", expects_the_drafts_back, "it rejects the correct implementation"),
    ],
    "4.8": [
        ("independent tokens", shared_reads(0.0), "expected: a median between 1.38 and 1.45"),
        ("the same experts", shared_reads(1.0), "expected: a median between 1.38 and 1.45"),
        ("one sequence", shared_reads(0.5, sequences=1), "expected: a median between 1.38 and 1.45"),
        ("per sequence, without overlap", shared_reads(0.5, per_sequence=True), "expected: a median between 1.38"),
        ("not a number", lambda seed: None, "the function should return a float"),
    ],
}
