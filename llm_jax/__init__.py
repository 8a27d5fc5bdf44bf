"""llm_jax: decoder-only language models, from raw text to a trained and evaluated model, on any device mesh."""
