"""Text out of a trained model, and the scores it gives to text."""
