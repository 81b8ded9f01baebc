"""Evaluation: tasks, and the loop that runs a recipe's tasks on student and teacher."""
