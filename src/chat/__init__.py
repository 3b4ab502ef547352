"""A conversation, from a file to token ids and labels."""
