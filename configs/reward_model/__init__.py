"""Configs of experiments.reward_model."""
