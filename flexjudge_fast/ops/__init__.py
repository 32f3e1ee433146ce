"""One function per op: its signature with shapes and dtypes, its torch reference, its dispatch."""
