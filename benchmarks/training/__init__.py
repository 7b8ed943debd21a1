"""How the small model of the demo was trained."""
