"""unisd.py - the method: several readings of one answer become one scalar.

A student wrote an answer. The same tokens are read again: by the student (question alone), by the teacher (question +
reference), by the teacher under K other contexts (each a solved example, then question + reference: agreement), and by the
teacher who was given a wrong reference (contrast).
Why the student's own answer? A model that imitates other texts is never corrected after its own mistakes, yet that is where it
will be when it answers alone. So the student writes, and the teacher says for each place *that the student reached* what should
come next. To the gradient the written tokens are constants: it flows through their probabilities, not through the drawing.
UniSD (arXiv 2605.06597), eq. 1 with the clip of eq. 9, over all unmasked tokens t of one optimizer step:

    L = sum_t share_t * w_div * min(D_t, kappa)                            share_t       = mask_t w_t / sum mask w
      + sum_t plain_share_t * (w_contrast C_t + w_match F_t + w_nll X_t)   plain_share_t = mask_t / sum mask

D divergence, C contrast, F features (losses.py), X = -log p_student(y_t), the cross-entropy of the baselines; w reliability
(agreement.py). In the code m is a Mechanisms: what is switched on. It exists because the method is *this sum*: every
recipe of the paper's table is a setting of it, and everything else in the project only makes its inputs or makes it cheap.

Read in order: Mechanisms and RECIPES (what can be switched), read and score_teachers (who reads what), weigh (how far a token
is trusted), objective (eq. 1). This file knows one process and whole tensors; engine/ calls the same functions on pieces of a
step and on several processes, and tests hold the two equal.

Depends on torch, losses.py, agreement.py.   Try it:  python unisd.py
Shapes: B sequences, T completion tokens, V vocabulary, H hidden size, K contexts; N = the unmasked tokens of all B sequences,
end to end; n = any piece of those N.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import agreement
import losses


def opt(default, help: str, choices: tuple = ()):
    """A setting: its default, what --help says, and what it may be. Every setting of a training run is declared through this."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Mechanisms:
    """What the loss is made of. 0 or "none" is off, and what is off costs nothing."""

    w_div: float = opt(1.0, "weight of the divergence to the teacher, eq. 1 (0 = off)")
    divergence: str = opt(
        "forward", "forward = KL(teacher||student), reverse = KL(student||teacher), jsd = eq. 7", ("forward", "reverse", "jsd")
    )
    alpha: float = opt(0.5, "jsd only: weight of the teacher in the mixture, strictly between 0 and 1")
    estimator: str = opt(
        "full",
        "full = whole vocabulary; top-k = the teacher's k tokens + one tail bucket; sampled = the sampled token only",
        ("full", "top-k", "sampled"),
    )
    top_k: int = opt(100, "estimator top-k only: tokens kept")
    clip: float = opt(0.0, "static ceiling on each token's divergence, in nats, eq. 9 (0 = off)")
    clip_quantile: float = opt(0.0, "ceiling at this quantile of the step's D; one more student pass (0 = off)")
    agreement: str = opt("none", "weigh by how far K contexts agree, eq. 2", ("none", "token", "sequence"))
    gamma: float = opt(0.01, "strength of the agreement weights (0 = off)")
    stat: str = opt("var", "disagreement of the K readings: variance or range of log p, or variance of p", ("var", "range", "prob"))
    normalizer: str = opt("batch", "mean over the step, or of sequences' means (official: weights cancel)", ("batch", "sequence"))
    w_contrast: float = opt(0.0, "weight of the token contrast with a wrong reference, eq. 5 (0 = off)")
    margin: float = opt(0.5, "contrast: by how many nats the wrong teacher should be further away")
    w_match: float = opt(0.0, "weight of final-layer feature matching, eq. 6 (0 = off)")
    w_nll: float = opt(0.0, "weight of plain cross-entropy on the completion tokens, for the baselines (0 = off)")
    distill_temperature: float = opt(1.0, "divides all logits in the divergence, the contrast, the cross-entropy")
    agreement_temperature: float = opt(1.0, "divides the teacher's logits when the K contexts are compared")
    log_entropy: bool = opt(True, "log the student's entropy; nothing is minimised by it")

    @property
    def uses_agreement(self) -> bool:
        return self.agreement != "none" and bool(self.gamma and self.w_div)

    @property
    def uses_teacher(self) -> bool:
        return bool(self.w_div or self.w_contrast or self.w_match)


