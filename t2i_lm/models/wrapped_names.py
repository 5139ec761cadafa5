"""Names of tensors in checkpoints of wrapped modules."""

from collections.abc import Mapping

from torch import Tensor

# Parts that torch.compile, FSDP and activation checkpointing add around a module, wherever they wrap one.
ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# DistributedDataParallel's; an ordinary name elsewhere.
OUTERMOST = "module"


def unwrapped(name: str) -> str:
    """A tensor's name without the parts that wrappers add, in any order."""
    parts = [part for part in name.split(".") if part not in ANYWHERE]
    while len(parts) > 1 and parts[0] == OUTERMOST:
        parts = parts[1:]
    return ".".join(parts)


def renaming() -> dict[str, str]:
    """`unwrapped` as substitutions of regular expressions."""
    anywhere = "|".join(ANYWHERE)
    return {rf"^(?:(?:{anywhere}|{OUTERMOST})\.)+": "", rf"\.(?:{anywhere})(?=\.)": ""}


def unwrapped_state(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Tensors under their names without wrappers.

    Raises:
        ValueError: if two of them then have one name.
    """
    names: dict[str, str] = {}
    for name in state:
        other = names.setdefault(unwrapped(name), name)
        if other != name:
            raise ValueError(
                f"tensors {other} and {name} in {origin} have one name, {unwrapped(name)}, without wrappers"
            )
    return {own: state[name] for own, name in names.items()}
