"""Data sets of the papers on the Hugging Face hub, each at the commit that was looked at."""

SKYWORK = (
    "hf://Skywork/Skywork-OR1-RL-Data?file=data/math-*.parquet"
    "&revision=1cdedc52e0e2db85fdf252f9be682e63a5a38c33"
)
DEEPSCALER = (
    "hf://agentica-org/DeepScaleR-Preview-Dataset?file=deepscaler.json"
    "&revision=b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29"
)
