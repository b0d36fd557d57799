"""google-tunix 0.1.7 on the workloads, by its own public classes.

Variants: W1 "log_probs" returns log-probs too; W3 "distill" is its DistillationTrainer with the
teacher's forward; W3 and W5 "remat" computes decoder layers again in the backward pass.
"""

import itertools
import logging

import jax
import jax.numpy as jnp
import optax
import workloads as w
from flax import nnx
from tunix.distillation import distillation_trainer, strategies
from tunix.generate import sampler
from tunix.models.qwen3 import model as qwen3
from tunix.rl import algo_core, common, trainer
from tunix.rl.grpo import grpo_learner
from tunix.sft import peft_trainer

PAD, END = 0, 1
logging.disable(logging.WARNING)


def model_config(args, shape: w.Shape, frozen: bool = False) -> qwen3.ModelConfig:
    """Weights are float32 to be trained, in the compute dtype else."""
    kind = qwen3.RematConfig
    return qwen3.ModelConfig(
        num_layers=shape.layers,
        vocab_size=shape.vocab,
        embed_dim=shape.width,
        hidden_dim=shape.mlp,
        num_heads=shape.heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.kv_heads,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
        remat_config=kind.DECODER if args.variant == "remat" else kind.NONE,
        dtype=jnp.dtype(args.dtype),
        param_dtype=jnp.dtype(args.dtype if frozen else "float32"),
    )


def make_model(args, frozen: bool = False) -> nnx.Module:
    """Random weights: every matrix N(0, 0.02²), since the MLP is initialised with zeros."""
    model = qwen3.Qwen3(model_config(args, w.SHAPES[args.shape], frozen), rngs=nnx.Rngs(0))
    keys = (jax.random.key(i) for i in itertools.count())

    def draw(x):
        return x if x.ndim < 2 else 0.02 * jax.random.normal(next(keys), x.shape, x.dtype)

    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
    return model


class Ids:
    """A tokenizer whose text is the ids, so that no time goes into text."""

    bos_token_id, eos_token_id, pad_token_id = None, END, PAD

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return ""

    def bos_id(self):
        return PAD

    def eos_id(self):
        return END

    def pad_id(self):
        return PAD

    def dedup_bos_ids(self, ids):
        return ids


def ending_sampler(vocab: int):
    """A sampler whose row ends after as many tokens as its first prompt id says, less 8."""

    class Ending(sampler.Sampler):
        def _sample(self, logits, cache, eos, sampler_state):
            wanted = sampler_state.token_buffer[:, 0] - 8
            drawn = sampler_state.decoding_step + 2 - w.PROMPT
            is_end = jnp.arange(vocab) == END
            free = jnp.where(is_end, -1e9, logits[:, -1:])
            done = (drawn >= wanted)[:, None, None]
            logits = jnp.where(done, jnp.where(is_end, 1e9, -1e9), free)
            return super()._sample(logits=logits, cache=cache, eos=eos, sampler_state=sampler_state)

    return Ending


def rollout(args, shape: w.Shape) -> None:
    count, most = args.rows, args.length
    at_once, kind, ends = count, sampler.Sampler, [-1]
    ids = w.prompts(shape.vocab, count)
    lengths = w.wanted_lengths(args.workload, count, most).tolist()
    if args.workload == "W2":
        ids[:, 0] = [n + 8 for n in lengths]
        at_once, kind, ends = w.AT_ONCE, ending_sampler(shape.vocab), [END]
    cache = sampler.CacheConfig(
        cache_size=w.PROMPT + most,
        num_layers=shape.layers,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )
    draw = kind(make_model(args, frozen=True), Ids(), cache)
    texts = [" ".join(map(str, row)) for row in ids]
    seeds = itertools.count()

    def run() -> None:
        for start in range(0, count, at_once):
            out = draw(
                texts[start : start + at_once],
                max_generation_steps=most,
                max_prompt_length=w.PROMPT,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                eos_tokens=ends,
                seed=next(seeds),
                return_logprobs=args.variant == "log_probs",
            )
            kept = args.workload == "W2"  # the end token is not returned
            found = [len(row) + kept for row in out.tokens]
            assert found == lengths[start : start + at_once], found

    w.measure(run, sum(lengths), args.repeats)


