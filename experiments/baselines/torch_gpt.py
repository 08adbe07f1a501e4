"""GPT-2's architecture in eager torch, as plainly as nanoGPT trains it: what throughput.py is compared with.

A process of its own, so that torch's threads and memory disturb nothing. Each line on standard input is a
JSON object, a `Shape` of throughput.py with its "seconds"; each is answered by one on standard output,
{"tokens_per_second", "parameters"}.
"""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); GELU, no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (y.view(shape).transpose(1, 2) for y in self.qkv(self.attention_norm(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Learned positions and a tied head."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, sequence_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(sequence_length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.embedding.weight)


class Trainer:
    """The model of one shape with its optimizer and a batch, kept between measurements."""

    def __init__(self, shape: dict) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        sizes = {k: shape[k] for k in ("layers", "width", "heads", "vocabulary", "sequence_length")}
        rows = (2, shape["batch_size"], shape["sequence_length"])
        self.tokens, self.targets = torch.randint(shape["vocabulary"], rows, device=device)
        self.model = GPT(**sizes).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, (0.9, 0.95), fused=device == "cuda")
        self.cast = torch.autocast(device, torch.bfloat16, enabled=shape["dtype"] == "bfloat16")
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step(self) -> None:
        with self.cast:
            logits = self.model(self.tokens)
            loss = functional.cross_entropy(logits.flatten(0, 1), self.targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measure(self, seconds: float) -> dict:
        """Tokens per second over about `seconds`, after two steps to warm up."""
        for _ in range(2):
            self.step()
        self.wait()
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            self.step()
            self.wait()
            steps += 1
        return {
            "tokens_per_second": steps * self.tokens.numel() / (time.perf_counter() - start),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def main() -> None:
    trainers: dict[str, Trainer] = {}
    for line in sys.stdin:
        shape = json.loads(line)
        seconds, key = shape.pop("seconds"), json.dumps(shape)
        trainers[key] = trainers.get(key) or Trainer(shape)
        print(json.dumps(trainers[key].measure(seconds)), flush=True)


if __name__ == "__main__":
    main()
