"""Text and image tokenizers, their joint vocabulary, and sequence layouts."""
