"""Configs of experiments.words."""
