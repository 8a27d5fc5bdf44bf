"""Configs of experiments.chat."""
