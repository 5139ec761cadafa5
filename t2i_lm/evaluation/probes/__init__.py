"""What is left of a language model's abilities: held-out text, questions, completions (Table 1)."""
