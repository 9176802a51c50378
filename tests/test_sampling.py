"""Every engine writes the same greedy tokens, finished rows stop costing, and a token is drawn as the distribution says."""

from dataclasses import replace

import pytest
import torch
from conftest import ROWS, VOCAB, small_model
from torch.testing import assert_close

from engine import sampling
from engine.rollout import Loaded, generate, load
from tasks.data import chat_ids


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", torch.device("cpu"))


@pytest.fixture(scope="module")
def prompts(tiny):
    """Twelve questions whose answers have very different lengths."""
    kinds = ("{}7+38", "where is lamp: mill A, cave B, port C", "f: add {} then times 2", "largest: {} A, 7 B, 4 C")
    return [chat_ids(tiny.tokenizer, k.format(n)) for n in (2, 3, 4) for k in kinds]


@pytest.mark.parametrize("engine", ["static", "continuous"])
def test_every_engine_writes_the_same_greedy_tokens(tiny, prompts, engine):
    ids, mask = generate(tiny, prompts, 24, 0.0)
    other, its = generate(replace(tiny, engine=engine), prompts, 24, 0.0)
    assert mask.equal(its) and (ids * mask).equal(other * its)


def test_compact_and_static_draw_the_same_tokens_from_the_same_noise(tiny, prompts):
    noise = torch.rand(len(prompts), 24, generator=torch.Generator().manual_seed(1))
    ids, mask = generate(tiny, prompts, 24, 1.0, noise)
    other, its = generate(replace(tiny, engine="static"), prompts, 24, 1.0, noise)
    assert mask.equal(its) and (ids * mask).equal(other * its)
    different, _ = generate(tiny, prompts, 24, 1.0, noise.flip(0))
    assert not (ids.shape == different.shape and ids.equal(different))


def test_an_answer_does_not_depend_on_its_company(tiny, prompts):
    """Which is what lets processes, sampling batches and resumed runs share out the work at will."""
    noise = torch.rand(len(prompts), 24, generator=torch.Generator().manual_seed(2))
    ids, mask = generate(tiny, prompts, 24, 1.0, noise)
    for size in (1, 5):
        other, its = generate(replace(tiny, sample_batch=size), prompts, 24, 1.0, noise)
        assert mask.equal(its) and (ids * mask).equal(other * its)
    order = list(reversed(range(len(prompts))))
    other, its = generate(tiny, [prompts[i] for i in order], 24, 1.0, noise[order])
    assert mask[order].equal(its) and (ids * mask)[order].equal(other * its)


def test_finished_rows_stop_costing(tiny, prompts):
    tallies = {e: {} for e in ("compact", "static")}
    for engine, tally in tallies.items():
        generate(replace(tiny, engine=engine), prompts, 40, 0.0, tally=tally)
    wasted = {e: 1 - t["written"] / t["decoded"] for e, t in tallies.items()}
    assert wasted["compact"] <= sampling.FINISHED < 0.25 < wasted["static"]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_follow_the_softmax(temperature):
    logits = torch.tensor(
        [[1.0, 0.0, -1.0, 2.0, -torch.inf, 9.0]]
    )  # the last is padded vocabulary, the one before impossible
    n = 20_000
    noise = ((torch.arange(n) + 0.5) / n).unsqueeze(1)  # evenly spread: no luck involved
    draw = sampling.Draw(5, width=3, temperature=temperature, noise=noise)
    said = draw(torch.zeros(n, 3, dtype=torch.long), logits.expand(n, -1)).argmax(-1)
    assert_close(said.bincount(minlength=6)[:5] / n, (logits[0, :5] / temperature).softmax(-1), atol=2e-4, rtol=0.0)
    assert (said < 5).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_never_draw_the_impossible(u):
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf]])
    draw = sampling.Draw(4, width=1, temperature=1.0, noise=torch.tensor([[u]]))
    assert draw(torch.zeros(1, 1, dtype=torch.long), logits).argmax().item() == (1 if u == 0.0 else 2)


def test_each_position_has_its_own_number():
    """Noise column t decides token t: a column read twice would make answers repeat themselves."""
    flat = torch.zeros(1, 8)
    noise = torch.tensor([[0.05, 0.95, 0.55]])
    draw = sampling.Draw(8, width=2, temperature=1.0, noise=noise)
    said = [draw(torch.zeros(1, 2 + t, dtype=torch.long), flat).argmax().item() for t in range(3)]
    assert said == [0, 7, 4]


def test_a_hub_models_own_defaults_do_not_come_back_in(tiny):
    model = small_model(dtype=torch.float32)
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    lm = Loaded(model, tiny.tokenizer, [2], VOCAB, "small")
    noise = torch.rand(300, 1, generator=torch.Generator().manual_seed(0))
    ids, _ = generate(lm, [[5, 7]] * 300, 1, 3.0, noise)
    assert len(ids.unique()) > 5 and ids.max() < VOCAB < ROWS  # top-k of 1 would always write the same


def test_continuous_refuses_padded_vocabulary(tiny, monkeypatch):
    class Out:
        generated_tokens = (VOCAB + 1,)

    model = small_model(dtype=torch.float32)
    monkeypatch.setattr(model, "generate_batch", lambda *_, **__: {"req_0": Out()}, raising=False)
    lm = Loaded(model, tiny.tokenizer, [2], VOCAB, "small", engine="continuous")
    with pytest.raises(ValueError, match="--engine compact"):
        generate(lm, [[5, 7]], 1, 0.0)


@pytest.mark.parametrize("engine", ["static", "continuous"])
def test_engines_that_do_not_see_autocast_refuse_bf16(tiny, prompts, engine):
    with pytest.raises(ValueError, match="--engine compact or --dtype fp32"):
        generate(replace(tiny, engine=engine, dtype="bf16"), prompts, 4, 0.0)