# Rows of the paper's table, and of ours: what differs from plain on-policy self-distillation ("sd": the student's own answers, a
# *frozen* teacher, forward KL). There is no code behind a name: it overrides settings, here and in engine/config.py. Later ones
# win: defaults, preset (tiny: gamma = 1), recipe, a preset's own for a recipe (unisd-star: contexts for a quarter), flags.
RECIPES: dict[str, dict] = {
    # nothing is trained: the base alone, and with the reference in its prompt (the ceiling)
    "raw": dict(steps=0, epochs=0.0),
    "privileged": dict(steps=0, epochs=0.0, privileged=True),
    # baselines
    "sft": dict(on_policy=0.0, w_div=0.0, w_nll=1.0),
    # the same on correct answers in the model's own style: what imitation can do without a change of style
    "sft-worked": dict(on_policy=0.0, w_div=0.0, w_nll=1.0, sft_target="worked"),
    "ssd": dict(sampler="base", temperature=1.2, w_div=0.0, w_nll=1.0),
    # SDFT as its paper writes it; its released results used the forward KL, which is "sd"
    "sdft": dict(divergence="reverse"),
    "gkd": dict(divergence="jsd", alpha=0.5, on_policy=0.5),
    "opsd": dict(teacher="live"),
    "sd": dict(),
    # UniSD's rows; values are the paper's where it gives them
    "agree-token": dict(agreement="token"),
    "agree-seq": dict(agreement="sequence"),
    "ema": dict(teacher="ema"),
    "contrast": dict(w_contrast=0.1),
    "match": dict(w_match=0.1),
    "match-repr": dict(w_div=0.0, w_match=1.0),
    "clip": dict(clip=10.0),
    # "UniSD*", the paper's combination: EMA, token agreement, contrast, matching; no clip
    "unisd-star": dict(teacher="ema", ema_decay=0.98, agreement="token", w_contrast=0.01, margin=0.1, w_match=0.01),
}


# --- what is read: one step's answers, under several prompts ---------------------------------------------------------


@dataclass
class Batch:
    """One optimizer step's answers, and the prompts under which they are read. Prompts are lists of token ids, of any lengths."""

    student: list[list[int]]  # B prompts: the question alone
    teacher: list[list[int]]  # B prompts: question + reference
    negative: list[list[int]]  # B prompts: question + wrong reference   (may be empty when contrast is off)
    contexts: list[list[list[int]]]  # K lists of B prompts              (may be empty when agreement is off)
    ids: Tensor  # (B, T) the completions
    mask: Tensor  # (B, T) 1 up to and including the first end-of-text token, 0 after it


def read(model: nn.Module, prompts: list[list[int]], ids: Tensor, mask: Tensor) -> Tensor:
    """The final-layer states that *predict* each unmasked completion token, row after row. Differentiable.

    B prompts, (B, T), (B, T) -> (N, H)
    """
    lengths = mask.sum(1).tolist()  # the mask is 1 from a row's first token on, then 0: a length says it all
    rows = [prompt + answer[:n] for prompt, answer, n in zip(prompts, ids.tolist(), lengths, strict=True)]
    width = max(map(len, rows))
    # Padded on the right, where a causal model cannot look: no attention mask and no position ids are needed, hence none can
    # be wrong, and how much padding a batch has cannot change a result.
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=ids.device)
    states = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state  # (B, width, H)
    # The trap is a shift by one. Prompt [a b c], answer [y z]: the row is a b c y z, and the state at position 2 (over c) is
    # the one that predicts y, the state at 3 (over y) predicts z. So answer token t sits at len(prompt) - 1 + t.
    return torch.cat([row[len(p) - 1 : len(p) - 1 + n] for row, p, n in zip(states, prompts, lengths, strict=True)])


