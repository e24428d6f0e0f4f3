"""Makes a language model of random weights with a real tokenizer, small enough to run anywhere: the engine is real, its words are not.

Owns the shape of the model and the text its tokenizer learns from (the documents of this repository). Runs as a program in
the environment of the engines, which has gguf, tokenizers and numpy: `python tiny_model.py MODEL.gguf`. It downloads nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HOUSE = Path(__file__).resolve().parent.parent.parent
CONTEXT_TOKENS = 4096
VOCABULARY_MAX = 1536
WIDTH = 64
LAYERS = 2
HEADS = 4
FEED_FORWARD = 160
END_OF_TEXT, TURN_BEGINS, TURN_ENDS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = [END_OF_TEXT, TURN_BEGINS, TURN_ENDS]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    + TURN_BEGINS
    + "{{ message.role }}\n{{ message.content }}"
    + TURN_ENDS
    + "\n{% endfor %}{% if add_generation_prompt %}"
    + TURN_BEGINS
    + "assistant\n{% endif %}"
)


def learned_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer; every byte is a token, so that any text can be said."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_MAX,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [HOUSE / "LICENSE", *sorted((HOUSE / "docs").rglob("*.md"))]
    tokenizer.train([str(path) for path in texts], trainer)
    return tokenizer


def write_words(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> int:
    """The vocabulary, the merges and the chat template; returns the number of tokens."""
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in CONTROL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in learned])
    writer.add_bos_token_id(ids[END_OF_TEXT])
    writer.add_eos_token_id(ids[TURN_ENDS])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    return len(tokens)


def write_weights(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    """Random weights of a small llama, always the same ones."""
    rng = np.random.default_rng(7)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", (rng.standard_normal((rows, columns)) * 0.2).astype(np.float32))

    def ones(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))

    matrix("token_embd", vocabulary, WIDTH)
    ones("output_norm")
    matrix("output", vocabulary, WIDTH)
    for layer in range(LAYERS):
        ones(f"blk.{layer}.attn_norm")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{part}", WIDTH, WIDTH)
        ones(f"blk.{layer}.ffn_norm")
        matrix(f"blk.{layer}.ffn_gate", FEED_FORWARD, WIDTH)
        matrix(f"blk.{layer}.ffn_up", FEED_FORWARD, WIDTH)
        matrix(f"blk.{layer}.ffn_down", WIDTH, FEED_FORWARD)


def write(path: str) -> None:
    """Writes the whole model to one file."""
    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    vocabulary = write_words(writer, learned_tokenizer())
    writer.add_vocab_size(vocabulary)
    write_weights(writer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(sys.argv[1])
