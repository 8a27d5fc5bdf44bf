"""Configs of experiments.dpo."""
