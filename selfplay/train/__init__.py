"""The DPO step of a round: one model, one forward per group. See loop.py."""
