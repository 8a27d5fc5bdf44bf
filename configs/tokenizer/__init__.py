"""Configs of experiments.train_tokenizer."""
