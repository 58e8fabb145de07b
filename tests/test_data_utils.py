"""Tests of the data augmentations: TextBrewer's numbers, properties, frequencies, and what is refused."""

import collections

import numpy as np
import pytest

from textbrewer import data_utils
from textbrewer.data_utils import deleting, long_disorder, masking, n_gram_sampling, short_disorder

IDS = list(range(12))
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "again", "and", "again"]
FUNCTIONS = [masking, deleting, n_gram_sampling, short_disorder, long_disorder]
GENERATORS = [None, np.random.RandomState(3), np.random.default_rng(3)]

# Printed by TextBrewer 0.2.1.post1 after numpy.random.seed(7): the result, then numpy.random.randint(0, 10**6),
# which shows that as many random numbers were used.
ORIGINAL = [
    (masking, (WORDS, 0.4), ["[MASK]", *WORDS[1:7], "[MASK]", "[MASK]", "again", "and", "again"], 351148),
    (deleting, (IDS, 0.5), [1, 3, 4, 5, 6, 10, 11], 351148),
    (deleting, (IDS * 2,), [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 4, 5, 7, 8, 10, 11], 828164),
    (short_disorder, (IDS, [0.2] * 5), [0, 3, 1, 2, 6, 5, 4, 9, 7, 8, 11, 10], 712078),
    (short_disorder, (IDS, [0.1, 0, 0.3, 0.3, 0.3]), [0, 2, 3, 1, 6, 4, 5, 8, 9, 7, 11, 10], 712078),
    (
        short_disorder,
        (IDS * 2,),
        [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 5, 4, 6, 7, 9, 8, 10, 11],
        889595,
    ),
    (short_disorder, ([1],), [1], 585903),
    (long_disorder, (IDS, 0.5, 4), [2, 3, 0, 1, 4, 7, 8, 5, 6, 9, 10, 11], 328599),
    (long_disorder, (IDS, 0.3, 3), [2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 10, 11], 618056),
    (long_disorder, (IDS, 0.3, 0.4), [2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 10, 11], 618056),
    (
        long_disorder,
        (IDS * 4,),
        [10, 11, *range(8), *range(10), 8, 9, 10, 11, 0, 1, *range(10), *range(2, 12), 10, 11],
        551642,
    ),
    (long_disorder, (IDS, 1, 1), [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5], 573977),
    (long_disorder, (IDS[:11], 1, 0.4), [2, 3, 0, 1, 6, 7, 4, 5, 8, 9, 10], 759363),
    (long_disorder, (IDS, 1, 50), IDS, 585903),
    (long_disorder, (IDS[:5], 1, 1), IDS[:5], 585903),
]


@pytest.mark.parametrize(("function", "arguments", "expected", "following"), ORIGINAL)
@pytest.mark.parametrize("kind", [list, tuple, np.array])
@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_of_the_original(function, arguments, expected, following, kind, legacy):
    tokens = kind(arguments[0])
    if legacy:
        random = np.random.RandomState(7)
        result = function(tokens, *arguments[1:], generator=random)
    else:
        np.random.seed(7)
        random = np.random
        result = function(tokens, *arguments[1:])
    assert type(result) is type(tokens)
    assert list(result) == expected
    assert random.randint(0, 10**6) == following


