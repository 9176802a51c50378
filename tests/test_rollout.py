"""Where an answer ends, and that how it was sampled cannot change what is read."""

import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROWS, VOCAB, small_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import build, loading, rollout
from engine.config import Config
from engine.head import head_of, sampled_logps
from engine.loading import Loaded, end_ids, load
from engine.pretrained import TINY
from engine.rollout import completion_mask, decode, generate, left_pad, turn_end
from tasks.data import chat_ids
from unisd import read

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", CPU)


def fake(model, eos=(2,), vocab=VOCAB):
    class Pad:
        pad_token_id = 2  # pad == end of text, as many tokenizers have it

    return Loaded(model, Pad(), list(eos), vocab, "fake")


def test_the_mask_ends_with_the_first_end_whatever_the_pad_is():
    ids = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8], [2, 5, 2, 6], [9, 4, 5, 2]])
    assert completion_mask(ids, [2]).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert completion_mask(ids, [2, 4]).tolist()[3] == [1, 1, 0, 0]  # any of the model's end ids
    assert completion_mask(ids, [2])[0, 1] == 1  # the end itself counts: or the model unlearns to stop


def test_left_padding():
    ids, mask = left_pad([[7, 8, 9], [4]], CPU)
    assert ids.tolist() == [[7, 8, 9], [0, 0, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_greedy_answers_equal_a_loop_without_cache_or_padding():
    model = small_model()
    lm, prompts = fake(model), [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, 21, 22]]
    ids, mask = generate(lm, prompts, 9, temperature=0.0)
    for row, m, prompt in zip(ids, mask, prompts, strict=True):
        text = list(prompt)
        for _ in range(9):
            text.append(model(input_ids=torch.tensor([text])).logits[0, -1, :VOCAB].argmax().item())
            if text[-1] == 2:
                break
        assert row[m.bool()].tolist() == text[len(prompt) :]


def test_batch_size_and_neighbours_do_not_matter(tiny):
    prompts = [chat_ids(tiny.tokenizer, q) for q in ("47+38", "where is lamp: mill A, cave B, port C", "f: add 3 then times 2")]
    together, m = generate(tiny, prompts, 40, 0.0)
    for i, p in enumerate(prompts):
        alone, ma = generate(tiny, [p], 40, 0.0)
        assert alone[0][ma[0].bool()].tolist() == together[i][m[i].bool()].tolist()
    one_by_one, m1 = generate(replace(tiny, sample_batch=1), prompts, 40, 0.0)
    assert decode(tiny, one_by_one, m1) == decode(tiny, together, m)


def test_sampling_follows_the_models_own_distribution():
    """Frequencies of 4000 first tokens against the softmax, at a temperature; a hub's top-k or repetition penalty would
    show here.
    """
    model = small_model(dtype=torch.float32)
    model.generation_config.top_k, model.generation_config.top_p = 2, 0.5
    model.generation_config.repetition_penalty = 1.8
    torch.manual_seed(0)
    prompt = [5, 6, 7]
    ids, _ = generate(fake(model), [prompt] * 4000, 1, temperature=1.5)
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1, :VOCAB]
    expected = (logits / 1.5).softmax(-1)
    seen = torch.bincount(ids[:, 0], minlength=ROWS).double() / 4000
    assert seen[VOCAB:].sum() == 0
    assert (seen[:VOCAB] - expected.double()).abs().sum() < 0.12  # total variation of pure noise is about .07
    assert model.generation_config.top_k == 2  # given back


def test_padded_vocabulary_is_never_sampled():
    model = small_model(tied=False, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = model.lm_head.weight[:VOCAB].abs().max() * 100
    for temperature in (0.0, 1.0):
        ids, _ = generate(fake(model), [[5, 6, 7]] * 20, 5, temperature)
        assert ids.max() < VOCAB


def test_the_model_is_given_back_in_training_mode():
    model = small_model(dtype=torch.float32).train()
    generate(fake(model), [[5, 6]], 2, 0.0)
    assert model.training


def test_all_ends_of_the_generation_config_count():
    model = small_model()
    model.generation_config.eos_token_id = [2, 7]

    class Tokenizer:
        eos_token_id = 9

    assert end_ids(model, Tokenizer()) == [2, 7, 9]


def test_the_template_says_how_a_turn_ends(tiny):
    assert tiny.tokenizer.convert_ids_to_tokens(turn_end(tiny)) == "<|im_end|>"


CHATS = {  # how a family of models ends turns: what its template writes, its end ids, the end of an answer
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else '<|endoftext|>' }}",
        ["<|endoftext|>", "<|assistant|>", "<|end|>"],
        "<|end|>",
    ),
    "glm4": (  # nothing closes an answer but the header of the next turn
        "[gMASK]{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}",
        ["<|endoftext|>", "<|user|>"],
        "<|user|>",
    ),
    "llama2": (
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + ' </s>' }}"
        "{% endfor %}",
        ["<|endoftext|>", "</s>"],
        "</s>",
    ),
    "no end": ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", ["<|im_end|>"], "<|im_end|>"),
}


