"""Configs of experiments.ppo."""
