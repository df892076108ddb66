"""What the proving model is made of: its pictures and questions (:mod:`.drawing`), its tokenizer and its weights."""
