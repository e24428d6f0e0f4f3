"""Made-up conversations: the same for the same seed, within their measures, and worth a cache."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from smg.lab.conversations import CHARS_PER_TOKEN, ConversationTraffic, conversations

FEW = ConversationTraffic(conversations=12)


def test_equal_seeds_make_equal_words_and_others_make_others() -> None:
    assert conversations(FEW, 3) == conversations(FEW, 3)
    assert conversations(FEW, 3) != conversations(FEW, 4)


@given(seed=st.integers())
def test_conversations_keep_to_their_measures(seed: int) -> None:
    made = conversations(FEW, seed)
    assert len(made) == FEW.conversations
    starts = [conversation.at_s for conversation in made]
    assert starts == sorted(starts) and starts[0] >= 0.0 and starts[-1] <= FEW.arrivals_s
    assert len({conversation.system for conversation in made}) <= FEW.assistants
    for conversation in made:
        first, *others = conversation.turns
        assert FEW.turns[0] <= len(conversation.turns) <= FEW.turns[1]
        assert is_tokens(conversation.system, FEW.system_tokens)
        assert is_tokens(first.question, FEW.opening_tokens) and first.think_s == 0.0
        for turn in others:
            assert is_tokens(turn.question, FEW.turn_tokens)
            assert FEW.think_s[0] <= turn.think_s <= FEW.think_s[1]
            assert FEW.output_tokens[0] <= turn.output_tokens <= FEW.output_tokens[1]


def is_tokens(text: str, bounds: tuple[int, int]) -> bool:
    tokens, rest = divmod(len(text), CHARS_PER_TOKEN)
    return not rest and bounds[0] <= tokens <= bounds[1]


def test_what_people_ask_is_their_own_and_only_assistants_are_shared() -> None:
    made = conversations(ConversationTraffic())
    openings = [conversation.turns[0].question[:40] for conversation in made]
    assert len(set(openings)) == len(openings)
    assert 1 < len({conversation.system for conversation in made}) < len(made)
