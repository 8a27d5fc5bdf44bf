"""Configs of experiments.scaling_laws."""
