"""Statistics of ids, against what is known of how the ids were drawn."""

import math
import zlib

import numpy as np
import pytest

from t2i_lm.analysis.tokens import token_statistics
from t2i_lm.tokenizers.entropy import (
    compressed_bits,
    conditional_entropy,
    neighbor_entropies,
    order_entropies,
    zipf_fit,
)

CHAIN = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])


def markov_chain(length: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    states = [0]
    for draw in generator.random(length - 1):
        states.append(int(np.searchsorted(CHAIN[states[-1]].cumsum(), draw)))
    return np.array(states) * 1000 + 7  # ids with gaps


def test_entropies_of_a_markov_chain_are_its_own() -> None:
    values, vectors = np.linalg.eig(CHAIN.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    own = -(stationary * np.log2(stationary)).sum()
    rate = -(stationary[:, None] * CHAIN * np.log2(CHAIN)).sum()
    chain = markov_chain(60_000)
    assert conditional_entropy(chain).bits == pytest.approx(own, abs=0.01)
    entropies = order_entropies([chain], 3)
    for entropy in entropies:  # tokens further back say nothing more
        assert entropy.bits == pytest.approx(rate, abs=0.01)
        assert entropy.tokens == len(chain) - 3
        assert entropy.well_sampled
    assert [entropy.contexts for entropy in entropies] == [3, 9, 27]
    assert [entropy.pairs for entropy in entropies] == [9, 27, 81]


def test_the_correction_is_miller_and_madows_and_reduces_the_bias() -> None:
    generator = np.random.default_rng(0)
    plug_in, corrected = [], []
    for _ in range(200):
        tokens, context = generator.integers(0, 8, 100), generator.integers(0, 4, 100)
        entropy = conditional_entropy(tokens, context)
        expected = (entropy.pairs - entropy.contexts) / (2 * 100 * math.log(2))
        assert entropy.bits - entropy.plug_in == pytest.approx(expected)
        plug_in.append(entropy.plug_in)
        corrected.append(entropy.bits)
    assert np.mean(plug_in) < 2.87  # of 3 bits
    assert np.mean(corrected) == pytest.approx(3, abs=0.03)


def test_contexts_end_with_their_sequence_and_few_observations_are_said() -> None:
    assert order_entropies([np.array([1, 2]), np.array([3, 4])], 3) == []
    (entropy,) = order_entropies([np.array([1, 2]), np.array([3, 4]), np.array([5])], 1)
    assert (entropy.tokens, entropy.contexts, entropy.plug_in) == (2, 2, 0.0)  # not 2 -> 3 and 4 -> 5
    assert not entropy.well_sampled


def test_an_image_whose_rows_repeat_is_known_from_its_upper_neighbor() -> None:
    row = np.random.default_rng(0).integers(0, 4, (500, 1, 9))
    found = neighbor_entropies(np.repeat(row, 5, axis=1))
    assert found["upper"].bits == pytest.approx(0, abs=1e-9)
    assert found["left and upper"].bits == pytest.approx(0, abs=1e-9)
    assert found["left"].plug_in == pytest.approx(2, abs=0.01)
    assert {entropy.tokens for entropy in found.values()} == {500 * 4 * 8}
    assert neighbor_entropies(row) == {}


@pytest.mark.parametrize("slope", [-1.0, -0.6])
def test_the_slope_of_a_law_is_found(slope: float) -> None:
    counts = (1e7 * np.arange(1, 2001, dtype=float) ** slope).astype(int)
    fit = zipf_fit(counts)
    assert fit is not None
    assert fit.slope == pytest.approx(slope, abs=1e-3)
    assert fit.r2 == pytest.approx(1, abs=1e-5)
    assert fit.ranks == 2000
    assert fit.frequency(np.array([1]))[0] == pytest.approx(1e7, rel=1e-2)


def test_rare_ids_are_left_out_of_the_fit() -> None:
    counts = np.array([8000, 4000, 2000, 1000, *[1] * 500])
    fit = zipf_fit(counts)
    assert fit is not None
    assert fit.ranks == 4
    assert zipf_fit(np.array([100, 20, 1])) is None


def test_compression_counts_bits_per_token() -> None:
    ids = np.random.default_rng(0).integers(0, 2**16, 5000)
    packed = compressed_bits(ids)
    assert packed["zlib"] == 8 * len(zlib.compress(ids.astype("<u2").tobytes(), 9)) / 5000
    assert packed["zlib"] == pytest.approx(16, rel=0.01)
    assert compressed_bits(np.zeros(5000, dtype=int))["lzma"] < 0.2
    assert compressed_bits(ids + 2**16)["zlib"] > 16  # four bytes each


def test_numbers_of_a_modality_hold_counts() -> None:
    images = np.random.default_rng(0).integers(0, 4, (50, 3, 3))
    numbers = token_statistics(list(images.reshape(50, 9)), 4, images).numbers()
    assert numbers["tokens"] == 450
    assert numbers["distinct"] == numbers["vocabulary"] == 4
    assert numbers["uniform_bits"] == 2
    assert set(numbers["entropy_bits"]) == {"none", "1", "2", "3", "left", "upper", "left and upper"}
    assert numbers["entropy_bits"]["1"]["tokens"] == 50 * 6
