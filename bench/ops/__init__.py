"""The ops one by one: their cases, their rooflines, and pytest-benchmark over the same cases."""
