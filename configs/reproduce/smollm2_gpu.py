"""The grid with a real model, SmolLM2-135M, on one GPU. Not run yet: none was at hand.

    python -m kdrl_jax.reproduce --grid=configs/reproduce/smollm2_gpu.py --output=runs/smollm2_grid

The teacher is the model after 400 supervised steps on a task's worked solutions, the student the
same model after 30, so that it knows the form but errs. One cell at a time has the whole device.
"""

from ml_collections import ConfigDict

from configs.reproduce.cpu import get_config as cpu


def get_config():
    g = cpu()
    g.title = "KDRL and RLAD with SmolLM2-135M: every method from the same student and teacher"
    g.tasks = ConfigDict(
        {
            "arithmetic": "configs/reproduce/smollm2_arithmetic.py",
            "knights_knaves": "configs/reproduce/smollm2_knights_knaves.py",
        }
    )
    g.workers, g.pin, g.platform = 1, False, ""
    g.budget_minutes = 24 * 60
    return g
