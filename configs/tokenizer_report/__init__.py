"""Configs of experiments.tokenizer_report."""
