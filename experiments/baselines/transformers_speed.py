"""transformers generating greedily: what decode_speed.py is compared with.

    python transformers_speed.py FOLDER THREADS

Each line on standard input is {"batch", "prompt", "tokens"}; each is answered by the tokens per second of
reading prompts of so many tokens, "prefill", and of continuing them, "decode", all rows together.
"""

import json
import sys
import time

import torch
import transformers


def turn(model: torch.nn.Module, batch: int, prompt: int, tokens: int) -> dict[str, float]:
    """The loop that `generate` makes, without what it does beside."""
    ids = torch.randint(model.config.vocab_size, (batch, prompt))
    start = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    read = time.perf_counter()
    for _ in range(tokens):
        chosen = out.logits[:, -1:].argmax(-1)
        out = model(chosen, past_key_values=out.past_key_values, use_cache=True)
    out.logits[:, -1:].argmax(-1)
    done = time.perf_counter()
    return {"prefill": batch * prompt / (read - start), "decode": batch * tokens / (done - read)}


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    with torch.inference_mode():
        for line in sys.stdin:
            print(json.dumps(turn(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
