"""Small tokenizers made here, and what the paper's prompts look like in full."""

import json

import tokenizers

from kdrl_jax.types import Problem

PROBLEM = Problem("1", "What is 2+3?", "5")
KDRL = "What is 2+3? Let's think step by step and output the final answer within \\boxed{}."
ZERO_RL = "What is 2+3?\nPlease reason step by step, and put your final answer within \\boxed{}."
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_hf(folder, *, settings=None, template=CHATML, eos=None, extra=(), start=False):
    """A byte-level BPE that splits numbers into digits, made with the `tokenizers` library."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    t.train_from_iterator([KDRL, ZERO_RL, "1234 12 123 user assistant system helpful"] * 3, trainer)
    t.add_tokens([tokenizers.AddedToken("<think>", special=False), *extra])
    if start:
        t.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A <|endoftext|>",
            special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)],
        )
    folder.mkdir(parents=True, exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    } | (settings or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    if eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return t
