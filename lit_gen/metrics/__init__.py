"""Metrics with ground truth: the oracle and what it scores."""
