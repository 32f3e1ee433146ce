"""Building blocks that models share: linear, embedding, norm, rotary, attention, MLP."""
