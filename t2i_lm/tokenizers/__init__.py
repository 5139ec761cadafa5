"""Text and image tokenizers behind two small protocols (`base.py`)."""
