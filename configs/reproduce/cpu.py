"""The default grid: nine methods, eleven ablations, two tasks, five seeds; an hour on two cores.

    python -m kdrl_jax.reproduce --grid=configs/reproduce/cpu.py --output=runs/reproduce

Each cell is one process of one thread on a core of its own, so that times are comparable and
results do not depend on the number of cores. The command may be stopped and given again.
Measured: 145 runs in 38.8 minutes; results and report are in `benchmarks/reproduce`.
"""

from ml_collections import ConfigDict


def get_config():
    g = ConfigDict()
    g.title = "KDRL and RLAD at small scale: every method from the same student and teacher"
    g.tasks = ConfigDict(  # name: its config file, which may have a variant `weak_teacher`
        {
            "arithmetic": "configs/reproduce/arithmetic.py",
            "knights_knaves": "configs/reproduce/knights_knaves.py",
        }
    )
    g.seeds = (0, 1, 2, 3, 4)  # of data order and sampling; the warm start's is one more
    g.methods = (  # on every task: names in kdrl_jax.reproduction.methods
        *("sft", "kd_rkl", "grpo", "kdrl", "kdrl_annealing", "kdrl_adaptive"),
        *("reward_shaping", "trrd", "distil_then_rl"),
    )
    g.ablations = (  # on one task alone
        *("estimator_k1", "estimator_k3", "estimator_topk", "estimator_full"),
        *("mask_response", "mask_group", "beta_quarter", "beta_fourfold"),
        *("weak_kdrl", "weak_kd_rkl", "trrd_straight_through"),
    )
    g.ablation_task = "arithmetic"
    g.workers = 2  # cells at a time
    g.pin = True  # a core and a single thread each
    g.platform = "cpu"  # JAX_PLATFORMS of the cells; "": as in the environment
    g.budget_minutes = 60  # the report says whether it was kept
    return g
