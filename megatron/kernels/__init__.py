"""Fast kernels, each with a plain reference implementation; the choice is made once, when the model is built."""
