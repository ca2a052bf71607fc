"""How answers are scored, and how scores are compared."""
