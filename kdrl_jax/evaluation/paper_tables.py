"""What the papers measured, table by table, and which tables a model is set beside.

Figures are in %, as the papers print them. KDRL is arXiv 2506.02208 (v1), RLAD is arXiv 2602.22495
(v2). Of KDRL's tables 2 and 4 only the averages are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kdrl_jax.models import ModelConfig

SIX = ("aime24", "aime25", "math500", "amc23", "minerva_math", "olympiadbench")
"""KDRL's benchmarks; `average` is over all of them."""
AVERAGE = "average"
PEOPLE = tuple(str(n) for n in range(2, 9))
"""Values of `eval.by` of Knights and Knaves: how many people a puzzle has."""

Row = Mapping[str, float]
"""Benchmark → figure; "BENCHMARK/VALUE" is that of a part of it, by `eval.by`."""


class PaperTable(NamedTuple):
    """A table of a paper, or the part of it that is about one student."""

    source: str
    shape: tuple[int, int]
    """Hidden size and layers of the models in it."""
    style: str
    """`data.prompt_style` that goes with it."""
    tokens: int
    """Budget of a response."""
    rows: Mapping[str, Row]

    def fits(self, shape: ModelConfig, style: str) -> bool:
        """Whether a model of this shape, asked in this style, belongs beside the table."""
        return self.style == style and self.shape == (shape.hidden_size, shape.num_layers)


def _six(rows: Mapping[str, tuple[float, ...]]) -> dict[str, Row]:
    return {name: dict(zip((*SIX, AVERAGE), x, strict=True)) for name, x in rows.items()}


def _puzzles(rows: Mapping[str, tuple[float, ...]]) -> dict[str, Row]:
    """Shares by size, and their mean, as percentages."""
    names = (*(f"knights_knaves/{n}" for n in PEOPLE), "knights_knaves")
    return {
        name: dict(zip(names, (round(100 * x) for x in shares), strict=True))
        for name, shares in rows.items()
    }


def _mathematics(rows: Mapping[str, tuple[float, ...]]) -> dict[str, Row]:
    """RLAD's Mean@32; its pass@32 and AMC24 have no columns here."""
    names = ("aime24", "amc23", "math500", "aime25")
    return {name: dict(zip(names, x, strict=True)) for name, x in rows.items()}


QWEN25_1_5B, QWEN25_3B, QWEN25_7B = (1536, 28), (2048, 36), (3584, 28)
QWEN3_0_6B, QWEN3_1_7B, QWEN3_8B = (1024, 28), (2048, 28), (4096, 36)

