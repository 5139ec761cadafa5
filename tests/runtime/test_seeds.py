import pytest
import torch

from t2i_lm.runtime.seeds import generator, seeded


@pytest.mark.parametrize("fails", [False, True])
def test_seeded_uses_its_seed_and_restores_the_global_generator(fails: bool) -> None:
    state = torch.get_rng_state()
    try:
        with seeded(5):
            drawn = torch.rand(3)
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        pass
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_seeded_samples_its_seed_from_a_generator() -> None:
    stream, again = generator(0, "blocks"), generator(0, "blocks")
    drawn = []
    for source in (stream, stream, again):
        with seeded(source):
            drawn.append(torch.rand(3))
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
