"""What a whole run costs, and which passes fit a budget."""
