"""A server of two tiny models in this process, and what asks it."""

import contextlib
import dataclasses
import http.client
import json
import threading
import time

import openai
import tokenizers as library
from tiny import parameters

from llm_jax.inference.opening import Opened
from llm_jax.inference.sampling import Sampling
from llm_jax.inference.server import Server, listen, runner
from llm_jax.interop import tokenizer as tokenizers
from llm_jax.models.transformer import Transformer

TEMPLATE = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}[a]"
MODEL = Transformer(layers=1, width=16, heads=2, vocabulary=257)
LETTERS = dataclasses.replace(tokenizers.of_bytes(), chat_template=TEMPLATE, context=4096)
HI = [{"role": "user", "content": "hi"}]
LONG = 4000  # tokens, which nobody waits for
TINY = Opened("tiny", MODEL, parameters(MODEL.build()), LETTERS, LETTERS.context)
CALL = '<T_C>{"name": "calculator", "arguments": {"expression": "6*7"}}</T_C>'
CALLER_ID, LAST_ID = 257, ord("Z")


def caller():
    """A model with a token that is a whole call."""
    letters = library.Tokenizer.from_str(LETTERS.data)
    letters.add_tokens([library.AddedToken(CALL, normalized=False)])
    model = dataclasses.replace(MODEL, vocabulary=258)
    tokenizer = dataclasses.replace(LETTERS, data=letters.to_str())
    return Opened("caller", model, parameters(model.build()), tokenizer, LETTERS.context)


# It calls, and once it has read its call, which a penalty then forbids, it says Z.
CALLING = {"temperature": 0, "max_tokens": 1, "logit_bias": {CALLER_ID: 900, LAST_ID: 500}}
CALLING |= {"repetition_penalty": 1e30}
BASE = Opened("base", MODEL, parameters(MODEL.build(), seed=1), tokenizers.of_bytes(), None)


class Web:
    """A server in this process, and what asks it."""

    def __init__(self, speakers, token=None, tools=None, **defaults):
        self.socket = listen("127.0.0.1", 0, token)
        self.port = self.socket.getsockname()[1]
        plain = {"system": "", "max_tokens": 8, "stop": [], "seed": 0, **dataclasses.asdict(Sampling())}
        self.server = Server(speakers, plain | defaults, tools)
        self.runner = runner(self.server, token)
        self.thread = threading.Thread(target=self.runner.run, kwargs={"sockets": [self.socket]})

    def __enter__(self):
        self.thread.start()
        while not self.runner.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{self.port}"
        self.url, self.client = url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        return self

    def __exit__(self, *_):
        self.runner.should_exit = True
        self.thread.join()
        self.server.close()
        self.client.close()

    def ask(self, path, body=None, **headers):
        """(status, JSON or text, headers) of a request; body: JSON, or bytes as they are."""
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        ) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            given = {"Content-Type": "application/json"} if data is not None else {}
            given |= {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request("GET" if data is None else "POST", path, data, given)
            response = connection.getresponse()
            text = response.read().decode()
            kind = response.headers["Content-Type"]
            return response.status, json.loads(text) if kind == "application/json" else text, response.headers

    def chat(self, **body):
        return self.client.chat.completions.create(**{"model": "tiny", "messages": HI, **body})

    def batcher(self, name="tiny"):
        return self.server.workers[name].speaker.batcher
