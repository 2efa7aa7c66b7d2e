"""Sampling through the whole engine: distribution, reproducibility and penalties.

The references are transformers' own logits processors over the oracle's logits, and for OpenAI's penalties the formula
itself.
"""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.compute.cpu.kernels import Kernels
from server.compute.reference.sampling import TorchSampling
from server.engine.sampling.sampler import CANDIDATES, sample
from server.engine.sequence import SampledRow, SamplingParams, Sequence
from tests.numeric.drive import Drive
from tests.numeric.lab import Lab
from tests.numeric.oracle import Mix

pytestmark = pytest.mark.usefixtures("one_thread")

ALL: Mix = (("all", 1.0),)
PROMPT = tuple(range(60, 77))
DRAWS = 2500
"""Draws per case. Seeds are fixed, so no run fails by chance."""
SHAPES = [
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=1.5),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=0.8, top_p=0.6),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9),
]


def reference(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [vocabulary] that transformers samples from, given logits [vocabulary]."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.tensor([PROMPT]), logits.unsqueeze(0))[0].softmax(-1)


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """Chance of counts at least as far from ``expected``; cells that expect under 5 are one cell."""
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum().unsqueeze(0)]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum().unsqueeze(0)]).double()
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), statistic / 2).item()


def first_tokens(drive: Drive, shapes: list[SamplingParams], draws: int) -> list[Counter[int]]:
    """Counts of the first token for each shape, ``draws`` seeds each; every batch mixes all shapes."""
    owner = {}
    for seed in range(draws):
        for index, shape in enumerate(shapes):
            # A seed must not be used for two shapes, or their draws would be the same points of the unit interval.
            params = replace(shape, seed=seed * len(shapes) + index, max_tokens=1)
            owner[drive.submit(ALL, PROMPT, params)] = index
        drive.step()
    drive.run()
    assert not drive.failed
    counts: list[Counter[int]] = [Counter() for _ in shapes]
    for id_, index in owner.items():
        counts[index][drive.tokens[id_][0]] += 1
    return counts


def test_tokens_follow_the_distribution(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path, max_batch_sequences=12, max_queue=10_000)
    logits = llama.oracle.logits(ALL, PROMPT)[-1]
    for shape, counter in zip(SHAPES, first_tokens(drive, SHAPES, DRAWS), strict=True):
        expected = reference(logits, shape) * DRAWS
        counts = torch.tensor([counter[token] for token in range(len(expected))])
        assert counts[expected == 0].sum() == 0, f"{shape} drew a token that was cut"
        assert (expected > 5).sum() >= 2, "a test of one cell tests nothing"
        assert chi_square_p(counts, expected) > 1e-3, shape
        hotter = reference(logits, replace(shape, temperature=1.4 * shape.temperature)) * DRAWS
        assert chi_square_p(counts, hotter) < 1e-4, "so few draws would not tell a wrong temperature"


def test_a_temperature_near_zero_is_greedy(llama: Lab, tmp_path: Path) -> None:
    """Logits divided by 1e-40 leave the range of float32."""
    drive = llama.drive(tmp_path)
    ids = [drive.submit(ALL, PROMPT, SamplingParams(temperature=t, max_tokens=12)) for t in (1e-4, 1e-40, 1e-300)]
    drive.run()
    expected = llama.oracle.solo(ALL, PROMPT, 12).tokens
    assert [tuple(drive.tokens[id_]) for id_ in ids] == [expected] * len(ids)


def test_a_seed_gives_one_answer_whatever_the_batch(llama: Lab, tmp_path: Path) -> None:
    seeded = SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=20)
    alone = llama.drive(tmp_path / "alone")
    id_ = alone.submit(ALL, PROMPT, seeded)
    alone.run()

    rng = random.Random(1)
    busy = llama.drive(tmp_path / "busy", max_batch_tokens=11)
    same = []
    for index in range(24):
        prompt = tuple(rng.randrange(256) for _ in range(rng.randint(1, 30)))
        busy.submit(rng.choice([ALL, (), (("one", 1.0),)]), prompt, SamplingParams(max_tokens=rng.randint(1, 20)))
        if index % 6 == 0:
            same.append(busy.submit(ALL, PROMPT, seeded))
        busy.step()
    other = busy.submit(ALL, PROMPT, replace(seeded, seed=8))
    busy.run()
    assert all(busy.tokens[one] == alone.tokens[id_] for one in same)
    assert busy.tokens[other] != alone.tokens[id_]


def test_without_a_seed_answers_differ(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path)
    ids = [drive.submit(ALL, PROMPT, SamplingParams(temperature=1.0, max_tokens=12)) for _ in range(4)]
    drive.run()
    assert len({tuple(drive.tokens[id_]) for id_ in ids}) == 4


