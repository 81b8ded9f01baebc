"""Ablation studies: variants of a recipe, each trained with several seeds, and the table of what they change."""
