"""Names of the made-up parts below their folder."""

OPEN_LM = "open_lm"
CHECKPOINT, CONFIG = f"{OPEN_LM}/epoch_1.pt", f"{OPEN_LM}/open_lm_rehearsal.json"  # the checkpoint by upstream's name
NEOX = "gpt_neox/tokenizer.json"
MOVQGAN = "movqgan.ckpt"
PAIRS = "pairs"
COCO = "coco"
INCEPTION = "inception.pth"
