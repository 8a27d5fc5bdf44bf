"""Configs of experiments.planted_truth."""
