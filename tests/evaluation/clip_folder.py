"""A CLIP model of transformers: the real architecture, tiny and random."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

POSITIONS = 40


def write_clip(path: Path, seed: int = 47) -> Path:
    """Two layers each, images of 32 pixels, a vocabulary of single letters.

    With this seed cosines are well above 0, where torchmetrics would cut them and all would be equal.
    """
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=POSITIONS)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(pieces),
        "max_position_embeddings": POSITIONS,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
    }
    image = {**sizes, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=16))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # versions of transformers draw other weights
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1 or name.endswith("class_embedding"):
                parameter.normal_(std=0.05, generator=generator)
    model.save_pretrained(path)
    resized = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=resized, tokenizer=tokenizer).save_pretrained(path)
    return path
