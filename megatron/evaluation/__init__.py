"""Scores of a trained model on tasks of the Language Model Evaluation Harness (lm-eval)."""