def penalised(llama: Lab, params: SamplingParams) -> tuple[int, ...]:
    """Greedy answer by the definitions: repetition over prompt and answer, OpenAI's two over the answer, then bias."""
    tokens = list(PROMPT)
    for _ in range(params.max_tokens):
        logits = llama.oracle.logits(ALL, tokens)[-1]
        if params.repetition_penalty != 1:
            repetition = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
            logits = repetition(torch.tensor([tokens]), logits.unsqueeze(0))[0]
        for token, count in Counter(tokens[len(PROMPT) :]).items():
            logits[token] -= params.frequency_penalty * count + params.presence_penalty
        for token, bias in params.logit_bias:
            logits[token] += bias
        tokens.append(int(logits.argmax()))
    return tuple(tokens[len(PROMPT) :])


GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.mark.parametrize(
    "params",
    [
        replace(GREEDY, repetition_penalty=1.6),
        replace(GREEDY, repetition_penalty=0.8),
        replace(GREEDY, presence_penalty=2.0),
        replace(GREEDY, presence_penalty=-2.0),
        replace(GREEDY, frequency_penalty=1.5),
        replace(GREEDY, frequency_penalty=-1.0),
        replace(GREEDY, logit_bias=((65, 3.0), (66, 4.0), (200, -100.0))),
        replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5, logit_bias=((65, 2.0),)),
    ],
    ids=lambda params: f"r{params.repetition_penalty}-p{params.presence_penalty}-f{params.frequency_penalty}",
)
def test_penalties(llama: Lab, params: SamplingParams, tmp_path: Path) -> None:
    """In a batch with rows without penalties, which must not be affected."""
    drive = llama.drive(tmp_path)
    mates = [drive.submit(ALL, PROMPT, GREEDY) for _ in range(2)]
    id_ = drive.submit(ALL, PROMPT, params)
    drive.run()
    plain = llama.oracle.solo(ALL, PROMPT, GREEDY.max_tokens).tokens
    expected = penalised(llama, params)
    assert expected != plain, "these penalties change nothing here"
    assert tuple(drive.tokens[id_]) == expected
    assert all(tuple(drive.tokens[mate]) == plain for mate in mates)


def test_a_banned_token_is_never_sampled(llama: Lab, tmp_path: Path) -> None:
    answer = llama.oracle.solo(ALL, PROMPT, 1).tokens[0]
    drive = llama.drive(tmp_path)
    params = SamplingParams(temperature=1.0, logit_bias=((answer, -100.0),), max_tokens=16)
    ids = [drive.submit(ALL, PROMPT, replace(params, seed=seed)) for seed in range(20)]
    drive.run()
    assert all(answer not in drive.tokens[id_] for id_ in ids)


@pytest.mark.parametrize("least", [0, 1, 5, 9])
def test_no_stop_token_is_sampled_before_min_tokens(llama: Lab, least: int, tmp_path: Path) -> None:
    stops = llama.oracle.solo(ALL, PROMPT, 3).tokens
    tokens: list[int] = []
    while not tokens or (tokens[-1] not in stops and len(tokens) < 12):
        logits = llama.oracle.logits(ALL, [*PROMPT, *tokens])[-1]
        if len(tokens) < least:
            logits[list(stops)] = -torch.inf
        tokens.append(int(logits.argmax()))
    drive = llama.drive(tmp_path)
    params = replace(GREEDY, max_tokens=12, min_tokens=least, stop_token_ids=frozenset(stops))
    drawn = replace(params, temperature=1.0, logit_bias=tuple((stop, 5.0) for stop in stops))
    id_, *others = [drive.submit(ALL, PROMPT, params), *(drive.submit(ALL, PROMPT, drawn) for _ in range(20))]
    drive.run()
    assert drive.tokens[id_] == tokens
    for other in others:
        assert not set(stops) & set(drive.tokens[other][:-1])
        assert len(drive.tokens[other]) > least or drive.finish[other] == "length"


