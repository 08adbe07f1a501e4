"""What transformers generates greedily with the tiny models of tests/interop/fixtures.

    python tests/inference/greedy.py      # writes fixtures/greedy.json anew; needs the extra `parity`

Two prompts of each model, the first tokens of its expected.npz, continued by 64 tokens; with transformers'
cache and without it, which must agree.
"""

import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
MODELS = HERE.parent / "interop" / "fixtures"
NAMES = sorted(path.parent.name for path in MODELS.glob("*/expected.npz"))
PROMPTS = 5, 9  # tokens
LONGEST = 64
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def prompts(name: str) -> list[np.ndarray]:
    tokens = np.load(MODELS / name / "expected.npz")["tokens"]
    return [row[:length].astype(np.int32) for row, length in zip(tokens, PROMPTS, strict=True)]


def main() -> None:
    import torch
    import transformers

    found = {}
    for folder in (MODELS / name for name in NAMES):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **EAGER).eval()
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        found[folder.name] = []
        for prompt in prompts(folder.name):
            ids = torch.from_numpy(prompt[None].astype(np.int64))
            rows = [
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    use_cache=cached,
                    max_new_tokens=LONGEST,
                )[0, len(prompt) :].tolist()
                for cached in (True, False)
            ]
            assert rows[0] == rows[1], folder.name
            found[folder.name].append(rows[0])
        print(folder.name, found[folder.name][0][:8], flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "fixtures").mkdir(exist_ok=True)
    (HERE / "fixtures" / "greedy.json").write_text(json.dumps({"versions": versions, "tokens": found}) + "\n")


if __name__ == "__main__":
    main()
