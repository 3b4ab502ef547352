"""A model's weights and files: found, loaded, changed, written, proven. Knows no verb."""
