"""The demo's model and tokenizer, both made on the spot: nothing is downloaded.

The tokenizer has one token per printable ASCII character, so that an answer's tokens are its characters, and
one for each word that it is given; the model is a Llama of about 0.6 M parameters.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
}
ROLE_TOKENS = ["<system>", "<user>", "<assistant>"]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def build_tokenizer(
    characters: str = string.printable[:95] + "\n",
    words: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A tokenizer of words, where they stand, and characters, with pad, bos, eos, unk, role tokens and a chat
    template.

    It adds no bos or eos of its own; the chat template writes bos first and eos after every assistant turn.
    Characters outside `characters` become unk. Padding is on the right.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [*SPECIAL_TOKENS.values(), *ROLE_TOKENS]
    vocab = {token: i for i, token in enumerate([*special, *characters, *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL_TOKENS["unk_token"]))
    # The longest word that fits comes first.
    pieces = [*map(re.escape, sorted(words, key=len, reverse=True)), r"[\s\S]"]
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(pieces)), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **SPECIAL_TOKENS,
        additional_special_tokens=ROLE_TOKENS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    layers: int = 3,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A randomly initialised Llama in float32 whose vocabulary is the tokenizer's (about 0.6 M parameters).

    The same `seed` gives the same weights; the caller's random state is left as it was. ValueError where
    `hidden_size` is no multiple of 8: four heads, each of even size for the rotary embedding.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = 4
    if hidden_size % (2 * heads):
        raise ValueError(f"hidden_size must be a multiple of {2 * heads}, got {hidden_size}")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        use_cache=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
