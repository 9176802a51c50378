"""tiny.py - the tiny model that half knows the world: a tokenizer, 0.9 M parameters, and a few minutes of pre-training.

Of each family the base has met one part on its own, and the other part *only with a reference in front*: sums with a carry, choices
with a number of 50 or more, 24 of 30 things, 4 of 8 operations, 9 of 12 tool words. For the last three even the meaning was drawn
anew in every lesson (`scramble` in world.py), so that only the reference tells. Alone the base has to guess there; with a reference
it is good; a wrong one misleads it in part. It exists because self-distillation needs a model with something left to learn that a
reference already tells it. `python -m tasks.tiny` rebuilds tasks/tiny-base in about four minutes on 2 cores: an ordinary Hugging
Face Qwen2 checkpoint.

Depends on data.py, world.py, transformers.   Try it:  python -m pytest tests/test_tiny.py -q
"""

import argparse
import math
import random
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from tasks.data import Example, chat_ids, context_message, teacher_message
from tasks.world import FAMILIES, WORDING, blotted, draw

ASSET = Path(__file__).parent / "tiny-base"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
CHATML += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALONE = dict(sum=0.03, choice=0.15, fact=0.5, code=0.3, tool=0.3)  # the share that comes without a reference, of the known part
OFTEN = dict(sum=1.6, choice=1.0, fact=1.0, code=1.6, tool=1.3)  # how often a family comes up


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE of Qwen2's kind, learned on the world: its words and digits are one token each; any text can be encoded."""
    rng = random.Random(0)
    texts = [part for _ in range(6000) for part in lesson(rng)] + ["user\nassistant\nsystem\n"] * 50
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size=1024, new_special_tokens=SPECIAL, show_progress=False)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.model_max_length, tokenizer.chat_template = 512, CHATML
    return tokenizer


def make_model(tokenizer, hidden: int = 160, layers: int = 3, seed: int = 0) -> Qwen2ForCausalLM:
    """An untrained Qwen2: 0.9 M parameters by default. `hidden` must be a multiple of 32, the size of an attention head."""
    torch.manual_seed(seed)
    size = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, vocab_size=len(tokenizer))
    size |= dict(num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=512)
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **size, **ends))


def lesson(rng: random.Random) -> tuple[str, str]:
    """One pre-training conversation: a user message and the worked answer."""
    family = rng.choices(FAMILIES, [OFTEN.get(f, 1.0) for f in FAMILIES])[0]
    item = draw(rng, family, test=False, scramble=True)
    reference = item.terse
    if item.known:
        blots = rng.uniform(0, 0.7) if rng.random() < 0.6 else 0.0
        if rng.random() < 0.1:
            reference = item.wrong  # the answer stays right: where the base knows better, it learns not to follow blindly
        if rng.random() < ALONE[family]:
            reference = ""
    else:
        blots = rng.uniform(0, 0.3)
    reference = blotted(reference, [rng.random() for _ in range(40)], blots)
    message = teacher_message(WORDING, item.question, reference) if reference else item.question
    if rng.random() < 0.2:
        other = draw(rng, family, test=False, scramble=True)
        message = context_message(WORDING, message, [Example(family, other.question, other.terse, demo=other.worked)])
    return message, item.worked


def pretrain(model, tokenizer, steps: int, batch: int = 64, lr: float = 2.5e-3, seed: int = 0) -> list[float]:
    """Next-token training on the answers of random lessons. -> the loss of every step."""
    rng, losses = random.Random(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in (bar := tqdm(range(steps), desc="pre-training tiny-base", unit="step")):
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 30) * cosine
        rows, labels = [], []
        for message, answer in (lesson(rng) for _ in range(batch)):
            prompt, target = chat_ids(tokenizer, message), tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt + target))
            labels.append(torch.tensor([-100] * len(prompt) + target))
        # Padded on the right: a causal model never sees it.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).to(model.device)
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return losses


def main(argv: list[str] | None = None) -> None:
    """Rebuild the embedded model."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default=str(ASSET), help="where the checkpoint goes")
    parser.add_argument("--steps", type=int, default=800, help="pre-training steps of 64 lessons")
    parser.add_argument("--hidden", type=int, default=160, help="hidden size, a multiple of 32")
    parser.add_argument("--layers", type=int, default=3, help="transformer layers")
    parser.add_argument("--seed", type=int, default=0, help="weights and lessons")
    parser.add_argument("--device", default="cpu", help="cpu or cuda: a larger one (--hidden 512 --layers 8) wants a GPU")
    args = parser.parse_args(argv)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.hidden, args.layers, args.seed).to(args.device)
    pretrain(model, tokenizer, args.steps, seed=args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters -> {args.out}")


if __name__ == "__main__":
    main()