@pytest.mark.parametrize("family", CHATS)
def test_the_end_of_a_turn_is_the_first_end_after_the_answer(family, tiny):
    """Not the last one: behind the last answer, Phi-3's template also ends the text."""
    template, ends, expected = CHATS[family]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<|end|>", "<|user|>", "<|assistant|>", "</s>"], special_tokens=True)
    tokenizer.chat_template = template
    lm = Loaded(tiny.model, tokenizer, tokenizer.convert_tokens_to_ids(ends), len(tokenizer), family)
    assert tokenizer.convert_ids_to_tokens(turn_end(lm)) == expected


@pytest.mark.parametrize(
    ("header", "opened"),
    [
        ("<think>\n", "<think>"),
        ("[THINK]", "[THINK]"),
        ("<think>\n\n</think>\n\n", ""),
        ("<|begin_of_thought|>", "<|begin_of_thought|>"),
    ],
)
def test_a_template_that_always_thinks_is_named(header, opened, tmp_path, recwarn):
    """Once a line, and not where the template closes what it opens, as Qwen3's does with thinking off."""

    def thinking(folder):
        file = folder / "chat_template.jinja"
        file.write_text(file.read_text().replace("assistant\n", "assistant\n" + header))

    load(spoiled(tmp_path, thinking), CPU)
    told = [str(w.message) for w in recwarn if "thinking" in str(w.message)]
    assert [f"opens {opened} even with thinking off" in line for line in told] == [True] * bool(opened)


