import pytest
import torch

from t2i_lm.runtime.seeds import generator, seeded


@pytest.mark.parametrize("fails", [False, True])
def test_a_seeded_block_draws_what_its_seed_gives_and_leaves_the_global_stream_as_it_was(fails: bool) -> None:
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


def test_a_stream_draws_the_seed_of_each_block() -> None:
    stream, again = generator(0, "blocks"), generator(0, "blocks")
    drawn = []
    for source in (stream, stream, again):
        with seeded(source):
            drawn.append(torch.rand(3))
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
