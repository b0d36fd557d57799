"""The methods by name, as data: what each one puts into the slots of the loop."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Method:
    """What a loop must know to run a method; nothing else depends on its name.

    | | samples from | advantages | teacher's log-probs | loss |
    |---|---|---|---|---|
    | `grpo` | student | of the rewards | – | `kdrl_loss`, β = 0 |
    | `kd_rkl` | student | 0 | in the loss | `kdrl_loss` |
    | `kdrl` | student | of the rewards | in the loss | `kdrl_loss` |
    | `reward_shaping` | student | of rewards less β·Σℓ | in the rewards | `kdrl_loss`, β = 0 |
    | `trrd` | student | of the rewards | in the ratio | `trrd_loss` |
    | `sft` | a fixed set of the teacher's right answers | 1 | – | `kdrl_loss`, β = 0 |
    """

    sampler: Literal["student", "teacher"] = "student"
    policy: bool = True
    """Advantages come from the rewards; otherwise they are 0, or 1 if supervised."""
    scores: bool = False
    """The teacher's log-probs of the sampled tokens are needed."""
    kd: bool = False
    """The loss has a distillation term, weighted by β."""
    shaped: bool = False
    """Rewards are shaped by the teacher before they become advantages."""
    supervised: bool = False
    """Advantages are 1 and only right answers have weight: cross-entropy on what was sampled."""
    ratio: Literal["old", "trrd"] = "old"
    """The ratio of the policy term: π_θ/π_old, or the mixture with the teacher's."""

    @property
    def uses_teacher(self) -> bool:
        """Whether there must be a teacher: to score rollouts or to make them."""
        return self.scores or self.sampler == "teacher"


METHODS: dict[str, Method] = {
    "grpo": Method(),
    "kd_rkl": Method(policy=False, scores=True, kd=True),
    "kdrl": Method(scores=True, kd=True),
    "reward_shaping": Method(scores=True, shaped=True),
    "trrd": Method(scores=True, ratio="trrd"),
    "sft": Method(sampler="teacher", policy=False, supervised=True),
}
"""`objective` of the config → Method."""