@dataclass
class Reading:
    """One named set of prompts under which the answers are read, and what is kept of each token."""

    name: str
    prompts: list[list[int]]  # B prompts
    temperature: float | None = None  # None: keep the state. A number: keep log p(y_t) at this temperature
    rows: list[int] | None = None  # which of the B sequences are read (None = all)


@dataclass
class Scores:
    """What the teachers say of a step's answers, without gradient. None = nobody asked."""

    states: Tensor | None = None  # (N, H) of the teacher who saw the reference; engine/head.py makes log-probs of them, later
    negative: Tensor | None = None  # (B, T) log p(y_t) under the teacher who saw a wrong reference
    contexts: Tensor | None = None  # (K, B, T) log p(y_t) under each of the K contexts


def context_readings(batch: Batch, m: Mechanisms, rows: list[int] | None = None) -> list[Reading]:
    """The K readings that agreement compares, of all sequences or of some `rows`."""
    return [Reading(f"context {k}", p, m.agreement_temperature, rows) for k, p in enumerate(batch.contexts)]


@torch.no_grad()
def score_teachers(read_all: Callable, batch: Batch, m: Mechanisms, with_contexts: bool = True) -> Scores:
    """Let the teacher read the student's answers under every prompt that the settings need, one Reading each.

    read_all(list of Reading) -> {name: Tensor}: `read_plainly` below, or engine/reading.py's, which packs all rows into few passes.
    Call it while the model *is* the teacher (`with run.teacher():`); nothing of the student may run in there.
    """
    readings, contexts = [], []
    if m.uses_teacher:
        # Its whole distribution is needed, but V numbers a token are too many to keep (V = 151,936 and 2,000 tokens: 1.2 GB).
        # So its *state* is kept (H = 896 numbers a token); the head, the last layer (H -> V), is applied when they are wanted.
        readings.append(Reading("teacher", batch.teacher))
    if m.w_contrast:
        # One number a token is enough: the contrast looks at nothing but the token that was written.
        readings.append(Reading("negative", batch.negative, m.distill_temperature))
    if m.uses_agreement and with_contexts:
        contexts = context_readings(batch, m)
    kept = read_all(readings + contexts)
    stacked = torch.stack([kept[reading.name] for reading in contexts]) if contexts else None
    return Scores(kept.get("teacher"), kept.get("negative"), stacked)


def read_plainly(model: nn.Module, head: Callable, batch: Batch) -> Callable:
    """The obvious reader: one forward pass a reading, whole log-probabilities. -> read_all for `score_teachers`

    head(states (n, H), temperature) -> log-probs (n, V). Fine for a notebook; its (N, V) is what engine/reading.py avoids.
    """

    def read_all(readings: list[Reading]) -> dict[str, Tensor]:
        kept = {}
        for reading in readings:
            mask = batch.mask.clone()
            if reading.rows is not None:  # the other sequences count as empty
                mask[[b for b in range(len(mask)) if b not in reading.rows]] = 0
            states = read(model, reading.prompts, batch.ids, mask)  # (N, H)
            if reading.temperature is None:
                kept[reading.name] = states
            else:
                written = losses.token_logps(head(states, reading.temperature), batch.ids[mask.bool()])  # (N,)
                kept[reading.name] = written.new_zeros(mask.shape).masked_scatter(mask.bool(), written)  # (B, T)
        return kept

    return read_all


# --- how far each token is trusted: properties of the whole step -----------------------------------------------------


@dataclass
class Weights:
    """Three numbers for each token, (B, T) each, all known before the first backward."""

    reliability: Tensor  # w in (0, 1], eq. 2; 1 where agreement is off
    share: Tensor  # agreement.coefficients, by default mask w / sum mask w: its part of the divergence
    plain_share: Tensor  # the same with w = 1: its part of everything else