def test_the_pad_token_learns_too(tmp_path):
    """Where it is the end of text, as often, an input embedding that never gets a gradient could not learn."""

    def pad_is_end(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings, model.config.pad_token_id = False, 2
        model.save_pretrained(folder)

    model = load(spoiled(tmp_path, pad_is_end), CPU).model
    table = model.get_input_embeddings()
    model(input_ids=torch.tensor([[5, 2, 6]])).logits[0, -1].sum().backward()
    assert table.padding_idx is None and (table.weight.grad[2] != 0).any()


def test_too_long_a_prompt_is_refused():
    with pytest.raises(ValueError, match="max-new-tokens"):
        generate(fake(small_model()), [[5] * 120], 20, 0.0)


def spoiled(tmp_path, change):
    shutil.copytree(TINY, tmp_path / "m")
    change(tmp_path / "m")
    return str(tmp_path / "m")


def test_refusals_name_the_fix(tmp_path):
    def no_template(folder):
        (folder / "chat_template.jinja").unlink()

    with pytest.raises(ValueError, match="no chat template"):
        load(spoiled(tmp_path / "a", no_template), CPU)

    def too_few(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(100)
        model.save_pretrained(folder)

    with pytest.raises(ValueError, match="100 embeddings but .*resize_token_embeddings"):
        load(spoiled(tmp_path / "b", too_few), CPU)
    with pytest.raises(ValueError, match="does not hold a usable"):
        (tmp_path / "c").mkdir()
        load(str(tmp_path / "c"), CPU)
    with pytest.raises(ValueError, match="hub cannot be reached.*local folder"):
        load("Qwen2.5-0.5B", CPU)  # the tests run offline


def test_a_pickled_checkpoint_is_not_read(tmp_path):
    def pickled(folder):
        (folder / "model.safetensors").unlink()
        torch.save(small_model().state_dict(), folder / "pytorch_model.bin")

    with pytest.raises(ValueError, match="usable"):
        load(spoiled(tmp_path, pickled), CPU)


def test_code_of_a_model_folder_is_not_run(tmp_path):
    def with_code(folder):
        config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("raise SystemExit('ran')\nclass Evil: pass\n")

    load(spoiled(tmp_path, with_code), CPU)


def test_scores_do_not_depend_on_the_padding_of_the_sampler(tiny):
    """Answers sampled beside a long prompt are read back with the log-probs the sampler had."""
    prompts = [chat_ids(tiny.tokenizer, q) for q in ("47+38", "tool: fly rome 2 monday and so on and so on")]
    ids, mask = generate(tiny, prompts, 30, 0.0)
    both = sampled_logps(read(tiny.model, prompts, ids, mask), ids[mask.bool()], head_of(tiny.model, tiny.vocab), 1.0, 64)
    first = sampled_logps(
        read(tiny.model, prompts[:1], ids[:1], mask[:1]), ids[:1][mask[:1].bool()], head_of(tiny.model, tiny.vocab), 1.0, 64
    )
    assert_close(both[: mask[0].sum()], first, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("card", "bf16", "dtype", "told"),
    [((8, 0), True, "bf16", "weights stay fp32"), ((7, 5), False, "fp16", "no bf16"), ((6, 1), False, "fp32", "")],
)
def test_the_precision_follows_the_card(monkeypatch, card, bf16, dtype, told):
    """A T4 (7.5) has no bf16 but fast fp16; an older card has neither."""
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "get_device_name", lambda place: "a card")
    monkeypatch.setattr(cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(cuda, "get_device_capability", lambda place: card)
    device, chosen, line = loading.choose_device("auto", "auto")
    assert (device.type, chosen) == ("cuda", dtype) and told in line.split("|")[1]


def test_plain_cuda_is_the_first_card(monkeypatch):
    """torch's set_device refuses a device without an index, here as there."""
    from torch.cuda._utils import _get_device_index

    taken, cuda = [], torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "get_device_name", lambda place: "a card")
    monkeypatch.setattr(cuda, "set_device", lambda place: taken.append(_get_device_index(place)))
    for name in ("cuda", "cuda:1"):
        build.place(Config(device=name, dtype="fp32"))
    assert taken == [0, 1]


def test_apples_gpu_is_taken_only_if_asked_for_and_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert loading.choose_device("auto", "auto")[:2] == (CPU, "fp32")
        if there:
            device, dtype, line = loading.choose_device("mps", "auto")
            assert (device.type, dtype) == ("mps", "fp32") and "not measured" in line.split("|")[0]
    with pytest.raises(ValueError, match="--device mps: .*no Apple GPU; use cpu or auto"):
        loading.choose_device("mps", "auto")
    for device in ("xpu", "mpss"):
        with pytest.raises(ValueError, match=f"--device {device} .*or mps"):
            loading.choose_device(device, "auto")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_matmuls_run_in_the_chosen_precision_on_fp32_weights(tiny, dtype):
    lm = replace(tiny, dtype=dtype)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    with torch.no_grad(), lm.autocast():
        assert torch.nn.functional.linear(torch.ones(2, 4), torch.ones(3, 4)).dtype == kind
    ids, mask = generate(lm, [chat_ids(lm.tokenizer, "47+38")], 30, 0.0)
    assert decode(lm, ids, mask)[0].split() and next(lm.model.parameters()).dtype == torch.float32


def test_long_generations_show_their_progress(tiny, monkeypatch):
    """Nothing in the first ten seconds; then a bar that counts tokens, over all batches, and is full at the end."""
    bars = []

    class Bar(rollout.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"file": io.StringIO()})
            self.settings, self.counts = kwargs, []
            bars.append(self)

        def update(self, n=1):
            self.counts.append(n)
            return super().update(n)

    monkeypatch.setattr(rollout, "tqdm", Bar)
    prompts = [chat_ids(tiny.tokenizer, text) for text in ("12+34", "45+16", "where is toad: mill, cave, port, barn")]
    generate(replace(tiny, sample_batch=2), prompts, 30, temperature=0.0)
    (bar,) = bars
    assert bar.settings["delay"] == 10 and "up to 30 tokens" in bar.settings["desc"] and bar.total == 60 == sum(bar.counts)
    assert bar.counts.count(1) > 15  # it moves with every token, not with every batch
