"""What comes with the second proving model: its pictures, weights and tokenizer."""
