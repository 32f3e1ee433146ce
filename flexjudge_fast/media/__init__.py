"""Media that are judged: what they are, and where they come from."""
