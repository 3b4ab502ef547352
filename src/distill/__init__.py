"""Prompts, seeds or documents to a dataset, by a teacher: the verb is src.distill.__main__."""
