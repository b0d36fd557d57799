"""From files to padded token ids: problems, tokenizers, prompts and the order of batches."""

from kdrl_jax.data.batches import PromptBatches
from kdrl_jax.data.hf_tokenizer import HFTokenizer
from kdrl_jax.data.problems import load_problems
from kdrl_jax.data.prompts import (
    PROMPT_STYLES,
    PromptReport,
    PromptStyle,
    encode_prompts,
    pad_prompts,
)
from kdrl_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from kdrl_jax.data.tokenizer import Message, Tokenizer, check_tokenizer_pair, load_tokenizer

__all__ = [
    "PROMPT_STYLES",
    "HFTokenizer",
    "Message",
    "PromptBatches",
    "PromptReport",
    "PromptStyle",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_tokenizer_pair",
    "encode_prompts",
    "load_problems",
    "load_tokenizer",
    "pad_prompts",
]