def test_n_grams_of_the_original():
    # Printed by TextBrewer 0.2.1.post1, as above.
    np.random.seed(7)
    spans = [n_gram_sampling(IDS) for _ in range(6)]
    assert spans == [[9], [3, 4], [7, 8, 9, 10], [8, 9, 10], [4, 5, 6], [7, 8, 9, 10, 11]]
    assert np.random.randint(0, 10**6) == 351148
    np.random.seed(7)
    spans = [n_gram_sampling(np.array(IDS), [0.25, 0.75], [3, 6]).tolist() for _ in range(4)]
    assert spans == [[9, 10, 11], [3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5]]
    assert np.random.randint(0, 10**6) == 315737


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", [list, tuple, np.array])
@pytest.mark.parametrize("generator", GENERATORS)
def test_a_new_sequence_of_the_same_kind_and_the_old_one_untouched(function, kind, generator):
    tokens = kind(WORDS)
    result = function(tokens, generator=generator)
    assert type(result) is type(tokens)
    assert list(tokens) == WORDS
    if isinstance(result, np.ndarray):
        assert not np.shares_memory(result, tokens)
    elif kind is list:
        assert result is not tokens


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("tokens", [[], (), np.array([], dtype=np.int64)])
@pytest.mark.parametrize("generator", GENERATORS)
def test_empty_input_gives_empty_output(function, tokens, generator):
    result = function(tokens, generator=generator)
    assert type(result) is type(tokens)
    assert len(result) == 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_generator_repeats_and_leaves_the_global_one_alone(function):
    before = np.random.get_state()[1].copy()
    first = [function(IDS, generator=np.random.default_rng(5)) for _ in range(2)]
    assert first[0] == first[1]
    random = np.random.default_rng(5)
    draws = [tuple(function(IDS * 20, generator=random)) for _ in range(5)]
    assert len(set(draws)) > 1
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("generator", [np.random.RandomState(0), np.random.default_rng(0)])
def test_frequencies(generator):
    count, p = 20_000, 0.3
    margin = 5 * (p * (1 - p) / count) ** 0.5  # five standard deviations of a share
    masked = masking(np.zeros(count, dtype=int), p, mask=1, generator=generator)
    assert masked.mean() == pytest.approx(p, abs=margin)
    assert len(deleting(list(range(count)), p, generator=generator)) / count == pytest.approx(1 - p, abs=margin)
    spans = [tuple(n_gram_sampling([0, 1, 2], [0.7, 0.3], [1, 2], generator=generator)) for _ in range(5000)]
    shares = {span: number / 5000 for span, number in collections.Counter(spans).items()}
    expected = {(0,): 0.7 / 3, (1,): 0.7 / 3, (2,): 0.7 / 3, (0, 1): 0.15, (1, 2): 0.15}
    assert shares == pytest.approx(expected, abs=5 * (0.25 / 5000) ** 0.5)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (0, "abcdefgh"),
        (1, "badcfehg"),
        (2, "cbafedhg"),  # two tokens are left at the end: swapped
        (3, "cabfdehg"),
        (4, "bcaefdhg"),
    ],
)
def test_each_short_disorder(case, expected):
    probabilities = [float(number == case) for number in range(5)]
    assert "".join(short_disorder(list("abcdefgh"), probabilities)) == expected
    assert "".join(short_disorder(np.array(list("abcdefgh")), probabilities)) == expected


@pytest.mark.parametrize("p", [0, 1])
def test_probabilities_zero_and_one(p):
    assert masking(IDS, p, -1) == ([-1] * 12 if p else IDS)
    assert deleting(IDS, p) == ([] if p else IDS)
    assert long_disorder(IDS, p, 6) == ([3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8] if p else IDS)


@pytest.mark.parametrize("function", [short_disorder, long_disorder])
def test_disorder_is_a_permutation(function):
    random = np.random.default_rng(0)
    arguments = {"p": [0.2] * 5} if function is short_disorder else {"p": 0.5, "length": 5}
    for size in range(30):
        moved = function(list(range(size)), **arguments, generator=random)
        assert sorted(moved) == list(range(size))


@pytest.mark.parametrize("size", range(1, 5))
def test_n_gram_longer_than_the_input_gives_all_of_it(size):
    # The original raised "low >= high" from numpy here.
    assert n_gram_sampling(IDS[:size], [1.0], [5]) == IDS[:size]


def test_n_gram_of_an_array_is_a_copy():
    tokens = np.array(IDS)
    n_gram_sampling(tokens)[:] = -1
    assert tokens.tolist() == IDS


