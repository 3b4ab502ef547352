"""A model behind an OpenAI-compatible endpoint: the protocol, a client, and what can be measured through it."""
