"""Evaluation: sets of samples, their cached embeddings, scores, and the run of a recipe's tasks."""
