"""The paper's own numbers (Arif et al., AAAI 2025, arXiv 2408.10945), for standing beside ours."""

from __future__ import annotations

SOURCE = "Arif et al., HiRED, AAAI 2025, arXiv 2408.10945"

# Table 3, LLaVA-NeXT-7B.
BENCHMARKS = ("VQAv2", "ScienceQA", "TextVQA", "DocVQA", "OCRBench", "MME", "POPE", "ChartQA")
TABLE_3 = {
    "all tokens": (80.3, 73.2, 64.8, 73.4, 501, 1519, 87.6, 54.8),
    "spatial, 40 %": (77.7, 68.0, 57.0, 58.9, 369, 1401, 87.2, 39.0),
    "PruMerge, about 10 %": (75.6, 66.8, 53.5, 37.8, 336, 1393, 85.0, 28.8),
    "PruMerge+, about 55 %": (78.0, 68.2, 54.4, 44.6, 365, 1474, 87.9, 30.2),
    "HiRED, 20 %": (77.5, 73.4, 61.4, 60.8, 475, 1483, 87.0, 42.0),
    "HiRED, 40 %": (78.8, 73.8, 63.6, 68.7, 488, 1474, 88.2, 46.5),
}

# Table 5, at 20 %, by the name of our arm that changes the same decision.
ABLATION_BENCHMARKS = ("ScienceQA", "VQAv2", "TextVQA", "DocVQA")
TABLE_5 = {
    "hired": ("budget by layer 0, dropping by layer 22", (68.4, 77.7, 54.8, 59.2)),
    "even allocation": ("budget shared evenly", (67.6, 73.3, 52.2, 48.8)),
    "allocation by the feature layer": ("budget by layer 22", (65.2, 68.6, 37.3, 54.0)),
    "selection by layer 0": ("dropping by layer 0", (65.2, 68.6, 37.3, 54.0)),
    "selection by the middle layer": ("dropping by layer 11", (68.0, 76.1, 51.9, 52.0)),
    "max over heads": ("heads not summed", (67.2, 76.6, 50.5, 52.4)),
}

# Figure 2: the share of the language model's attention to visual tokens that the top ones hold.
FIGURE_2 = {0.2: 0.60, 0.4: 0.80}
# Figure 5, tokens an image on TextVQA.
FIGURE_5 = {
    "all tokens": "2000 to 2500",
    "PruMerge+": "1400 to 2000",
    "PruMerge": "300 to 500",
    "HiRED, 40 %": "1000 to 1100",
    "HiRED, 20 %": "500 to 550",
}
# Table 2: where the 10 and 20 % most attended of 2880 tokens lie.
PARTITIONS = ("full-image", "top left", "top right", "bottom left", "bottom right")
TABLE_2 = {0.1: (37, 12, 29, 84, 126), 0.2: (94, 40, 61, 148, 234)}
BEST_ALPHA = 0.5
