"""Configs of experiments.generate."""
