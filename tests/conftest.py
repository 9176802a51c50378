"""Small models for the tests: random Qwen2 weights in float64 whose embedding table is larger than the vocabulary in
use, as Qwen2.5's is.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCAB, ROWS = 37, 48  # tokens in use, rows in the embedding table


def small_model(seed=0, dtype=torch.float64, tied=True):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config).to(dtype).eval()


@pytest.fixture
def model():
    return small_model()
