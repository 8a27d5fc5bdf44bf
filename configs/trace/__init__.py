"""Configs of experiments.trace."""
