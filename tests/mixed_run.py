"""A recipe of two small rounds with three sources, for the scripted generator: gold answers, rules, and two judges together."""

import json
from pathlib import Path
from typing import Any

from scripted_run import JUDGED

ROWS = {"gold": 40, "open": 40, "rules": 60}
COMBINED = {
    "kind": "combine",
    "how": "weighted_mean",
    "normalize": "rank",
    "judges": [{**JUDGED, "weight": 0.7}, {"kind": "coin", "weight": 0.3}],
}
SOURCES: dict[str, dict[str, Any]] = {
    "gold": {
        "prompts": {"source": "gold.jsonl", "heldout": 0.2},
        "pairs": {"kind": "gold_vs_completion", "filters": [{"kind": "mix_previous", "window": 1}]},
        "evaluate": {"judge": {"kind": "rouge_l"}},
    },
    "rules": {"weight": 2.0, "prompts": {"source": "rules.jsonl", "heldout": 0.1}, "judge": JUDGED},
    "open": {
        "weight": [1.0, 0.5],
        "prompts": {"source": "open.jsonl"},
        "judge": COMBINED,
        "pairs": {"kind": "all_above_margin", "min_margin": 0.2, "max_pairs_per_prompt": 2},
    },
}


def write_mixed(folder: Path, model: Path, /, **sections: Any) -> Path:
    """A recipe in `folder` and its prompts, `num_prompts` 12 a round; two prompts are in more than one source."""
    for name, count in ROWS.items():
        rows = [{"prompt": f"Tell me of {name} {n}.", "gold": f"The {name} sky of {n}."} for n in range(count)]
        rows += [{"prompt": f"Tell me of sharing {n}.", "gold": "The sky."} for n in range(2)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data: dict[str, Any] = {
        "model": str(model),
        "rounds": 2,
        "num_prompts": 12,
        "sources": SOURCES,
        "generator": {"kind": "scripted", "max_tokens": 100},
        "train": {"learning_rate": [1e-3, 1e-4], "batch_size": 4, "bf16": False},
        "evaluate": {"num_completions": 2},
    }
    path = folder / "mixed.yaml"
    path.write_text(json.dumps({**data, **sections}))  # JSON is YAML, and has no aliases
    return path
