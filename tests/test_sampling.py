"""Rows leave the batch without changing an answer, a token is drawn as the distribution says, and where rows cannot leave
the whole batch goes on.
"""

import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import ROWS, VOCAB, small_model
from torch.testing import assert_close

from engine import sampling
from engine.loading import Loaded, load
from engine.rollout import generate
from tasks.data import chat_ids


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", torch.device("cpu"))


@pytest.fixture(scope="module")
def prompts(tiny):
    """Twelve questions whose answers have very different lengths."""
    kinds = ("{}7+38", "where is lamp: mill A, cave B, port C", "f: add {} then times 2", "largest: {} A, 7 B, 4 C")
    return [chat_ids(tiny.tokenizer, k.format(n)) for n in (2, 3, 4) for k in kinds]


@pytest.fixture
def whole_batch(tiny):
    """`generate` for the whole batch, as where rows cannot leave."""
    sampling.WHOLE_BATCH.add(tiny.model)
    yield
    sampling.WHOLE_BATCH.discard(tiny.model)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_whole_batch_gets_the_same_answers(tiny, prompts, temperature, request):
    noise = torch.rand(len(prompts), 24, generator=torch.Generator().manual_seed(1))
    ids, mask = generate(tiny, prompts, 24, temperature, noise)
    different, _ = generate(tiny, prompts, 24, 1.0, noise.flip(0))
    assert not (ids.shape == different.shape and ids.equal(different))
    request.getfixturevalue("whole_batch")
    other, its = generate(tiny, prompts, 24, temperature, noise)
    assert mask.equal(its) and (ids * mask).equal(other * its)


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


def test_finished_rows_stop_costing(tiny, prompts, request):
    def wasted():
        generate(tiny, prompts, 40, 0.0, tally=(tally := {}))
        return 1 - tally["written"] / tally["decoded"]

    assert wasted() <= sampling.FINISHED
    request.getfixturevalue("whole_batch")
    assert wasted() > 0.25


# Two layers each: one whose layers hold states or keys, one whose layers hold both, attention alone with a short window.
SHAPE = dict(
    vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
    num_key_value_heads=1, max_position_embeddings=128, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    initializer_range=0.2,
)  # fmt: skip
LAYERS = {
    "Lfm2": dict(layer_types=["conv", "full_attention"], block_ff_dim=48, block_auto_adjust_ff_dim=False),
    "FalconH1": dict(mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8),
    "Gemma3": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=6),
}


def layered(kind, tokenizer):
    """A random model of this kind, in float64: its answers end by chance, at very different lengths."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**SHAPE, **LAYERS[kind])).double().eval()
    return Loaded(model, tokenizer, [2, 3, 4, 5], VOCAB, kind)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 2.0])
def test_a_model_whose_rows_cannot_leave_answers_as_row_by_row(tiny, kind, temperature):
    lm = layered(kind, tiny.tokenizer)
    prompts = [list(range(6, 6 + n)) for n in (3, 9, 4, 7, 5, 8, 6, 3, 11, 4)]
    noise = torch.rand(len(prompts), 16, generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        (ids, mask), again = (generate(lm, prompts, 16, temperature, noise, tally := {}) for _ in range(2))
    assert again[0].equal(ids) and again[1].equal(mask)
    told = [str(w.message) for w in told if "leave its cache" in str(w.message)]
    assert len(told) == (kind != "Gemma3"), told  # once, and only where it is so
    assert (lm.model in sampling.WHOLE_BATCH) == (kind != "Gemma3")
    assert (tally["written"] / tally["decoded"] < 1 - sampling.FINISHED) == (kind != "Gemma3")
    assert len(set(mask.sum(1).tolist())) > 1
    for i, prompt in enumerate(prompts):
        alone, its = generate(lm, [prompt], 16, temperature, noise[[i]])
        assert alone[0][its[0].bool()].tolist() == ids[i][mask[i].bool()].tolist()


def test_rows_leave_only_caches_that_are_known_to_let_them():
    """A layer that holds a state beside its keys has batch_select_indices too, and would keep the state of all rows."""

    class Both(sampling.DynamicLayer):
        conv_states = None

    def cache(*layers):
        return type("Cache", (), {"layers": list(layers)})()

    assert sampling.rows_can_leave(cache(sampling.DynamicLayer(), sampling.DynamicSlidingWindowLayer(sliding_window=4)))
    for other in (cache(sampling.DynamicLayer(), Both()), cache(), object(), None):
        assert not sampling.rows_can_leave(other)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_follow_the_softmax(temperature):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -torch.inf, 9.0]])  # the last is padded vocabulary, the one before impossible
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


def test_the_example_of_the_docstring():
    """Probabilities .1 .2 .3 .4: .55 falls into the third token's stretch, from .3 to .6."""
    numbers = {0.05: 0, 0.1001: 1, 0.29: 1, 0.55: 2, 0.61: 3, 0.999: 3}
    draw = sampling.Draw(4, width=1, temperature=1.0, noise=torch.tensor([[u] for u in numbers]))
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(len(numbers), -1)
    assert draw(torch.zeros(len(numbers), 1, dtype=torch.long), logits).argmax(-1).tolist() == list(numbers.values())


def test_a_device_without_float64_draws_on_the_cpu(monkeypatch):
    """There, only what came from the device by .cpu() may become float64."""
    monkeypatch.setattr(sampling, "NO_FLOAT64", ("cpu",))
    moved = []

    class Device(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.Tensor.cpu:
                out = out.clone()
                moved.append(out)
            elif function is torch.Tensor.double:
                assert any(args[0] is x for x in moved), "float64 on the device"
            return out

    draw = sampling.Draw(8, width=2, temperature=1.0, noise=torch.tensor([[0.05, 0.95, 0.55]]))
    with Device():
        said = [draw(torch.zeros(1, 2 + t, dtype=torch.long), torch.zeros(1, 8)).argmax().item() for t in range(3)]
    assert said == [0, 7, 4] and len(moved) == 3


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
