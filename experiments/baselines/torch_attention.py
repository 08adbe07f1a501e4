"""torch's fused attention on the CPU or a GPU: what attention_speed.py is compared with.

A process of its own, so that torch's threads disturb nothing. Each line on standard input is a JSON object, a
`Case` of attention_speed.py with its "seconds" and whether "gradient"; each is answered by one on standard
output, {"seconds"}, the median of the calls.
"""

import json
import statistics
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention


def measure(
    batch: int, length: int, heads: int, head_width: int, seconds: float, gradient: bool, name: str
) -> float:
    """The median call of causal self-attention, with the gradient of all three inputs or without."""
    q, k, v, d_out = torch.randn(4, batch, length, heads, head_width).transpose(2, 3)
    for x in (q, k, v):
        x.requires_grad_(gradient)
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        called = time.perf_counter()
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        if gradient:
            torch.autograd.grad(out, (q, k, v), d_out)
        times.append(time.perf_counter() - called)
    return statistics.median(times)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps({"seconds": measure(**json.loads(line))}), flush=True)
