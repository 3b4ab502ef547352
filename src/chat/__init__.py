"""A model's chat template, and a conversation through it: token ids and labels."""
