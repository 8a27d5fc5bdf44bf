"""Configs of experiments.pretrain."""
