"""What the tiers count and how they show it."""
