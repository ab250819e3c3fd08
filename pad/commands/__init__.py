"""The commands: what each asks (settings), and what it does (a recipe from top to bottom)."""
