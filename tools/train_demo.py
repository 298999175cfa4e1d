#!/usr/bin/env python3
"""Train the demo model that ships with offmoe: a Mixtral-architecture MoE small enough for a wheel.

What moves: text of the Python standard library, of Debian's public-domain prose and of set.mm becomes byte-pair tokens;
the tokens train 6 layers x 8 experts (top-2) in float32; the result is written once, in bfloat16, with its tokenizer.
What bounds it: matrix products on the CPU (about a third of the time at this size, the rest is memory traffic), so
MALLOC settings that keep large buffers mapped are worth a quarter: run it as the model card says.
What it must never do: use text whose license does not allow the weights to be redistributed, or train on held-out text.

Three choices need a reason. The load-balancing loss is computed per layer: transformers' own pools the router logits of
all layers before balancing, which leaves single layers free to collapse (transformers issues 28255 and 31464). A small
look-ahead loss teaches each router to agree with what it would say from the residual of the layer before: without it,
recall of the next layer's experts falls as training goes on (.82 to .76 over 4.5 M tokens), with it the demo stays as
predictable as Mixtral 8x7B was measured to be (.866). Hidden matrices are trained with Muon (Jordan et al. 2024,
orthogonalised momentum), the rest with AdamW.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

VOCABULARY, END_OF_TEXT, WINDOW, BATCH = 4096, "<|endoftext|>", 512, 8
# Share of the training windows per source.
SOURCES = {"python": 0.50, "bible": 0.20, "jargon": 0.10, "devil": 0.03, "metamath": 0.17}
HELD_OUT = 50  # every 50th document is never trained on
BALANCE = 0.12  # weight of the per-layer load-balancing loss
LOOK_AHEAD = 0.1  # weight of the loss that keeps routers predictable from the layer before


def documents(source: str) -> list[str]:
    """Texts of one source, cut into documents. Needs Debian's bible-kjv, dict-jargon, dict-devil,
    metamath-databases.
    """
    if source == "python":
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__", "config"}
        files = [f for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts)]
        return [f.read_text("utf-8", "ignore") for f in files]
    if source == "bible":
        verses = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
        chapters: dict[str, list[str]] = {}
        for line in verses.splitlines():
            place, _, text = line.partition(" ")
            chapters.setdefault(place.partition(":")[0], []).append(text)
        return ["\n".join(lines) + "\n" for lines in chapters.values()]
    if source in ("jargon", "devil"):
        text = gzip.decompress(Path(f"/usr/share/dictd/{source}.dict.dz").read_bytes()).decode("utf-8", "ignore")
        return _chunks(text, 8000)
    text = Path("/usr/share/metamath/databases/set.mm").read_text("utf-8", "ignore")
    return _chunks("".join(_without_proofs(text)), 20000)


def _without_proofs(text: str) -> Iterator[str]:
    """Statements and comments of a Metamath database; the compressed proofs between "$=" and "$." are noise to a
    reader.
    """
    for part in text.split("$="):
        head, dot, tail = part.partition("$.")
        if dot and "$(" not in head:
            yield "$." + tail
        else:
            yield part


def _chunks(text: str, size: int) -> list[str]:
    """Documents of about `size` characters that end at an empty line where there is one."""
    out, start = [], 0
    while start < len(text):
        cut = text.find("\n\n", start + size)
        end = len(text) if cut < 0 else cut + 2
        out.append(text[start:end])
        start = end
    return out


def train_tokenizer(texts: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)

    def sample() -> Iterator[str]:
        for name, docs in texts.items():
            budget = int(8e6 * SOURCES[name])  # characters
            for i in rng.permutation(len(docs)):
                if budget <= 0:
                    break
                yield docs[i][:budget]
                budget -= len(docs[i])

    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(sample(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=1024
    )


def prepare(work: Path) -> None:
    """Write the tokenizer and, per source, token arrays `SOURCE.train.npy` and `SOURCE.held.npy` (uint16)."""
    texts = {name: documents(name) for name in SOURCES}
    train = {n: [d for i, d in enumerate(t) if i % HELD_OUT] for n, t in texts.items()}
    held = {n: [d for i, d in enumerate(t) if not i % HELD_OUT] for n, t in texts.items()}
    tok = train_tokenizer(train)
    tok.save_pretrained(work / "tokenizer")
    for split, docs_of in (("train", train), ("held", held)):
        for name, docs in docs_of.items():
            ids: list[int] = []
            for encoding in tok.backend_tokenizer.encode_batch(docs):
                ids += [0, *encoding.ids]
            np.save(work / f"{name}.{split}.npy", np.array(ids, np.uint16))
            print(f"{name:9} {split:5} {len(docs):6} documents {len(ids) / 1e6:6.2f} M tokens", flush=True)


def build_model() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM._from_config(config, experts_implementation="grouped_mm")


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for stacks of matrices [..., rows, columns].

    Newton-Schulz coefficients and the shape factor are those of Keller Jordan's description (2024).
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float):
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": 0.05})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "m" not in state:
                    state["m"] = torch.zeros_like(p)
                m = state["m"]
                m.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(m, group["momentum"])
                fused = p.ndim == 3 and p.shape[1] > 2 * p.shape[2]  # gate_up_proj [E, 2I, H]: two matrices per expert
                if fused:
                    update = update.unflatten(1, (2, -1))
                update = self._orthogonal(update)
                if fused:
                    update = update.flatten(1, 2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])

    @staticmethod
    def _orthogonal(g: torch.Tensor) -> torch.Tensor:
        tall = g.shape[-2] > g.shape[-1]
        x = g.mT if tall else g
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.mT if tall else x) * max(1.0, g.shape[-2] / g.shape[-1]) ** 0.5


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Mean over layers of the Switch balancing loss of that layer alone; 1.0 when every layer is uniform."""
    losses = []
    for logits in router_logits:  # [tokens, experts]
        p = logits.float().softmax(-1)
        chosen = torch.zeros_like(p).scatter_(1, logits.topk(top_k, -1).indices, 1.0)
        losses.append(p.shape[1] * (chosen.mean(0) * p.mean(0)).sum() / top_k)
    return torch.stack(losses).mean()


