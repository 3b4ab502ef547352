"""Chat data, from a file of any kind to conversations in one normal form."""