@torch.no_grad()
def weigh(mask: Tensor, m: Mechanisms, contexts=None, compared=None, dtype=torch.float32) -> Weights:
    """Eq. 2, then the denominators of eq. 1. contexts None: nothing was compared, and every w is 1, in `dtype`.

    mask (B, T), contexts (K, B, T) -> (B, T) each
    compared (B, T): the tokens that the contexts did read, where these are fewer; the others keep w = 1.
    Everything here is taken over the *whole optimizer step*: the quantile that scales w, and both denominators. If each
    micro-batch divided by its own number of tokens, one of 10 tokens would have as much say as one of 1000.
    Raises ValueError if every token is masked, or for K = 1 with variance.
    """
    ones = torch.ones(mask.shape, dtype=dtype if contexts is None else contexts.dtype, device=mask.device)
    compared = mask if compared is None else compared
    w = reliability(contexts, compared, m) if contexts is not None and compared.any() else ones  # empty answers: nothing to compare
    return Weights(w, *(agreement.coefficients(mask, x, m.normalizer) for x in (w, ones)))


def reliability(contexts: Tensor, mask: Tensor, m: Mechanisms) -> Tensor:
    """Eq. 2: K readings of the written tokens -> w. What it is on a masked token means nothing: its share is 0.

    (K, B, T), (B, T) -> (B, T)
    """
    delta = agreement.disagreement(contexts, mask, m.agreement, m.stat)
    if m.agreement == "token":
        return agreement.token_weights(delta, mask, m.gamma)
    return agreement.sequence_weights(delta, m.gamma).unsqueeze(1).expand_as(mask)


# --- the objective ---------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """What is known of each of n tokens before the student reads them. `tokens[3:7]` is the same for four of them."""

    ids: Tensor  # (n,) y_t, the token that was written
    share: Tensor  # (n,) its part of the divergence
    plain_share: Tensor  # (n,) its part of everything else
    negative: Tensor | None = None  # (n,) log p(y_t) under the teacher who saw a wrong reference
    ceiling: float | Tensor | None = None  # kappa of eq. 9, in nats: one for all tokens

    def __getitem__(self, piece: slice) -> "Tokens":
        negative = None if self.negative is None else self.negative[piece]
        return Tokens(self.ids[piece], self.share[piece], self.plain_share[piece], negative, self.ceiling)


def tokens_of(batch: Batch, scores: Scores, weights: Weights, ceiling: float | Tensor | None = None) -> Tokens:
    """The unmasked tokens of a step, end to end. -> Tokens of N."""
    flat = lambda x: None if x is None else x[batch.mask.bool()]
    return Tokens(flat(batch.ids), flat(weights.share), flat(weights.plain_share), flat(scores.negative), ceiling)


def divergence(student: Tensor, teacher: Tensor, ids: Tensor, m: Mechanisms) -> Tensor:
    """The chosen D of each token, over the whole vocabulary or estimated.

    (n, V), (n, V), (n,) -> (n,)
    """
    if m.estimator == "sampled":
        return losses.sampled_reverse_kl(losses.token_logps(student, ids), losses.token_logps(teacher, ids))
    if m.estimator == "top-k":
        student, teacher = losses.top_k_with_tail(student, teacher, m.top_k)
    if m.divergence == "jsd":
        return losses.jsd(student, teacher, m.alpha)
    return {"forward": losses.forward_kl, "reverse": losses.reverse_kl}[m.divergence](student, teacher)


