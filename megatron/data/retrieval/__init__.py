"""Queries and passages: samples of the inverse cloze task, and of questions with their passages."""
