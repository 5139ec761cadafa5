"""t2i_lm: does a pre-trained language model help auto-regressive text-to-image generation?"""
