"""A small model that drafts: it proposes its own greedy continuation, whatever was cut and read before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cargos.runtimes.llama.native import Context, Model, NativeError
from cargos.runtimes.llama.sampling import choose
from cargos.runtimes.shards.draft_model import READ_ROWS, DraftModel
from protocol.dice import Dice
from protocol.work import Sampling

pytestmark = pytest.mark.model

GREEDY = Sampling(seed=1, temperature=0.0)
TEXT = "The tide comes in twice a day because the Moon pulls the sea. When the Moon is"


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[Model]:
    loaded = Model([str(smollm2_path)])
    yield loaded
    loaded.close()


@pytest.fixture
def drafts(smollm2_path: Path, model: Model) -> Iterator[DraftModel]:
    loaded = DraftModel(str(smollm2_path), model, sequences=2, context_length=128, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture
def greedy(model: Model) -> Iterator[Callable[[list[int], int], list[int]]]:
    context = Context(model, context_length=128, n_seq=1, n_batch=128, threads=1, flash_attention=True)

    def go_on(tokens: list[int], count: int) -> list[int]:
        context.clear()
        context.decode(tokens, range(len(tokens)), [0] * len(tokens), [len(tokens) - 1])
        made = [int(context.logits(len(tokens) - 1).argmax())]
        while len(made) < count:
            context.decode([made[-1]], [len(tokens) + len(made) - 1], [0], [0])
            made.append(int(context.logits(0).argmax()))
        return made

    yield go_on
    context.close()


def test_it_proposes_what_it_would_say(
    model: Model, drafts: DraftModel, greedy: Callable[[list[int], int], list[int]]
) -> None:
    tokens = model.tokenize(TEXT, parse_special=False)
    drafter = drafts.drafter(GREEDY, 0)
    assert drafter is not None
    assert drafts.token_ns > 0, "what a draft costs is known before the first one"
    assert drafter.match() is None
    drafter.extend(tokens)
    for _ in range(len(tokens) // READ_ROWS):
        assert drafter.propose(5) == []  # it reads the prompt in steps
    proposed = drafter.propose(5)
    assert proposed == greedy(tokens, 5)
    # Two are right, then another token comes: the rest of its own is forgotten.
    tokens += [*proposed[:2], 42]
    drafter.extend([*proposed[:2], 42])
    assert drafter.propose(3) == greedy(tokens, 3)
    # All are right, and one more comes.
    proposed = drafter.propose(3)
    tokens += [*proposed, *greedy([*tokens, *proposed], 1)]
    drafter.extend(tokens[-4:])
    assert drafter.propose(2) == greedy(tokens, 2)
    del tokens[-6:]
    drafter.truncate(len(tokens))
    assert drafter.propose(2) == greedy(tokens, 2)


def test_it_draws_as_the_head_will(model: Model, drafts: DraftModel) -> None:
    """The same model samples with the numbers of the same places: all its drafts are right."""
    prompt = model.tokenize("A poem about the sea:", parse_special=False)
    sampling = Sampling(seed=11, temperature=1.1, top_p=0.95)
    drafter = drafts.drafter(sampling, len(prompt))
    assert drafter is not None
    drafter.extend(prompt)
    context = Context(model, context_length=128, n_seq=1, n_batch=128, threads=1, flash_attention=True)
    context.decode(prompt, range(len(prompt)), [0] * len(prompt), [len(prompt) - 1])
    made = [choose(context.logits(len(prompt) - 1), sampling, 0)]
    while len(made) < 12:
        context.decode([made[-1]], [len(prompt) + len(made) - 1], [0], [0])
        made.append(choose(context.logits(0), sampling, len(made)))
    context.close()
    assert drafter.propose(5) == made[:5]
    drafter.extend(made[:7])
    assert drafter.propose(5) == made[7:]


def test_sessions_do_not_disturb_each_other(
    model: Model, drafts: DraftModel, greedy: Callable[[list[int], int], list[int]]
) -> None:
    dice = Dice(2)
    told = [
        model.tokenize(text, parse_special=False)[:20] for text in (TEXT, "One, two, three, four, five, six")
    ]
    drafters = [drafts.drafter(GREEDY, 0), drafts.drafter(GREEDY, 0)]
    assert drafts.drafter(GREEDY, 0) is None
    for drafter, tokens in zip(drafters, told, strict=True):
        assert drafter is not None
        drafter.extend(tokens)
    for _ in range(6):
        which = dice.below(2)
        drafter, tokens = drafters[which], told[which]
        assert drafter is not None
        proposed = drafter.propose(3)
        assert proposed == greedy(tokens, 3)
        new = [*proposed[: dice.below(4)], dice.below(1000)]
        drafter.extend(new)
        tokens += new
    first = drafters[0]
    assert first is not None
    first.close()
    again = drafts.drafter(GREEDY, 0)
    assert again is not None
    again.extend(told[1])
    while not (proposed := again.propose(2)):
        pass
    assert proposed == greedy(told[1], 2)


def test_its_context_ends(model: Model, drafts: DraftModel) -> None:
    drafter = drafts.drafter(GREEDY, 0)
    assert drafter is not None
    drafter.extend(model.tokenize(TEXT, parse_special=False) * 8)
    drafter.truncate(127)
    while not (proposed := drafter.propose(9)):
        pass
    assert len(proposed) == 1
    drafter.extend([5, 6])
    assert drafter.propose(9) == []


def test_another_vocabulary_is_refused(smollm2_path: Path, model: Model) -> None:
    fewer = SimpleNamespace(n_vocab=100, text_of=model.text_of)
    other = SimpleNamespace(n_vocab=model.n_vocab, text_of=lambda token: b"x%d" % token)
    for vocabulary in (fewer, other):
        with pytest.raises(NativeError, match="vocabulary"):
            DraftModel(str(smollm2_path), cast("Any", vocabulary), sequences=1, context_length=64, threads=1)
