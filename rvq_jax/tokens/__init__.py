"""Images of any size and whole data sets as tokens, and back."""
