"""Data: corpora, tokenizers, the token store, and batches as a pure function of (seed, step)."""

from llm_jax.data.batches import Text, TextSource
from llm_jax.data.cache import cache_folder
from llm_jax.data.chat import Chat
from llm_jax.data.corpora import Corpus, Files, Mixture, Python, Weighted
from llm_jax.data.markov import Markov
from llm_jax.data.sources import Batch, DataConfig, HeldOut, Source
from llm_jax.data.tokenizers import Bytes, HuggingFace, SentencePiece, SentencePieceFile, Tokenizer

__all__ = [
    "Batch",
    "Bytes",
    "Chat",
    "Corpus",
    "DataConfig",
    "Files",
    "HeldOut",
    "HuggingFace",
    "Markov",
    "Mixture",
    "Python",
    "SentencePiece",
    "SentencePieceFile",
    "Source",
    "Text",
    "TextSource",
    "Tokenizer",
    "Weighted",
    "cache_folder",
]
