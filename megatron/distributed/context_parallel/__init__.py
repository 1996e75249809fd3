"""Context parallelism: the ranks of a context axis share each sequence."""
