"""Configs of experiments.convert."""
