"""docs/papers.md: every config it names exists and has the paper's values, which are written here.

Sections are those of KDRL (arXiv 2506.02208 v1) and RLAD (arXiv 2602.22495 v2).
"""

import re

import pytest

from kdrl_jax.config import ROOT, flatten, load_config
from kdrl_jax.data.filters import parse_filters
from kdrl_jax.training.validation import validate

PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
NAME = re.compile(
    r"`((?:stage1|stage2|sft|kd_rkl|grpo|zero_rl_teacher|zero_rl|rlad)(?::[\w.,]+)?)`"
)
CONFIGS = sorted(set(NAME.findall(PAGE)))

R1 = "DeepSeek-R1-Distill-Qwen-"
ALL_OF_KDRL = {  # tables 3 and 5
    "rollout.prompts_per_step": 64,
    "rollout.group_size": 16,
    "mini_batches": 1,
    "epochs": 1,
    "optimizer.learning_rate": 1e-6,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 1.0,
    "entropy_coef": 1e-3,
    "data.max_prompt_tokens": 1024,
    "aggregation": "group-token-mean",  # eq. 2
    "rollout.top_p": 1.0,
    # section 4.1
    "eval.require_format": False,
    "eval.temperature": 0.6,
    "eval.top_p": 1.0,
}
STAGE2 = ALL_OF_KDRL | {
    "objective": "kdrl",
    "kd_estimator": "k2",
    "kd_mask": "none",
    "steps": 280,
    "rollout.max_new_tokens": 20_480,
    "rollout.temperature": 0.6,
    "reference_coef": 0.0,  # section 2.1
    "reward.require_format": True,  # B.1.2
    "data.prompt_style": "kdrl",
    "eval.max_new_tokens": 32_768,
    "eval.samples": 16,
    "teacher.path": "Skywork/Skywork-OR1-Math-7B",
    # B.1.1
    "data.filters": (
        f"pass_rate:model={R1}1.5B,max=0.875",
        f"solved_by_any:models={R1}1.5B|{R1}7B|{R1}32B",
        f"cap_unsolved:model={R1}1.5B,share=0.1",
        "prompt_tokens:max=1024",
        "expected:n=61000",
    ),
}
ANNEALED = {"beta.schedule": "linear", "beta.init": 5e-3, "beta.min": 1e-3, "beta.delta": 5e-5}


def constant(beta):
    return {"beta.schedule": "constant", "beta.init": beta}


KDRL = STAGE2 | constant(2e-3)  # section 3.3
TOPK = {"kd_estimator": "topk", "kd_topk.support": "floor"}  # A.3
K3 = {"kd_estimator": "k3", "k3_clamp": 10.0}


def limited(config, n):
    return config | {"data.filters": (*config["data.filters"], f"limit:n={n}")}


