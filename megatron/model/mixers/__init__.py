"""Blocks with token mixers other than attention, one file a kind."""