@pytest.mark.parametrize(("size", "length"), [(0, 0.5), (3, 0.2), (1, 0.9), (1, 20)])
def test_long_disorder_of_a_span_without_tokens_ends(size, length):
    # The original looped for ever where the span came to no token and p was 1.
    assert long_disorder(IDS[:size], 1, length) == IDS[:size]


def test_masking_arrays():
    assert masking(np.array(["a", "bc"]), 1).tolist() == ["[MASK]", "[MASK]"]  # not cut to two characters
    assert masking(np.array(["a", 1], dtype=object), 1).tolist() == ["[MASK]", "[MASK]"]
    result = masking(np.array([1, 2], dtype=np.int32), 1, mask=103)
    assert result.dtype == np.int32
    assert result.tolist() == [103, 103]
    assert masking(np.array([1, 2]), 1, mask=np.int64(7)).tolist() == [7, 7]
    assert masking(np.array([1.0, 2.0], dtype=np.float32), 1, mask=0.1).dtype == np.float32


@pytest.mark.parametrize(("dtype", "mask"), [(int, "[MASK]"), (int, 0.5), (np.int8, 300), (np.uint8, -1), ("U3", 3)])
def test_a_mask_the_array_cannot_hold_is_refused(dtype, mask):
    with pytest.raises(TypeError, match="mask must be a value that an array of"):
        masking(np.array([1, 2]).astype(dtype), 0.0, mask)


def test_numpy_numbers_are_numbers():
    assert masking(IDS, np.float32(0), -1) == IDS
    assert long_disorder(IDS, np.float64(1), np.int64(12)) == [*range(6, 12), *range(6)]
    assert n_gram_sampling(IDS, np.array([1.0]), np.array([12])) == IDS
    assert sorted(short_disorder(IDS, np.array([0.9, 0.1, 0, 0, 0], dtype=np.float32))) == IDS


@pytest.mark.parametrize("function", [masking, deleting, long_disorder])
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_p_out_of_range(function, p):
    with pytest.raises(ValueError, match="p must be a probability between 0 and 1, got"):
        function(IDS, p)


@pytest.mark.parametrize("function", [masking, deleting, long_disorder])
@pytest.mark.parametrize("p", ["0.1", None, True])
def test_p_of_the_wrong_type(function, p):
    with pytest.raises(TypeError, match="p must be a number"):
        function(IDS, p)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ([0.5, 0.5], "must be 5 probabilities"),
        ([0.9, 0.2, 0, 0, 0], "sum to 1"),
        ([1.1, -0.1, 0, 0, 0], "at least 0"),
        ([float("nan"), 1, 0, 0, 0], "at least 0"),
        (["a"] * 5, "must be 5 probabilities"),
    ],
)
def test_distributions_that_are_none(p, message):
    with pytest.raises(ValueError, match=message):
        short_disorder(IDS, p)
    with pytest.raises(ValueError, match=message):
        n_gram_sampling(IDS, p)


@pytest.mark.parametrize("lengths", [[0, 2], [-1, 2], [1.5, 2]])
def test_n_gram_lengths_below_one_or_broken(lengths):
    with pytest.raises(ValueError, match="each length in l_ng must be"):
        n_gram_sampling(IDS, [0.5, 0.5], lengths)


def test_n_gram_without_lengths():
    with pytest.raises(ValueError, match="p_ng must be probabilities"):
        n_gram_sampling(IDS, [], [])


@pytest.mark.parametrize("length", [0, -4, 1.5, float("inf"), float("nan")])
def test_long_disorder_lengths_that_mean_nothing(length):
    with pytest.raises(ValueError, match="length must be"):
        long_disorder(IDS, 0.1, length)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_sequence_of_tokens(function):
    with pytest.raises(TypeError, match="tokens must be a list, tuple or numpy array"):
        function("one string")
    with pytest.raises(ValueError, match="one row at a time"):
        function(np.zeros((2, 3)))
    with pytest.raises(TypeError, match="generator must be a numpy generator"):
        function(IDS, generator=7)


def test_public_names():
    assert sorted(function.__name__ for function in FUNCTIONS) == data_utils.__all__