def objective(student: Tensor, teacher: Tensor | None, tokens: Tokens, m: Mechanisms) -> tuple[Tensor, dict]:
    """Eq. 1 for n tokens, all of it that looks at log-probabilities: D, C and X. The term F looks at states: `feature_matching`.

    -> (loss (), {name: (n,)} without gradient, for the log)
    student (n, V), teacher (n, V) or None: log-probabilities at the distill temperature; only the student carries a gradient.
    It is a *sum* of terms that already hold their share of the step. So the losses, and gradients, of any pieces of a step add
    up to the step's: the trainer calls this for a few tokens at a time (engine/head.py), a notebook for all at once.
    """
    written = losses.token_logps(student, tokens.ids)  # (n,) log p_student(y_t)
    loss, values = student.new_zeros(()), {}
    if m.w_div:
        values["div"] = divergence(student, teacher, tokens.ids, m)
        # First the clip, then the weight: kappa bounds what one token can say, w how much it counts (eq. 9).
        loss = loss + m.w_div * (tokens.share * losses.clip_tokens(values["div"], tokens.ceiling)).sum()
    if m.w_contrast:
        positive = losses.token_logps(teacher, tokens.ids)
        values["contrast"] = losses.contrastive(written, positive, tokens.negative, m.margin)
        loss = loss + m.w_contrast * (tokens.plain_share * values["contrast"]).sum()
    if m.w_nll:
        loss = loss - m.w_nll * (tokens.plain_share * written).sum()
    values["nll"] = -written
    if m.log_entropy:
        values["entropy"] = losses.entropy(student.detach())
    return loss, {name: value.detach() for name, value in values.items()}


def feature_matching(student: Tensor, teacher: Tensor, tokens: Tokens, m: Mechanisms) -> tuple[Tensor, dict]:
    """Eq. 6 for n tokens: the part of eq. 1 that looks at states. `objective` and this, added up, are eq. 1. -> as `objective`

    (n, H), (n, H) -> (), {"match": (n,)}
    """
    distance = losses.feature_mse(student, teacher)
    return m.w_match * (tokens.plain_share * distance).sum(), {"match": distance.detach()}


def example() -> None:
    """One answer of three tokens through agreement, clip and contrast, with four words for a vocabulary."""
    words, log = ["4", "2", "7", "end"], lambda probabilities: torch.tensor(probabilities).log()
    logits = log([[0.4, 0.2, 0.3, 0.1], [0.1, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.7]]).requires_grad_()
    teacher = log([[0.8, 0.1, 0.05, 0.05], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])
    contexts = log([[[0.8, 0.6, 0.7]], [[0.7, 0.1, 0.7]]])  # (K, B, T) = (2, 1, 3): log p of the written tokens
    batch = Batch([[0]], [[0]], [[0]], [[[0]], [[0]]], ids=torch.tensor([[0, 1, 3]]), mask=torch.ones(1, 3))
    m = Mechanisms(agreement="token", gamma=1.0, stat="range", clip=0.3, w_contrast=0.1, margin=0.5)
    weights = weigh(batch.mask, m, contexts)
    tokens = tokens_of(batch, Scores(negative=log([[0.3, 0.1, 0.7]])), weights, m.clip)
    loss, values = objective(logits.log_softmax(-1), teacher, tokens, m)
    push = -torch.autograd.grad(loss, logits)[0]  # where a step of descent moves the logits
    print("written  p student  p teacher       D  min(D, .3)     w   share       C      push on its logit")
    for t, y in enumerate(tokens.ids.tolist()):
        d, pushed = values["div"][t].item(), round(push[t, y].item(), 6) + 0.0  # + 0.0: no "-0.0000"
        row = f"{words[y]:<7}{logits[t, y].exp().item():11.2f}{teacher[t, y].exp():11.2f}{d:8.4f}{min(d, m.clip):12.4f}"
        print(f"{row}{weights.reliability[0, t]:6.2f}{tokens.share[t]:8.4f}{values['contrast'][t]:8.4f}{pushed:+23.4f}")
    div, contrast = (tokens.share * values["div"].clamp(max=m.clip)).sum(), values["contrast"].mean()
    print(f"loss {loss.item():.4f} = sum of share * min(D, .3) {div:.4f} + 0.1 * mean C {contrast:.4f}")
    print("Notice: the clip silences D on the first token, so only the contrast pushes it; the second counts half, as the contexts")
    print("disagree about it; on the third all readings are equal: C is the bare margin, and nothing pushes.")


if __name__ == "__main__":
    example()
