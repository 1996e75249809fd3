"""A model behind HTTP: requests in, text out as it grows."""