def score(args, shape: w.Shape) -> None:
    graph, state = nnx.split(make_model(args, frozen=True))
    tokens = jnp.asarray(w.train_rows(shape, args.rows, args.length)["tokens"])
    options = {"pad_id": PAD, "eos_id": END, "stop_gradient": True, "return_logits": False}

    def run() -> None:
        prompt, completion = tokens[:, : w.PROMPT], tokens[:, w.PROMPT :]
        out = common.compute_per_token_logps(
            graph, state, prompt, completion, temperature=1.0, **options
        )
        jax.block_until_ready(out)

    w.measure(run, tokens.size, args.repeats)


def optimizer():
    return optax.adamw(**w.ADAM)


def make_trainer(model: nnx.Module) -> trainer.Trainer:
    """Its trainer with its GRPO loss."""
    algorithm = grpo_learner.GRPOConfig(
        num_generations=8, beta=w.KL_WEIGHT, kl_loss_mode="mse_kl", epsilon=0.2
    )
    algorithm.temperature = 1.0
    training = trainer.Trainer(
        model,
        optimizer(),
        peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=100),
        custom_checkpoint_metadata_fn=dict,
    )

    def loss(model, train_example, algo_config):
        return algo_core.grpo_loss_fn(
            model, train_example, algo_config=algorithm, pad_id=PAD, eos_id=END
        )

    training.with_loss_fn(loss, has_aux=True)
    training.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": algorithm})
    return training


def make_example(args, shape: w.Shape) -> grpo_learner.TrainExample:
    """The rows as its loss wants them."""
    data = jax.tree.map(jnp.asarray, w.train_rows(shape, args.rows, args.length))
    prompt, completion = data["tokens"][:, : w.PROMPT], data["tokens"][:, w.PROMPT :]
    return grpo_learner.TrainExample(
        prompt_ids=prompt,
        prompt_mask=jnp.ones_like(prompt),
        completion_ids=completion,
        completion_mask=jnp.ones_like(completion),
        advantages=data["advantages"],
        ref_per_token_logps=data["teacher"],
        old_per_token_logps=data["old"],
    )


def train(args, shape: w.Shape) -> None:
    training, example = make_trainer(make_model(args)), make_example(args, shape)
    step, _ = training.jit_train_and_eval_step()

    def run() -> None:
        out = step(example)
        jax.block_until_ready((out, nnx.state(training.optimizer)))

    w.measure(run, args.rows * args.length, args.repeats)


def distill(args, shape: w.Shape) -> None:
    tokens = jnp.asarray(w.train_rows(shape, args.rows, args.length)["tokens"])

    def forward(model, input_tokens, input_mask):
        positions = common.build_positions_from_mask(input_mask)
        mask = common.make_causal_attn_mask(input_mask)
        return model(input_tokens, positions, None, mask)[0]

    training = distillation_trainer.DistillationTrainer(
        make_model(args),
        make_model(args, frozen=True),
        strategies.LogitStrategy(
            student_forward_fn=forward,
            teacher_forward_fn=forward,
            labels_fn=lambda input_tokens, input_mask: jax.nn.one_hot(input_tokens, shape.vocab),
            temperature=1.0,
            alpha=1.0,
        ),
        optimizer(),
        distillation_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=100),
    )
    step, _ = training.jit_train_and_eval_step()
    given = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=jnp.ones(tokens.shape, bool))

    def run() -> None:
        jax.block_until_ready(step(training._prepare_inputs(given)))

    w.measure(run, tokens.size, args.repeats)


if __name__ == "__main__":
    arguments = w.arguments()
    of = {"W1": rollout, "W2": rollout, "W4": score}.get(arguments.workload, train)
    of = distill if arguments.variant == "distill" else of
    of(arguments, w.SHAPES[arguments.shape])
