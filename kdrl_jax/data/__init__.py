"""From data sets to padded token ids: problems, filters, tokenizers, prompts, order of batches."""

from kdrl_jax.data.batches import PromptBatches
from kdrl_jax.data.filters import (
    STAGE2_FILTERS,
    ZERO_RL_STUDENT_FILTERS,
    ZERO_RL_TEACHER_FILTERS,
    FilterReport,
    apply_filters,
    parse_filters,
)
from kdrl_jax.data.hf_tokenizer import HFTokenizer
from kdrl_jax.data.holdout import hold_out, to_json_lines
from kdrl_jax.data.problems import ReadReport, load_problems, read_problems
from kdrl_jax.data.prompts import (
    PROMPT_STYLES,
    Content,
    PromptReport,
    PromptStyle,
    encode_content,
    encode_prompt,
    encode_prompts,
    find_style,
    pad_prompts,
    prompt_lengths,
    shown_prompt,
)
from kdrl_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from kdrl_jax.data.tokenizer import (
    Message,
    Tokenizer,
    check_tokenizer_pair,
    load_tokenizer,
    token_pieces,
)

__all__ = [
    "PROMPT_STYLES",
    "STAGE2_FILTERS",
    "ZERO_RL_STUDENT_FILTERS",
    "ZERO_RL_TEACHER_FILTERS",
    "Content",
    "FilterReport",
    "HFTokenizer",
    "Message",
    "PromptBatches",
    "PromptReport",
    "PromptStyle",
    "ReadReport",
    "SentencePieceTokenizer",
    "Tokenizer",
    "apply_filters",
    "check_tokenizer_pair",
    "encode_content",
    "encode_prompt",
    "encode_prompts",
    "find_style",
    "hold_out",
    "load_problems",
    "load_tokenizer",
    "pad_prompts",
    "parse_filters",
    "prompt_lengths",
    "read_problems",
    "shown_prompt",
    "to_json_lines",
    "token_pieces",
]
