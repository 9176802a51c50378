"""A model that cannot serve is refused before the first token, in one line: its head, its weights, its tokens, its architecture."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import eval as command
from engine import metrics
from engine.head import head_of
from engine.loading import load
from engine.pretrained import TINY
from engine.rollout import generate
from tasks import world
from unisd import read

CPU = torch.device("cpu")
SHAPE = dict(
    vocab_size=776, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip


def built(folder, kind, **more):
    """A random model of this kind with the tiny tokenizer, saved. -> its folder"""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SHAPE | more)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder)
    return str(folder)


def spoiled(folder, weights=None, **files):
    """The tiny model with other weights, or with other values in one of its .json files. -> its folder"""
    shutil.copytree(TINY, folder)
    if weights:
        save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    for name, values in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")
    return str(folder)


# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Granite", dict(logits_scaling=8.0)),
        ("Cohere", dict(logit_scale=0.0625)),
        ("Cohere2", dict(logit_scale=4.0)),
        ("Gemma2", dict(final_logit_softcapping=5.0, query_pre_attn_scalar=16)),
    ],
)
def test_scaled_and_capped_logits_are_the_models_own(tmp_path, kind, more):
    lm = load(built(tmp_path, kind, **more), CPU)
    ids = torch.tensor([[5, 9, 200, 31, 7]])
    with torch.no_grad():
        theirs = lm.model(input_ids=ids).logits[0, 1:-1].log_softmax(-1)
        plain = lm.model.get_output_embeddings()(states := read(lm.model, [[5, 9]], ids[:, 2:], torch.ones(1, 3, dtype=torch.long)))
    assert_close(head_of(lm.model, lm.vocab)(states), theirs, rtol=1e-4, atol=1e-4)
    assert (plain.log_softmax(-1) - theirs).abs().max() > 0.5


@pytest.mark.parametrize(
    ("kind", "more"),
    [("RecurrentGemma", dict(block_types=["recurrent", "attention"], lru_width=32, logits_soft_cap=30.0)), ("Roberta", {})],
)
def test_what_else_a_model_does_to_its_logits_is_refused_also_as_the_base(tmp_path, kind, more, capsys):
    folder = built(tmp_path, kind, **more)
    for flags, named in ((["--model", folder], "--model"), (["--model", "tiny", "--base", folder], "--base")):
        assert command.main([*flags, "--size", "1", "--device", "cpu"]) == 2
        assert f"eval.py: {named} {folder}: {kind}" in (last := capsys.readouterr().err.splitlines()[-1]), last


# --- the weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, {}, "39 missing .*38 unexpected .first _orig_mod"),
        (lambda w: {k: v for k, v in w.items() if ".layers.1." not in k}, {}, "12 missing .first model.layers.1"),
        (lambda w: w | {"value_head.weight": torch.ones(3)}, {}, "1 unexpected .first value_head.weight"),
        (None, dict(num_hidden_layers=2, layer_types=["full_attention"] * 2), "12 unexpected .first model.layers.2"),
        (None, dict(tie_word_embeddings=False), "1 missing .first lm_head.weight"),
        (None, dict(intermediate_size=100), "9 mismatched .first model.layers.0"),
        (lambda w: w | {"model.norm.weight": w["model.norm.weight"] * torch.nan}, {}, "not finite"),
    ],
)
def test_weights_that_are_not_all_there_are_one_line(tmp_path, weights, config, message, caplog):
    with pytest.raises(ValueError, match=f"--model .*{message}") as told:
        load(spoiled(tmp_path / "m", weights, config=config), CPU)
    assert "\n" not in str(told.value) and "REPORT" not in caplog.text


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"])
def test_half_a_file_is_one_line(tmp_path, file):
    path = tmp_path / "m" / file
    folder = spoiled(tmp_path / "m")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="does not hold a usable Hugging Face checkpoint"):
        load(folder, CPU)


def test_a_tied_head_may_be_there_or_not(tmp_path):
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    both = load(spoiled(tmp_path / "a", lambda w: w | {head: w[table].clone()}), CPU)
    other = load(spoiled(tmp_path / "b", lambda w: {head if k == table else k: v for k, v in w.items()}), CPU)
    for lm in (both, other):
        assert_close(lm.model.get_output_embeddings().weight, load("tiny", CPU).model.get_input_embeddings().weight)


# --- the tokens -------------------------------------------------------------------------------------------------------


def with_vocab(folder, change):
    """The tiny tokenizer with other ids. -> its folder"""
    folder_name, path = spoiled(folder), folder / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["model"]["vocab"] = {token: change(i) for token, i in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = change(token["id"])
    path.write_text(json.dumps(state), encoding="utf-8")
    return folder_name


def test_the_bound_is_the_largest_id_and_not_their_number(tmp_path, tiny):
    folder = with_vocab(tmp_path / "m", lambda i: {2: 790}.get(i, i))  # the end of a turn, behind 14 unused ids
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    model.resize_token_embeddings(800)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[790], table[2] = table[2].clone(), -table[2]
    model.generation_config.eos_token_id = model.config.eos_token_id = 790
    model.save_pretrained(folder)
    lm = load(folder, CPU)
    assert (lm.vocab, len(lm.tokenizer), lm.eos) == (791, 776, [790])
    task = world.load(5, 2)
    ours, theirs = (metrics.measure(x, task, task.test) for x in (lm, tiny))
    assert (ours["texts"], ours["eos"]) == (theirs["texts"], theirs["eos"]) and theirs["eos"] > 50
    assert metrics.gold_ppl(lm, task, task.test) < 1e6  # an end that no head has would be an IndexError


@pytest.mark.parametrize("eos", [776, [2, 50_256], -1])
def test_an_end_that_the_head_does_not_have_is_one_line(tmp_path, eos):
    with pytest.raises(ValueError, match="--model .*its end-of-text id .* is no token.*set eos_token_id"):
        load(spoiled(tmp_path / "m", generation_config=dict(eos_token_id=eos)), CPU)


def test_a_base_of_equal_size_and_other_ids_is_refused(tmp_path, capsys):
    swapped = with_vocab(tmp_path / "m", lambda i: {300: 301, 301: 300}.get(i, i))
    assert command.main(["--model", "tiny", "--base", swapped, "--size", "1", "--device", "cpu"]) == 2
    assert "--base" in (told := capsys.readouterr().err.splitlines()[-1]) and "another tokenizer" in told


def test_a_base_with_another_chat_template_is_refused(tmp_path, tiny):
    folder = spoiled(tmp_path / "m")
    path = tmp_path / "m" / "chat_template.jinja"
    path.write_text("Be brief. " + path.read_text(encoding="utf-8"), encoding="utf-8")
    task = world.load(5, 1)
    with pytest.raises(ValueError, match="another chat template .*give its true base"):
        metrics.drift(tiny, load(folder, CPU), task, task.test)


@pytest.mark.parametrize("gone", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_tokenizer_without_words_is_one_line(tmp_path, gone):
    spoiled(tmp_path / "m")
    for name in gone:
        (tmp_path / "m" / name).unlink()
    with pytest.raises(ValueError, match="--model .*its tokenizer knows no words; copy tokenizer.json"):
        load(str(tmp_path / "m"), CPU)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "fails .Expected an expression"),
        ("{{ raise_exception('a system message is needed') }}", "fails .a system message is needed"),
        ("{{ messages[0].content + 1 }}", "fails .can only concatenate"),
        ("{{ messages[0].content[0].text }}<|assistant|>", "leaves out, or rewrites, what the user says"),
        ("{{ messages[0].content | upper }}", "leaves out, or rewrites, what the user says"),
    ],
)
def test_a_template_that_cannot_ask_is_one_line(tmp_path, template, message):
    folder = spoiled(tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(ValueError, match=f"--model .*its chat template .*{message}"):
        load(folder, CPU)


# --- the architecture -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("Rwkv", dict(attention_hidden_size=32, context_length=64), "in a padded batch"),
        ("Llama4Text", dict(num_local_experts=2, intermediate_size_mlp=32), "last_hidden_state"),
        ("Mamba", dict(state_size=4, max_position_embeddings=None), "max_position_embeddings"),
    ],
)
def test_an_architecture_that_a_run_cannot_use_is_one_line(tmp_path, kind, more, message):
    with pytest.raises(ValueError, match=f"--model .*{kind[:5]}.* is not supported: .*{message}.*use another model"):
        load(built(tmp_path, kind, **more), CPU)


ROPE = dict(rope_theta=10_000.0)
LONG = dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[8.0] * 8, **ROPE)


@pytest.mark.parametrize(
    ("kind", "more", "context"),
    [
        ("Phi3", dict(original_max_position_embeddings=64, rope_parameters=LONG), 64),
        ("Llama", dict(max_position_embeddings=64, rope_parameters=dict(rope_type="dynamic", factor=4.0, **ROPE)), 64),
        ("Llama", dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, **ROPE)), 256),
    ],
)
def test_no_row_is_read_by_the_longest_one_beside_it(tmp_path, kind, more, context, recwarn):
    lm = load(built(tmp_path, kind, **more), CPU)
    assert lm.context == context
    assert any("LongRoPE reads a row by the longest one beside it" in str(w.message) for w in recwarn) == (kind == "Phi3")
    short, long = list(range(5, 15)), [i % 700 for i in range(5, 5 + context - 4)]
    ids, mask = torch.full((2, 4), 9), torch.ones(2, 4, dtype=torch.long)
    with torch.no_grad():
        beside, alone = read(lm.model, [short, long], ids, mask)[:4], read(lm.model, [short], ids[:1], mask[:1])
    assert_close(beside, alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"exceed the model's context of {context}"):
        generate(lm, [long], 5, 0.0)
