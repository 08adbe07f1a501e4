"""Models of other tools, read and written: Hugging Face directories and GGUF files."""
