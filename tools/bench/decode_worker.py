"""What versions.py runs in a process of its own for each checkout: one loaded model that decodes when it is asked to.

Uses nothing but offmoe's public names that every version has. Each line of stdin asks for one round; the answer is one
line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any

PROMPT_TOKENS = 8


def serve(model_name: str, options: dict[str, Any], tokens: int) -> None:
    """Load a model, then answer each seed on stdin with the figures of one round."""
    import torch

    import offmoe

    model: Any = offmoe.from_pretrained(model_name, **options)
    print(json.dumps({"memory": model.offload.memory().describe()}), flush=True)
    with model.offload, torch.no_grad():
        for line in sys.stdin:
            chance = torch.Generator().manual_seed(int(line))
            ids = torch.randint(3, model.config.vocab_size, (1, PROMPT_TOKENS), generator=chance)
            out = model(input_ids=ids, use_cache=True)
            before, digest, began = model.offload.stats(), hashlib.sha256(), time.perf_counter()
            for _ in range(tokens):
                ids = torch.randint(3, model.config.vocab_size, (1, 1), generator=chance)
                out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
                digest.update(out.logits.float().numpy().tobytes())
            seconds = time.perf_counter() - began
            stats = model.offload.stats() - before
            answer = {"seconds": seconds, "hit_rate": stats.hit_rate, "logits": digest.hexdigest()}
            print(json.dumps(answer), flush=True)
