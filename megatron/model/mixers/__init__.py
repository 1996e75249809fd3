"""Blocks that mix tokens by other means than attention: one file a kind."""
