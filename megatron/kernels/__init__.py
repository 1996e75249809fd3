"""Fast operations, each beside its plain twin; which one is used is decided once, when the model is built."""
