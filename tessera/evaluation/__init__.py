"""What a model is worth: the fixed evaluation, and the interview that chooses the voices."""
