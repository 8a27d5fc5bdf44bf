"""Configs of experiments.prepare_data."""
