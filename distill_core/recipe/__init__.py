"""A recipe: YAML with lines -> sections and components, every error at file:line."""
