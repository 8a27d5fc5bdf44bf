"""Configs of experiments.known_utility."""
