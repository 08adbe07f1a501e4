"""Continuing a text.

python -m llm_jax.generate --model=DIR|FILE.gguf|RUN --prompt='Once upon a time' --temperature=0.8 --n=2
"""

import json
import sys

from absl import flags

from llm_jax import command_line
from llm_jax.config import UserError
from llm_jax.inference import options
from llm_jax.inference.batching import Batcher, Request
from llm_jax.inference.generation import Engine
from llm_jax.process import prepare_xla


def main() -> None:
    f = flags.FLAGS
    prepare_xla(deterministic=False)
    if not f.model or not f.prompt:
        raise UserError("--model and --prompt are needed, for example --model=runs/mine --prompt='Once upon'")
    options.check(n=1, slots=1, candidates=0)
    opened = options.opened(f.model)
    prompts = [opened.encode(text) for text in f.prompt]
    requests = [
        Request(prompt, options.sampling(), f.max_tokens, opened.stop_ids, tuple(f.stop), number)
        for prompt in prompts
        for number in range(f.n)
    ]
    engine = Engine(opened.config, opened.params, f.candidates, opened.mesh, keep=False)
    batcher = Batcher(engine, min(len(requests), f.slots), opened.context, opened.tokenizer)
    answers = [batcher.submit(request) for request in requests]
    streaming = len(answers) == 1 and not f.json
    while batcher.busy:
        for _, piece in batcher.step():
            if streaming:
                sys.stdout.write(piece)
                sys.stdout.flush()
    if streaming:
        print()
    for answer, text in zip(answers, [text for text in f.prompt for _ in range(f.n)], strict=True):
        if f.json:
            tokens = [token._asdict() for token in answer.tokens]
            print(
                json.dumps({"prompt": text, "text": answer.text, "finish": answer.finish, "tokens": tokens})
            )
        elif not streaming:
            print(f"==> {text!r}, sample {answer.request.number}\n{answer.text}")


if __name__ == "__main__":
    options.define()
    flags.DEFINE_multi_string("prompt", None, "a text to continue; may be given several times")
    flags.DEFINE_integer("n", 1, "samples of each prompt")
    flags.DEFINE_integer("slots", 16, "how many are decoded at once")
    flags.DEFINE_integer("candidates", 0, "how many of the most probable tokens --json tells at each place")
    flags.DEFINE_bool("json", False, "a JSON line an answer: text, tokens, log-probabilities")
    command_line.run_main(main)