TABLES = (
    PaperTable(
        "KDRL, table 1",
        QWEN25_1_5B,
        "kdrl",
        32_768,
        _six(
            {
                "backbone": (30.8, 22.9, 86.6, 76.1, 36.4, 55.6, 51.4),
                # Its AIME25 is not printed; 24.6 follows from the average.
                "SFT": (33.5, 24.6, 87.6, 76.9, 31.6, 54.8, 51.5),
                "KD-RKL": (41.0, 29.1, 89.0, 80.2, 37.9, 59.6, 56.1),
                "GRPO": (38.3, 27.1, 88.6, 79.5, 37.5, 56.3, 54.6),
                "KDRL": (42.1, 28.8, 90.0, 81.3, 39.3, 59.4, 56.8),
                "KDRL-Annealing": (42.9, 29.6, 90.4, 82.2, 38.2, 60.0, 57.2),
            }
        ),
    ),
    PaperTable(
        "KDRL, table 2",
        QWEN25_3B,
        "zero_rl",
        8192,
        {
            "Qwen2.5-3B": {AVERAGE: 21.3},
            "KD-RKL": {AVERAGE: 30.8},
            "GRPO": {AVERAGE: 31.3},
            "KDRL-Annealing": {AVERAGE: 32.5},
        },
    ),
    PaperTable(
        "KDRL, table 4",
        QWEN25_7B,
        "zero_rl",
        8192,
        {"Qwen2.5-7B": {AVERAGE: 26.9}, "Qwen2.5-7B-GRPO": {AVERAGE: 39.7}},
    ),
    PaperTable(
        "RLAD, table 1",
        QWEN3_0_6B,
        "chat",
        8192,
        _puzzles(
            {
                "Qwen3-0.6B": (0.77, 0.45, 0.52, 0.47, 0.32, 0.34, 0.22, 0.44),
                "GRPO": (0.86, 0.85, 0.85, 0.76, 0.72, 0.66, 0.63, 0.76),
                "KDRL": (1, 0.97, 1, 0.99, 0.96, 0.82, 0.75, 0.92),
                "RLAD": (1, 0.99, 0.99, 0.96, 0.93, 0.91, 0.83, 0.94),
            }
        ),
    ),
    PaperTable(
        "RLAD, table 1",
        QWEN3_0_6B,
        "chat",
        2048,
        _puzzles(
            {
                "Qwen3-0.6B": (0.69, 0.47, 0.41, 0.22, 0.09, 0.08, 0.03, 0.28),
                "GRPO": (0.84, 0.83, 0.85, 0.76, 0.56, 0.58, 0.50, 0.70),
                "KDRL": (1, 0.97, 1, 0.95, 0.82, 0.72, 0.54, 0.86),
                "RLAD": (1, 1, 0.99, 0.96, 0.86, 0.81, 0.69, 0.90),
            }
        ),
    ),
    PaperTable(
        "RLAD, table 1",
        QWEN3_1_7B,
        "chat",
        8192,
        _puzzles(
            {
                "Qwen3-1.7B": (0.95, 0.99, 0.90, 0.80, 0.77, 0.85, 0.70, 0.85),
                "GRPO": (1, 0.99, 1, 0.98, 0.95, 0.92, 0.81, 0.95),
                "KDRL": (0.99, 1, 1, 0.96, 0.97, 0.93, 0.88, 0.96),
                "RLAD": (1, 1, 1, 1, 0.97, 0.95, 0.98, 0.99),
            }
        ),
    ),
    PaperTable(
        "RLAD, table 1",
        QWEN3_1_7B,
        "chat",
        2048,
        _puzzles(
            {
                "Qwen3-1.7B": (0.90, 0.70, 0.66, 0.43, 0.21, 0.16, 0.05, 0.44),
                "GRPO": (1, 0.98, 0.97, 0.90, 0.87, 0.79, 0.52, 0.86),
                "KDRL": (1, 0.98, 1, 0.98, 0.86, 0.84, 0.69, 0.91),
                "RLAD": (0.98, 0.99, 1, 0.98, 0.93, 0.86, 0.75, 0.93),
            }
        ),
    ),
    PaperTable(
        "RLAD, table 2",
        QWEN3_1_7B,
        "kdrl",
        30_720,
        _mathematics(
            {
                "Qwen3-1.7B-Base": (2.1, 16.3, 29.8, 0.9),
                "Base, GRPO": (10.0, 41.2, 54.3, 5.7),
                "Base, KDRL": (10.2, 41.1, 56.2, 6.2),
                "Base, RLAD": (12.1, 42.0, 58.1, 8.3),
            }
        ),
    ),
    PaperTable(
        "RLAD, table 2",
        QWEN3_8B,
        "kdrl",
        30_720,
        _mathematics(
            {
                "Qwen3-8B-Base": (13.9, 30.5, 42.1, 4.7),
                "Base, SFT": (26.7, 67.9, 67.5, 20.8),
                "Base, GRPO": (37.7, 72.9, 68.2, 22.8),
                "Base, KDRL": (42.1, 72.8, 68.4, 27.8),
                "Base, RLAD": (47.8, 73.6, 68.6, 31.7),
            }
        ),
    ),
    PaperTable(
        "RLAD, table 3",
        QWEN3_1_7B,
        "kdrl",
        8192,
        _mathematics(
            {
                "Qwen3-1.7B": (16.1, 52.0, 58.4, 18.6),
                "GRPO": (24.9, 62.7, 63.3, 21.4),
                "KDRL": (26.1, 64.5, 63.5, 23.3),
                "RLAD": (31.3, 69.1, 63.5, 24.2),
            }
        ),
    ),
    PaperTable(
        "RLAD, table 3",
        QWEN25_1_5B,
        "kdrl",
        8192,
        _mathematics(
            {
                "R1-Distill-Qwen-1.5B": (18.2, 57.4, 58.5, 17.6),
                "GRPO": (29.5, 76.3, 64.8, 22.8),
                "KDRL": (30.8, 77.3, 64.0, 24.2),
                "RLAD": (31.9, 78.2, 64.4, 25.1),
            }
        ),
    ),
)


def fitting(shape: ModelConfig, style: str) -> list[PaperTable]:
    """Returns the tables that a model belongs beside; often none.

    Args:
      style: `data.prompt_style`.
    """
    return [table for table in TABLES if table.fits(shape, style)]
