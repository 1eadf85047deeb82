"""influent: which training data made the model do that."""
