"""Write an eviction policy of your own, run it on the demo model, and compare it with the default.

A policy gives every expert a score, and offmoe evicts the one with the lowest. Run it with: python
examples/custom_policy.py. On the command line the same class is --eviction custom_policy:RecentAndFrequent.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import AutoTokenizer

import offmoe
from offmoe.hf.hub.locate import locate
from offmoe.policy.eviction import ScoredPolicy
from offmoe.types import Demand

PROMPT = "The river that runs through the old town"


class RecentAndFrequent(ScoredPolicy):
    """Score: the number of the last access, plus one bonus per earlier access."""

    bonus = 4.0
    now = 0.0

    def on_access(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self.now += 1.0
        for key in keys:
            self.scores[key] = max(self.now, self.score(key)) + self.bonus


def hit_rate(eviction: str) -> float:
    """Hit rate of 32 generated tokens with 3 slots for the 8 experts of each layer."""
    model = offmoe.from_pretrained("demo", device="cpu", slots_per_layer=3, eviction=eviction, on_miss="fetch")
    with model.offload:
        inputs = AutoTokenizer.from_pretrained(locate("demo").folder)(PROMPT, return_tensors="pt")
        model.generate(**inputs, max_new_tokens=32, do_sample=False)
        return model.offload.stats().hit_rate


if __name__ == "__main__":
    offmoe.register_eviction("recent-and-frequent", RecentAndFrequent)
    for name in ("aged-lfu", "recent-and-frequent"):
        print(f"{name}: {hit_rate(name):.1%} of demands hit")
