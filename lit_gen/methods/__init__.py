"""One Lightning module per paper."""
