"""Configs of experiments.sft."""
