"""The built-in teachers: averages and snapshots of the student, frozen towers, stored embeddings, several as one."""
