"""Prompts: typed segments, token ids, templates, the answer's formats and grammar."""
