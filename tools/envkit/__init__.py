"""Sets up .venv. Standard library only: it runs before anything is installed."""
