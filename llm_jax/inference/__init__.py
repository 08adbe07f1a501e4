"""Generation: opening a model, sampling, decoding in batches, chat."""
