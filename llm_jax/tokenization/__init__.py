"""Training and using tokenizers."""