ZERO_RL = ALL_OF_KDRL | {  # table 5, section 4.5, B.3
    "rollout.temperature": 1.0,
    "rollout.max_new_tokens": 8192,
    "eval.max_new_tokens": 0,  # as many
    "reward.require_format": False,
    "data.prompt_style": "zero_rl",
    "steps": 480,
    "data.filters": (f"pass_rate:model={R1}1.5B,min=0.5", "expected:n=46000"),
}
RLAD = {  # section 5.1
    "objective": "trrd",
    "trrd.alpha": 0.5,
    "trrd.clamp": 1.0,
    "trrd.alpha_steps": 0,
    "clip_eps_low": 0.2,
    "clip_eps_high": 0.28,
    "aggregation": "seq-mean-token-mean",
    "advantage.scale": "group",
    "optimizer.learning_rate": 1e-6,
    "mini_batches": 1,
    "eval.temperature": 0.6,
    "eval.top_p": 0.95,
}
LOGIC = RLAD | {
    "rollout.prompts_per_step": 32,
    "rollout.group_size": 8,
    "rollout.max_new_tokens": 2048,
    "micro_batch": 32,
    "data.task_args": '{"min_people": 2, "max_people": 8}',
    "eval.by": "names",
}
MATH = RLAD | {  # section 5.2
    "rollout.prompts_per_step": 16,
    "rollout.group_size": 16,
    "data.max_prompt_tokens": 2048,
    "rollout.max_new_tokens": 8192,
    "micro_batch": 16,
    "adaptive_entropy.target": 0.2,
    "adaptive_entropy.delta": 1e-4,
    "adaptive_entropy.max": 5e-3,
    "data.filters": (),
    "eval.samples": 32,
}
LONG = {"rollout.max_new_tokens": 30_720, "eval.max_new_tokens": 30_720}
LONG |= {"reward.require_format": False}
SFT = {"objective": "sft", "optimizer.learning_rate": 2e-7, "reward.require_format": False}
PAPERS = {
    "stage1": ALL_OF_KDRL
    | {
        **{"objective": "grpo", "steps": 500, "reference_coef": 1e-3},
        **{"rollout.max_new_tokens": 8192, "rollout.temperature": 0.6},
        **{"eval.max_new_tokens": 32_768, "data.filters": ("expected:n=40000",)},
    },
    "stage2": STAGE2 | ANNEALED,
    "stage2:constant": KDRL,
    "stage2:reward_shaping": KDRL | {"objective": "reward_shaping"},
    "stage2:k3": KDRL | K3,
    "stage2:topk": KDRL | TOPK,
    "stage2:beta_1e_3": STAGE2 | constant(1e-3),
    "stage2:beta_5e_3": STAGE2 | constant(5e-3),
    "stage2:response_mask": KDRL | {"kd_mask": "response"},
    "stage2:group_mask": KDRL | {"kd_mask": "group"},
    "stage2:weak_teacher": KDRL
    | {
        "teacher.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
        "@916b56a44061fd5cd7d6a8fb632557ed4f724f60"
    },
    "stage2:constant,10k": limited(KDRL, 10_000),
    "stage2:k3,10k": limited(KDRL | K3, 10_000),
    "stage2:topk,10k": limited(KDRL | TOPK, 10_000),
    "stage2:beta_1e_3,30k": limited(STAGE2 | constant(1e-3), 30_000),
    "stage2:constant,30k": limited(KDRL, 30_000),
    "stage2:beta_5e_3,30k": limited(STAGE2 | constant(5e-3), 30_000),
    "stage2:annealing,30k": limited(STAGE2 | ANNEALED, 30_000),
    "stage2:response_mask,30k": limited(KDRL | {"kd_mask": "response"}, 30_000),
    "stage2:group_mask,30k": limited(KDRL | {"kd_mask": "group"}, 30_000),
    "stage2:distil_then_rl": {
        "beta.phases": ((0, 5e-3), (112, 0.0)),
        "policy_phases": ((0, 0.0), (112, 1.0)),
    },
    # Beyond the papers.
    "stage2:adaptive": STAGE2 | {"beta.schedule": "adaptive", "beta.init": 5e-3},
    "stage2:lora_7b": ANNEALED | {"student.lora.rank": 32, "student.shape.hidden_size": 3584},
    "stage2:teacher_32b": ANNEALED | {"teacher.shape.hidden_size": 5120},
    "grpo": STAGE2 | {"objective": "grpo"},
    "grpo:equal_time": STAGE2 | {"objective": "grpo", "steps": 460},  # section 4.3
    "kd_rkl": STAGE2 | constant(2e-3) | {"objective": "kd_rkl"},  # B.2 (ii)
    "kd_rkl:equal_time": STAGE2 | constant(2e-3) | {"objective": "kd_rkl", "steps": 200},
    "sft": STAGE2  # B.2 (i)
    | SFT
    | {
        **{"rollout.group_size": 8, "rollout.prompts_per_step": 16, "sft_problems": 0},
        **{"aggregation": "seq-mean-token-mean", "entropy_coef": 0.0},
        "reward.require_format": False,
    },
    "zero_rl": ZERO_RL
    | {
        **{"objective": "kdrl", "beta.schedule": "linear", "beta.init": 2e-1, "beta.min": 2e-3},
        "beta.delta": 8e-4,
    },
    "zero_rl:grpo": ZERO_RL | {"objective": "grpo"},
    "zero_rl:kd_rkl": ZERO_RL | constant(5e-3) | {"objective": "kd_rkl"},
    "zero_rl_teacher": ZERO_RL
    | {
        **{"objective": "grpo", "steps": 300},
        "data.filters": (f"pass_rate:model={R1}1.5B,min=0.25", "expected:n=58000"),
    },
    "rlad": LOGIC,
    "rlad:8k": LOGIC | {"rollout.max_new_tokens": 8192},
    "rlad:1.7b": LOGIC | {"student.shape.hidden_size": 2048},
    "rlad:1.7b,8k": LOGIC | {"student.shape.hidden_size": 2048, "rollout.max_new_tokens": 8192},
    "rlad:grpo": LOGIC | {"objective": "grpo"},
    "rlad:kdrl": LOGIC | constant(2e-3) | {"objective": "kdrl"},
    "rlad:straight_through": LOGIC | {"trrd.clamp_gradient": "straight_through"},
    "rlad:math": MATH | {"student.shape.hidden_size": 2048, "teacher.shape.hidden_size": 4096},
    "rlad:math,1.7b_base": MATH | LONG | {"student.shape.hidden_size": 2048},
    "rlad:math,8b_base": MATH
    | LONG
    | {"student.shape.hidden_size": 4096, "teacher.shape.hidden_size": 5120},
    "rlad:math,8b_base,grpo": MATH | LONG | {"objective": "grpo"},
    "rlad:math,8b_base,kdrl": MATH | LONG | constant(2e-3) | {"objective": "kdrl"},
    "rlad:math,8b_base,sft": MATH | LONG | SFT | {"adaptive_entropy.target": 0.0},
    "rlad:math,r1_1.5b": MATH
    | {"student.shape.hidden_size": 1536, "teacher.shape.hidden_size": 3584},
}


def test_the_page_and_the_values_here_name_the_same_configs():
    assert set(CONFIGS) == set(PAPERS)


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_the_papers(name):
    flat = flatten(load_config(name))
    wrong = {
        key: (flat[key], value)
        for key, value in PAPERS.get(name, {}).items()
        if (
            flat[key].partition("@")[0] if key == "teacher.path" and "@" not in value else flat[key]
        )
        != value
    }
    assert not wrong


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_can_run(name):
    config = load_config(name)
    parse_filters(config.data.filters)
    assert validate(config, sources=False).rollouts in (1024, 256, 128)


def test_keys_that_the_page_names_exist():
    known = flatten(load_config("base"))
    keys = re.findall(r"`(?:--config\.)?([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", PAGE)
    keys = [key for key in keys if not key.startswith(("kdrl_jax.", "torch."))]
    assert len(keys) > 10
    assert [key for key in keys if key not in known] == []
