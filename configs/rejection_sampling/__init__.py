"""Configs of experiments.rejection_sampling."""