READING = {"tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}


class Crossings(TorchFunctionMode):
    """Counts where the host would wait for a device: reads from it, and copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.sent = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.read += name in READING
        self.sent += name in ("tensor", "as_tensor")
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.sent += any(isinstance(one, list) for one in index)
            self.read += any(isinstance(one, Tensor) and one.dtype == torch.bool for one in index)
        return func(*args, **kwargs or {})


def a_row_of_each_kind() -> list[SampledRow]:
    kinds = [
        GREEDY,
        SamplingParams(temperature=0, repetition_penalty=1.2, presence_penalty=0.5, logit_bias=((3, 1.0),)),
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=0.8, frequency_penalty=0.1, top_k=CANDIDATES - 1),
        SamplingParams(temperature=0.8, top_p=0.9),
    ]
    sequences = [Sequence(str(i), list(PROMPT), replace(params, seed=i)) for i, params in enumerate(kinds)]
    for sequence in sequences:
        sequence.append(7)
    return [SampledRow(sequence) for sequence in sequences]


def test_sampling_reads_from_the_device_once_and_copies_to_it_twice() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 4 * CANDIDATES) * 4
    logits[5, 3] = torch.nan  # nor are its cuts looked at again
    with Crossings() as crossings:
        tokens = sample(logits, a_row_of_each_kind(), TorchSampling())
    assert [token is None for token in tokens] == [False] * 5 + [True]
    assert (crossings.read, crossings.sent) == (1, 2)


def test_filters_that_keep_more_than_the_candidates_need_a_second_read() -> None:
    with Crossings() as crossings:
        tokens = sample(torch.zeros(6, 4 * CANDIDATES), a_row_of_each_kind(), TorchSampling())
    assert None not in tokens
    assert (crossings.read, crossings.sent) == (2, 3)


@pytest.mark.parametrize("vocabulary", [64, 100, 1000])
def test_peaks_by_the_kernel_are_torchs(vocabulary: int, kernels: Kernels) -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, vocabulary)
    logits[1] = logits[1].round()  # ties: the first counts
    logits[2, -1], logits[3, 0], logits[4, 7] = 100, 100, torch.inf
    logits[5, 50], logits[6, -1], logits[7], logits[8, :40] = torch.nan, torch.nan, -torch.inf, -torch.inf
    peaks, tokens = kernels.row_peaks(logits)
    expected, _ = TorchSampling().row_peaks(logits)
    finite = ~expected.isnan()
    assert torch.equal(peaks[finite], expected[finite])
    assert peaks.isnan().tolist() == expected.isnan().tolist()
    first = [int((row == row.max()).nonzero()[0]) for row in logits[finite]]
    assert tokens[finite].tolist() == first


def rows_of_many_kinds(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Logits [rows, vocabulary] from flat to peaked, with ties, and impossible tokens; and temperatures."""
    torch.manual_seed(0)
    logits = torch.randn(8, vocabulary) * torch.tensor([0.0, 0.1, 1, 3, 10, 3, 3, 3]).unsqueeze(-1)
    logits[5, : vocabulary // 2] = -torch.inf
    logits[6] = logits[6].round()
    logits[7, :-1] = -torch.inf
    return logits, torch.tensor([1.0, 0.3, 1.0, 0.7, 1.5, 2e-5, 1.0, 1.0])


@pytest.mark.parametrize("vocabulary", [1, 64, 300, 5003])
def test_draws_by_the_kernel_are_torchs(vocabulary: int, kernels: Kernels) -> None:
    logits, temperatures = rows_of_many_kinds(vocabulary)
    probs = torch.softmax(logits.double() / temperatures.double().unsqueeze(-1), dim=-1)
    after = probs.cumsum(-1)
    for u in (0.0, 1e-9, 0.1, 0.37, 0.5, 0.9, 0.999, 1 - 2**-53):
        at = torch.full((8,), u, dtype=torch.float64)
        for tokens in (work.draw_rows(logits, temperatures, at) for work in (kernels, TorchSampling())):
            assert (probs.gather(-1, tokens.unsqueeze(-1)) > 0).all()
            end = after.gather(-1, tokens.unsqueeze(-1))[:, 0]
            begin = end - probs.gather(-1, tokens.unsqueeze(-1))[:, 0]
            assert ((begin - 1e-6 <= u) & (u <= end + 1e-6)).all()


@pytest.mark.parametrize(("vocabulary", "width"), [(1, 1), (64, 64), (300, 7), (5003, 16), (40_000, CANDIDATES)])
def test_the_likeliest_by_the_kernel_are_torchs(vocabulary: int, width: int, kernels: Kernels) -> None:
    logits, temperatures = rows_of_many_kinds(vocabulary)
    probs, tokens = kernels.top_rows(logits, temperatures, width)
    expected, _ = TorchSampling().top_rows(logits, temperatures, width)
    torch.testing.assert_close(probs, expected, rtol=1e-5, atol=1e-12)
    assert all(len(set(row)) == width for row in tokens.tolist())
    torch.testing.assert_close(logits.gather(-1, tokens), logits.sort(descending=True).values[:, :width])
    assert tokens[0].tolist() == list(range(width))  # equally likely: the earlier ones


def test_rows_that_are_not_finite_do_no_harm(kernels: Kernels) -> None:
    logits = torch.randn(3, 1000)
    logits[0, 5], logits[1], logits[2] = torch.nan, -torch.inf, torch.nan
    ones = torch.ones(3)
    drawn = kernels.draw_rows(logits, ones, ones.double() / 2)
    _, likely = kernels.top_rows(logits, ones, 9)
    for tokens in (drawn, likely):
        assert ((tokens >= 0) & (tokens < 1000)).all()
