"""The engine: requests in, completions out; scheduling, KV blocks, model steps and sampling in between."""
