"""Data sets and models of the papers on the Hugging Face hub, each at one commit.

`SKYWORK_MATH_7B` has no commit: none is known to this project, and a run records the one it took.
"""

from kdrl_jax.evaluation.benchmarks import BENCHMARKS

# Training problems.
SKYWORK = (
    "hf://Skywork/Skywork-OR1-RL-Data?file=data/math-*.parquet"
    "&revision=1cdedc52e0e2db85fdf252f9be682e63a5a38c33"
)
DEEPSCALER = (
    "hf://agentica-org/DeepScaleR-Preview-Dataset?file=deepscaler.json"
    "&revision=b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29"
)

# Held-out problems.
AIME24 = BENCHMARKS["aime24"].source(None)
MATH500 = BENCHMARKS["math500"].source(None)

# Models.
R1_DISTILL_1_5B = (
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B@ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562"
)
R1_DISTILL_7B = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B@916b56a44061fd5cd7d6a8fb632557ed4f724f60"
DEEPSCALER_1_5B = "agentica-org/DeepScaleR-1.5B-Preview@e3f524ce413a296b4d388e7560dd5c82c1c56725"
SKYWORK_MATH_7B = "Skywork/Skywork-OR1-Math-7B"
SKYWORK_32B = "Skywork/Skywork-OR1-32B"
QWEN25_3B = "Qwen/Qwen2.5-3B@3aab1f1954e9cc14eb9509a215f9e5ca08227a9b"
QWEN25_7B = "Qwen/Qwen2.5-7B@d149729398750b98c0af14eb82c78cfe92750796"
SIMPLERL_7B = "hkust-nlp/Qwen-2.5-7B-SimpleRL-Zoo@d630142f26acc8adf8051298cba8023232169d56"
QWEN3_0_6B = "Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca"
QWEN3_1_7B = "Qwen/Qwen3-1.7B@70d244cc86ccca08cf5af4e1e306ecf908b1ad5e"
QWEN3_1_7B_BASE = "Qwen/Qwen3-1.7B-Base@ea980cb0a6c2ae4b936e82123acc929f1cec04c1"
QWEN3_8B_BASE = "Qwen/Qwen3-8B-Base@49e3418fbbbca6ecbdf9608b4d22e5a407081db4"
QWEN3_32B = "Qwen/Qwen3-32B@9216db5781bf21249d130ec9da846c4624c16137"
QWEN3_8B = "Qwen/Qwen3-8B@b968826d9c46dd6066d109eabc6255188de91218"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f77366fa6b3b4b768ec3050bf629380bac"
