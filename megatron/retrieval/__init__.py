"""Embedding a corpus with trained encoders, and searching it for passages that answer questions."""
