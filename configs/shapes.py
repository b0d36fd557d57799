"""Published shapes of the models that configs name: for plans without a model's folder.

    c.student.shape.update(R1_DISTILL_QWEN_1_5B)

Sizes are those of each model's config.json on the Hugging Face hub.
"""


def _shape(model_type, hidden_size, num_layers, num_heads, num_kv_heads, mlp_size, **more):
    return {
        "model_type": model_type,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": 128,
        "mlp_size": mlp_size,
        "vocab_size": 151_936,
        "tie_embeddings": False,
        **more,
    }


QWEN25_3B = _shape("qwen2", 2048, 36, 16, 2, 11_008, tie_embeddings=True)
QWEN25_7B = _shape("qwen2", 3584, 28, 28, 4, 18_944, vocab_size=152_064)
QWEN25_32B = _shape("qwen2", 5120, 64, 40, 8, 27_648, vocab_size=152_064)
R1_DISTILL_QWEN_1_5B = _shape("qwen2", 1536, 28, 12, 2, 8960)
R1_DISTILL_QWEN_7B = QWEN25_7B
QWEN3_0_6B = _shape("qwen3", 1024, 28, 16, 8, 3072, tie_embeddings=True)
SMOLLM2_135M = _shape(
    "llama", 576, 30, 9, 3, 1536, head_dim=64, vocab_size=49_152, tie_embeddings=True
)
QWEN3_1_7B = _shape("qwen3", 2048, 28, 16, 8, 6144, tie_embeddings=True)
QWEN3_32B = _shape("qwen3", 5120, 64, 64, 8, 25_600)
QWEN3_8B = _shape("qwen3", 4096, 36, 32, 8, 12_288)
