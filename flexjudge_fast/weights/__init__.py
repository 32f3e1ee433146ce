"""Checkpoints: safetensors folders and GGUF files, read as they are published, nothing in them executed."""
