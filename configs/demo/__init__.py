"""Configs of the demo: the chain, its pre-training run and its report."""
