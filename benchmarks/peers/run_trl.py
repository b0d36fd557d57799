"""TRL 1.16 on the workloads, by its own trainers.

Its GRPOTrainer generates by Hugging Face's `generate` in batches that end with their longest
member; W2's are of 16 requests. Its KL is k3 where the others take k2. bfloat16 is autocast over
float32 weights in W3 and W5, as its trainers do, and bfloat16 weights else.

Variants: W3 "distill" is its DistillationTrainer (full reverse KL) with the teacher's forward; W3
and W5 "remat" computes layers again in the backward pass, TRL's default.
"""

import functools
import logging
import os
import tempfile
import warnings

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
import workloads as w
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

PAD, END = 0, 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


def make_model(shape: w.Shape) -> Qwen3ForCausalLM:
    """Random float32 weights, N(0, 0.02²)."""
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return Qwen3ForCausalLM(config).to(DEVICE)


def make_trainer(args, shape: w.Shape, rows: int, *, distil: bool = False):
    """One of its trainers; everything it is given is ids, so its tokenizer knows no words."""
    words = Tokenizer(WordLevel({"<pad>": PAD, "<end>": END, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    options = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": DEVICE == "cpu",
        "bf16": args.dtype == "bfloat16",
        "per_device_train_batch_size": rows,
        "gradient_checkpointing": args.variant == "remat",
        "max_completion_length": args.length,
        "learning_rate": w.ADAM["learning_rate"],
        "adam_beta1": w.ADAM["b1"],
        "adam_beta2": w.ADAM["b2"],
        "adam_epsilon": w.ADAM["eps"],
        "weight_decay": w.ADAM["weight_decay"],
        "report_to": [],
    }
    common = {
        "train_dataset": Dataset.from_list([{"prompt": "?"}] * rows),
        "processing_class": tokenizer,
    }
    if distil:
        options["beta"] = 1.0  # reverse KL
        models = {"model": make_model(shape), "teacher_model": make_model(shape)}
        return DistillationTrainer(args=DistillationConfig(**options), **models, **common)
    group = next(n for n in (8, 4, 2) if rows % n == 0)
    config = GRPOConfig(**options, loss_type="grpo", num_generations=group)
    return GRPOTrainer(make_model(shape), lambda **_: [0.0] * rows, config, **common)


class Ends(LogitsProcessor):
    """Each row draws the end token as its last one, as many tokens as are `wanted`."""

    wanted = torch.zeros(0)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        last = self.wanted <= ids.shape[1] - w.PROMPT + 1
        scores[:, END] = -torch.inf
        scores[last] = -torch.inf
        scores[last, END] = 0.0
        return scores


def rollout(args, shape: w.Shape) -> None:
    lengths = w.wanted_lengths(args.workload, args.rows, args.length)
    at_once = w.AT_ONCE if args.workload == "W2" else args.rows
    prompts = w.prompts(shape.vocab, args.rows).tolist()
    trainer = make_trainer(args, shape, at_once)
    model = frozen(args, trainer)
    ends = Ends()
    if args.workload == "W2":
        model.generate = functools.partial(
            model.generate, logits_processor=LogitsProcessorList([ends])
        )
    else:  # nothing ends a row but the limit
        trainer.generation_config.eos_token_id = model.generation_config.eos_token_id = None
        trainer.eos_token_ids = [-1]

    def run() -> None:
        for start in range(0, args.rows, at_once):
            part = slice(start, start + at_once)
            ends.wanted = torch.tensor(lengths[part], device=DEVICE)
            out, _ = trainer._generate_single_turn(prompts[part], None, {}, 1)
            found = [len(row) for row in out]
            assert found == lengths[part].tolist(), found

    w.measure(run, int(lengths.sum()), args.repeats)


def frozen(args, trainer) -> Qwen3ForCausalLM:
    """The trainer's model as it is where nothing is trained."""
    return trainer.model.to(getattr(torch, args.dtype)).eval()


def on_device(data: dict) -> dict[str, torch.Tensor]:
    """The rows; token ids as torch has them."""
    return {
        key: torch.tensor(x, device=DEVICE).long()
        if key == "tokens"
        else torch.tensor(x).to(DEVICE)
        for key, x in data.items()
    }


def score(args, shape: w.Shape) -> None:
    trainer = make_trainer(args, shape, args.rows)
    model = frozen(args, trainer)
    tokens = on_device(w.train_rows(shape, args.rows, args.length))["tokens"]

    def run() -> None:
        with torch.no_grad():
            scored = args.length - w.PROMPT
            trainer._get_per_token_logps_and_entropies(
                model, tokens, torch.ones_like(tokens), scored
            )
        wait()

    w.measure(run, tokens.numel(), args.repeats)


def train(args, shape: w.Shape) -> None:
    distil = args.variant == "distill"
    trainer = make_trainer(args, shape, args.rows, distil=distil)
    data = on_device(w.train_rows(shape, args.rows, args.length))
    prompt, completion = data["tokens"][:, : w.PROMPT], data["tokens"][:, w.PROMPT :]
    batch = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": data["advantages"],
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["teacher"],
        "num_items_in_batch": torch.tensor(completion.numel(), device=DEVICE),
    }
    if not distil:
        trainer.beta = w.KL_WEIGHT  # set late: given sooner, it would load a reference model
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare_model(trainer.model).train()
    optimizer = trainer.create_optimizer()

    def run() -> None:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch)
        trainer.accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        wait()

    w.measure(run, data["tokens"].numel(), args.repeats)


def wait() -> None:
    """Until the accelerator is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    torch.manual_seed(0)
    arguments = w.arguments()
    of = {"W1": rollout, "W2": rollout, "W4": score}.get(arguments.workload, train)
    of(arguments, w.SHAPES[arguments.shape])
