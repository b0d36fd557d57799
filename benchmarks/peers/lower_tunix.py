"""google-tunix's GRPO step as a program for devices that need not be there; see tpu_cost.py."""

from unittest import mock

import jax
import numpy as np
import run_tunix as own
import workloads as w
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tunix.models.qwen3 import model as qwen3


def lower_train(args, shape: w.Shape, devices: list):
    """A `jax.stages.Lowered`.

    Weights and moments are sharded as the model's own annotations say, on a mesh fsdp x tp; the
    trainer is built and its step taken within one traced function.
    """
    mesh = jax.sharding.Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"))
    config = own.model_config(args, shape)
    graph, weights = nnx.split(nnx.eval_shape(lambda: qwen3.Qwen3(config, rngs=nnx.Rngs(0))))

    def moments(weights):
        return nnx.state(own.make_trainer(nnx.merge(graph, weights)).optimizer)

    def placed(state):
        specs = nnx.get_partition_spec(state)
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
            ),
            state,
            specs,
        )

    def step(weights, of_optimizer, example):
        model = nnx.merge(graph, weights)
        training = own.make_trainer(model)
        nnx.update(training.optimizer, of_optimizer)
        update, _ = training.jit_train_and_eval_step(skip_jit=True)
        out = update(model, training.optimizer, example)
        return out, nnx.state(model), nnx.state(training.optimizer)

    def of_rows(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("fsdp")))

    example = jax.tree.map(of_rows, jax.eval_shape(lambda: own.make_example(args, shape)))
    of_optimizer = placed(jax.eval_shape(moments, weights))
    # It constrains activations only where it sees other devices than CPUs.
    with mesh, mock.patch.object(jax, "devices", return_value=devices):
        return jax.jit(step, donate_argnums=(0, 1)).lower(placed(weights), of_optimizer, example)
