"""From a base model to a chat model: conversations, preferences, rewards, and the training that uses them."""