class Residuals:
    """The residual stream before each MoE block, as its norm gets it: [batch, length, hidden] by layer."""

    def __init__(self, model: MixtralForCausalLM):
        self.layers = model.model.layers
        self.before: dict[int, torch.Tensor] = {}
        self._hooks = [
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, a, i=i: self.before.__setitem__(i, a[0]))
            for i, layer in enumerate(self.layers)
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def ahead(self, layer: int) -> torch.Tensor:
        """Router logits [tokens, experts] of a layer, from the residual of the layer before it."""
        normed = self.layers[layer].post_attention_layernorm.forward(self.before[layer - 1].detach())
        return F.linear(normed.flatten(0, 1), self.layers[layer].mlp.gate.weight)


def look_ahead_loss(residuals: Residuals, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Cross-entropy of what each router says one layer early to what it then says, mean over layers."""
    losses = [
        F.cross_entropy(residuals.ahead(i), logits.detach().float().softmax(-1))
        for i, logits in enumerate(router_logits)
        if i > 0
    ]
    return torch.stack(losses).mean()


def windows(tokens: np.ndarray, starts: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([tokens[s : s + WINDOW] for s in starts]).astype(np.int64))


def held_out_windows(work: Path, per_source: int) -> dict[str, torch.Tensor]:
    """Evenly spaced windows [n, 512] of held-out text per source."""
    out = {}
    for name in SOURCES:
        tokens = np.load(work / f"{name}.held.npy")
        count = min(per_source, (len(tokens) - 1) // WINDOW)
        out[name] = windows(tokens, np.linspace(0, len(tokens) - WINDOW - 1, count).astype(int))
    return out


@torch.no_grad()
def evaluate(model: MixtralForCausalLM, held: dict[str, torch.Tensor]) -> dict[str, float]:
    """Held-out loss (nats per token) per source."""
    model.eval()
    losses = {
        name: float(np.mean([model(input_ids=w[None], labels=w[None]).loss.item() for w in x]))
        for name, x in held.items()
    }
    model.train()
    return losses


@torch.no_grad()
def routing(model: MixtralForCausalLM, held: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Teacher-forced routing of held-out windows: experts [T, L, 2], and the same as predicted one layer earlier.

    The prediction is router[l](norm[l](residual before the MoE block of layer l - 1)); row 0 repeats the experts.
    """
    model.eval()
    residuals = Residuals(model)
    experts, predicted = [], []
    for x in held.values():
        for w in x:
            logits = model(input_ids=w[None], output_router_logits=True).router_logits
            chosen = torch.stack([r.topk(2, -1).indices for r in logits], 1)  # [T, L, 2]
            guess = chosen.clone()
            for i in range(1, len(logits)):
                guess[:, i] = residuals.ahead(i).topk(2, -1).indices
            experts.append(chosen)
            predicted.append(guess)
    residuals.remove()
    model.train()
    return torch.cat(experts).numpy(), torch.cat(predicted).numpy()


def routing_summary(experts: np.ndarray, predicted: np.ndarray) -> dict[str, object]:
    """Overlap of consecutive tokens and next-router recall@2, mean and per layer."""
    overlap = (experts[1:, :, :, None] == experts[:-1, :, None, :]).any(3).mean((0, 2))
    recall = (predicted[:, 1:, :, None] == experts[:, 1:, None, :]).any(2).mean((0, 2))
    share = (
        np.stack([np.bincount(experts[:, i].ravel(), minlength=8) for i in range(experts.shape[1])])
        / experts[:, 0].size
    )
    return {
        "overlap": round(float(overlap.mean()), 4),
        "recall": round(float(recall.mean()), 4),
        "recall_by_layer": recall.round(3).tolist(),
        "busiest_over_uniform": round(float(share.max(1).mean() * 8), 3),
    }


def train(work: Path, steps: int, decay: float, report_s: float) -> None:
    """Warm up, hold the rate, then let it fall linearly to zero over the last `decay` of `steps`; resumes where it
    was.
    """
    model = build_model()
    hidden = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embed" not in n and "mlp.gate" not in n]
    others = [p for n, p in model.named_parameters() if not any(p is h for h in hidden)]
    optimizers = [Muon(hidden, 0.02), torch.optim.AdamW(others, 3e-3, betas=(0.9, 0.95), weight_decay=0.01)]
    rates = [group["lr"] for o in optimizers for group in o.param_groups]
    checkpoint, step = work / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for o, s in zip(optimizers, saved["optimizers"], strict=True):
            o.load_state_dict(s)
        step = saved["step"]
    data = {name: np.load(work / f"{name}.train.npy") for name in SOURCES}
    held = held_out_windows(work, 4)
    residuals = Residuals(model)
    model.train()
    began = last = time.monotonic()
    start = step
    while step < steps:
        rng = np.random.default_rng(step)  # a resumed run sees the batches an uninterrupted one would
        names = rng.choice(list(SOURCES), BATCH, p=list(SOURCES.values()))
        x = torch.cat([windows(data[n], rng.integers(0, len(data[n]) - WINDOW, 1)) for n in names])
        factor = min(1.0, (step + 1) / 100, (steps - step) / (steps * decay))
        for rate, group in zip(rates, (g for o in optimizers for g in o.param_groups), strict=True):
            group["lr"] = rate * factor
        out = model(input_ids=x, labels=x, output_router_logits=True)
        # transformers adds its own pooled loss to out.loss when router logits are asked for: take the plain one.
        plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        balance = balance_loss(out.router_logits, 2)
        ahead = look_ahead_loss(residuals, out.router_logits)
        (plain + BALANCE * balance + LOOK_AHEAD * ahead).backward()
        for o in optimizers:
            torch.nn.utils.clip_grad_norm_([p for g in o.param_groups for p in g["params"]], 1.0)
            o.step()
            o.zero_grad()
        step += 1
        if step % 25 == 0:
            rate_s = (step - start) * x.numel() / (time.monotonic() - began)
            seen = step * x.numel() / 1e6
            print(
                f"{step:6} {seen:6.2f} M {rate_s:6.0f}/s loss {plain:.3f} balance {balance:.3f} ahead {ahead:.3f}",
                flush=True,
            )
        if step == steps or time.monotonic() - last > report_s:
            last = time.monotonic()
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            losses = {n: round(v, 3) for n, v in evaluate(model, held).items()}
            print("held-out", json.dumps(losses), json.dumps(routing_summary(*routing(model, held))), flush=True)


def export(work: Path, out: Path) -> None:
    """Write the bfloat16 model and its tokenizer, the files that ship."""
    model = build_model()
    model.load_state_dict(torch.load(work / "checkpoint.pt", weights_only=True)["model"])
    model.bfloat16().save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(work / "tokenizer").save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for tokens and checkpoints")
    parser.add_argument("--steps", type=int, default=4000, help=f"steps of {BATCH} x {WINDOW} tokens in all")
    parser.add_argument(
        "--decay", type=float, default=0.3, help="last share of the steps over which the rate falls to 0"
    )
    parser.add_argument(
        "--report-s", type=float, default=300.0, help="seconds between checkpoints with held-out figures"
    )
    parser.add_argument("--export", type=Path, help="write the trained model into this folder and stop")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.export:
        export(args.work, args.export)
        return
    if not (args.work / "tokenizer").exists():
        prepare(args.work)
    train(args.work, args.steps, args.decay, args.report_s)


if __name__ == "__main__":
    main()
